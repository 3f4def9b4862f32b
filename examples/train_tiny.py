"""Train the bundled model: a 5.8M-parameter Llama on the source text of the Python standard library.

    python examples/train_tiny.py            # about 30 minutes on 2 cores, writes examples/tiny-llama

The split is by file (a file is held out by the hash of its name, so every machine holds out the same files), the
tokenizer is a byte-level BPE trained on the training split alone, and everything is seeded. Matrices are optimised
with Muon (Jordan et al. 2024) and the rest with AdamW. Held-out perplexity is measured on the bf16 weights that are
written, over non-overlapping windows that each start with BOS, and goes into the model card.
"""

import hashlib
import math
import sysconfig
from pathlib import Path

import click
import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

BOS, EOS = "<s>", "</s>"
VOCAB_SIZE = 4096
CONTEXT = 1024
# Tables and tests: long, repetitive, and not what a reader would call Python.
SKIPPED_FOLDERS = {"site-packages", "test", "tests", "idle_test", "__pycache__", "encodings", "pydoc_data", "unidata"}


def stdlib_files() -> list[Path]:
    """Source files of the running Python's standard library, sorted by name."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = (p for p in root.rglob("*.py") if not SKIPPED_FOLDERS & set(p.relative_to(root).parts))
    return sorted(p for p in files if p.stat().st_size > 200)


def is_held_out(path: Path) -> bool:
    """About one file in twenty, chosen by the hash of its name."""
    return hashlib.sha256(path.name.encode()).digest()[0] < 13


def read(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="ignore")


def calibration_text(train: list[str], size: int = 500_000) -> str:
    """Pieces of the training text, each from another file: what `optc compile` calibrates this model on by default."""
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0)).tolist()
    piece = 4_000
    return "\n".join(train[i][:piece] for i in order)[:size]


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE that puts BOS before every text, as Llama's does."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=VOCAB_SIZE,
            special_tokens=[BOS, EOS],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    bos = bpe.token_to_id(BOS)
    bpe.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, bos)]),
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=BOS,
        eos_token=EOS,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def tokenize(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> torch.Tensor:
    """One stream of ids, i64[n]: BOS text EOS for every file."""
    stream: list[int] = []
    for text in texts:
        stream += tokenizer(text)["input_ids"] + [tokenizer.eos_token_id]
    return torch.tensor(stream)


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB_SIZE,
            hidden_size=256,
            intermediate_size=768,
            num_hidden_layers=6,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=64,
            max_position_embeddings=CONTEXT,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            attn_implementation="sdpa",
        )
    )


def build_optimizers(model: LlamaForCausalLM) -> list[torch.optim.Optimizer]:
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    rest = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    return [
        torch.optim.Muon(matrices, lr=0.02, weight_decay=0.05, adjust_lr_fn="original"),
        torch.optim.AdamW(rest, lr=3e-3, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def learning_rate_factor(step: int, steps: int) -> float:
    """Linear warm-up over 2 %, flat, then a linear decay to zero over the last 40 %."""
    return min(1.0, (step + 1) / (0.02 * steps), (steps - step) / (0.4 * steps))


@torch.no_grad()
def perplexity(model: LlamaForCausalLM, ids: torch.Tensor, bos: int, window: int = CONTEXT) -> float:
    """Exp of the mean negative log-likelihood over non-overlapping windows, each starting with BOS."""
    total, count = 0.0, 0
    for start in range(0, len(ids), window - 1):
        chunk = torch.cat([torch.tensor([bos]), ids[start : start + window - 1]])[None]
        logits = model(chunk).logits[0, :-1].float()
        total += torch.nn.functional.cross_entropy(logits, chunk[0, 1:], reduction="sum").item()
        count += chunk.shape[1] - 1
    return math.exp(total / count)


CARD = """---
license: psf-2.0
language: code
---
# tiny-llama

A {parameters:,}-parameter Llama (RoPE, GQA 4/2, SwiGLU, tied embeddings) that writes recognisable Python. It exists so
that optc's demo, tests and benchmarks run on a real, trained model with no network. It is not useful for anything else.

- **Data**: the source text of the Python standard library ({python}), {files} files, {train_tokens:,} tokens, without
  tests, encodings and generated tables. {held_files} files, chosen by the hash of their names, are held out; the first
  {held_bytes:,} bytes of their text are `heldout.txt`.
- **Calibration**: `calibration.txt` is the start of 125 files of the training split; `optc compile` takes it by default.
- **Licence**: the data is under the Python Software Foundation License 2.0; so are the weights and both texts.
- **Tokenizer**: byte-level BPE of {vocab}, trained on the training split.
- **Training**: `python examples/train_tiny.py --steps {steps} --batch {batch} --seed {seed}`; {seen:,} tokens seen, bf16
  autocast, Muon + AdamW.
- **Held-out perplexity** (the bf16 weights here, all of `heldout.txt`, non-overlapping windows of {context} with BOS):
  **{ppl:.3f}**
"""


@click.command()
@click.option("--out", type=click.Path(path_type=Path), default=Path(__file__).parent / "tiny-llama", show_default=True)
@click.option("--steps", default=2000, show_default=True, help="Optimiser steps.")
@click.option("--batch", default=5, show_default=True, help=f"Sequences of {CONTEXT} tokens a step.")
@click.option("--seed", default=0, show_default=True)
def main(out: Path, steps: int, batch: int, seed: int) -> None:
    """Train the bundled model and write it in Hugging Face format."""
    torch.manual_seed(seed)
    files = stdlib_files()
    train = [read(p) for p in files if not is_held_out(p)]
    held_out = [read(p) for p in files if is_held_out(p)]
    held_text = "\n".join(held_out)[:400_000]
    tokenizer = train_tokenizer(train)
    ids = tokenize(tokenizer, train)
    held_ids = torch.tensor(tokenizer(held_text, add_special_tokens=False)["input_ids"])
    model = build_model(tokenizer)
    optimizers = build_optimizers(model)
    base_rates = [o.param_groups[0]["lr"] for o in optimizers]
    forward = torch.compile(model)
    click.echo(
        f"{len(train)} files, {len(ids):,} tokens; held out {len(held_out)} files, {len(held_ids):,} tokens shipped"
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns) as progress:
        task = progress.add_task("train", total=steps)
        for step in range(steps):
            starts = torch.randint(0, len(ids) - CONTEXT - 1, (batch,))
            window = torch.stack([ids[s : s + CONTEXT + 1] for s in starts.tolist()])
            with torch.autocast("cpu", torch.bfloat16):
                logits = forward(window[:, :-1], use_cache=False).logits
            loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), window[:, 1:].flatten())
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer, rate in zip(optimizers, base_rates, strict=True):
                optimizer.param_groups[0]["lr"] = rate * learning_rate_factor(step, steps)
                optimizer.step()
                optimizer.zero_grad()
            progress.update(task, advance=1, description=f"train, loss {loss.item():.3f}")
            if step % 100 == 99:
                progress.console.print(f"step {step + 1}: loss {loss.item():.3f}")

    model = model.to(torch.bfloat16).eval()
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    (out / "heldout.txt").write_text(held_text, encoding="utf-8")
    (out / "calibration.txt").write_text(calibration_text(train), encoding="utf-8")
    bos = tokenizer.convert_tokens_to_ids(BOS)
    ppl = perplexity(model, held_ids, bos)
    card = CARD.format(
        parameters=sum(p.numel() for p in model.parameters()),
        python=f"CPython {sysconfig.get_python_version()}",
        files=len(train),
        held_files=len(held_out),
        held_bytes=len(held_text.encode()),
        train_tokens=len(ids),
        vocab=VOCAB_SIZE,
        steps=steps,
        batch=batch,
        seed=seed,
        seen=steps * batch * CONTEXT,
        context=CONTEXT,
        ppl=ppl,
    )
    (out / "README.md").write_text(card, encoding="utf-8")
    click.echo(f"held-out perplexity {ppl:.3f}; wrote {out}")


if __name__ == "__main__":
    main()
