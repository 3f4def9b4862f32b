"""lm-eval's tasks on an artifact: local task files, results beside figures computed with transformers alone."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from click.testing import CliRunner
from transformers import AutoModelForCausalLM

from optc.cli import main
from optc.errors import ArtifactError, OptcError, RequestError, UsageError

lm_eval = pytest.importorskip("lm_eval", reason='needs pip install "optc[eval]"')

from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from optc.optimizer.lm_eval import ArtifactLM  # noqa: E402

CHOICES = [
    {"question": "The quick brown", "choices": ["fox", "Käsekuchen", "dog and"], "answer": 0},
    {"question": "def f(x): return", "choices": ["x + 1", "the dog"], "answer": 0},
    {"question": "Où est la", "choices": ["El", "bibliothèque", "fox jumps over"], "answer": 1},
    {"question": "日本語の", "choices": ["テキスト", "lazy", "🎉"], "answer": 2},
]
DOCUMENTS = [{"page": "The quick brown fox jumps over the lazy dog. " * 20}, {"page": "Grüße aus München: ein Tag"}]
PROMPTS = [
    {"prompt": "The quick", "target": ""},
    {"prompt": "def f(x)", "target": ""},
    {"prompt": "Tag für", "target": ""},
]
STOP, NUM_TOKENS = "e", 24
TASKS = {
    "choices": """
        output_type: multiple_choice
        doc_to_text: "{{question}}"
        doc_to_target: answer
        doc_to_choice: choices
        metric_list: [{metric: acc}, {metric: acc_norm}]
    """,
    "documents": """
        output_type: loglikelihood_rolling
        doc_to_text: ""
        doc_to_target: "{{page}}"
        metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]
    """,
    "prompts": f"""
        output_type: generate_until
        doc_to_text: "{{{{prompt}}}}"
        doc_to_target: "{{{{target}}}}"
        generation_kwargs: {{until: ["{STOP}"], max_gen_toks: {NUM_TOKENS}, do_sample: false}}
        metric_list: [{{metric: exact_match}}]
    """,
}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with three tasks and their data."""
    folder = tmp_path_factory.mktemp("tasks")
    for name, rows in (("choices", CHOICES), ("documents", DOCUMENTS), ("prompts", PROMPTS)):
        data = folder / f"{name}.jsonl"
        data.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
        shared = {
            "task": f"local_{name}",
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(data)}},
            "test_split": "test",
        }
        lines = [f"{key}: {json.dumps(value)}" for key, value in shared.items()]
        lines += [line.strip() for line in TASKS[name].strip().splitlines()]
        (folder / f"{name}.yaml").write_text("\n".join(lines), encoding="utf-8")
    return folder


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


class Reference:
    """The checkpoint, run by transformers one text at a time."""

    def __init__(self, checkpoint: Path) -> None:
        self.tokenizer = tokenizers.Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
        self.model: Any = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()

    @torch.no_grad()
    def score(self, before: list[int], after: list[int]) -> float:
        logits = self.model(torch.tensor([before + after])).logits[0, len(before) - 1 : -1]
        return float(torch.log_softmax(logits.double(), -1).gather(1, torch.tensor(after)[:, None]).sum())

    def score_text(self, before: str, after: str) -> float:
        whole, context = (self.tokenizer.encode(text).ids for text in (before + after, before))
        return self.score(context, whole[len(context) :])

    def score_document(self, text: str, limit: int) -> float:
        ids = self.tokenizer.encode(text, add_special_tokens=False).ids
        total = self.score([0], ids[:limit])
        for start in range(limit, len(ids), limit):  # with as much context as the limit leaves
            end = min(start + limit, len(ids))
            total += self.score(ids[end - limit - 1 : start], ids[start:end])
        return total

    def complete(self, prompt: str) -> str:
        ids = self.tokenizer.encode(prompt).ids
        generated = self.model.generate(
            torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long), do_sample=False,
            temperature=None, top_p=None, max_new_tokens=NUM_TOKENS, pad_token_id=2,
        )  # fmt: skip
        text: str = self.tokenizer.decode(generated[0, len(ids) :].tolist(), skip_special_tokens=True)
        return text.split(STOP)[0]


@pytest.fixture(scope="module")
def reference(checkpoint: Path) -> Reference:
    return Reference(checkpoint)


def instances(kind: Any, *arguments: tuple[Any, ...]) -> list[Instance]:
    return [Instance(kind, doc={}, arguments=given, idx=number) for number, given in enumerate(arguments)]


def test_local_tasks_have_the_results_of_transformers(artifact: Path, tasks: Path, reference: Reference) -> None:
    done = lm_eval.simple_evaluate(
        model="optc",
        model_args={"path": str(artifact), "native": False},
        tasks=["local_choices", "local_documents", "local_prompts"],
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        batch_size=4,
        bootstrap_iters=0,
        log_samples=True,
    )
    results = {
        name: {key.split(",")[0]: value for key, value in found.items()} for name, found in done["results"].items()
    }

    scores = [[reference.score_text(row["question"], f" {choice}") for choice in row["choices"]] for row in CHOICES]  # type: ignore[attr-defined]
    right = [
        max(range(len(found)), key=found.__getitem__) == row["answer"]
        for found, row in zip(scores, CHOICES, strict=True)
    ]
    assert results["local_choices"]["acc"] == sum(right) / len(CHOICES)
    logged = sorted(done["samples"]["local_choices"], key=lambda sample: sample["doc_id"])
    for sample, expected in zip(logged, scores, strict=True):
        assert [found[0] for found in sample["filtered_resps"]] == pytest.approx(expected, abs=1e-3)

    total = sum(reference.score_document(row["page"], 256) for row in DOCUMENTS)
    words = sum(
        len(row["page"].split()) if row["page"][-1] != " " else len(row["page"].split()) + 1 for row in DOCUMENTS
    )
    num_bytes = sum(len(row["page"].encode()) for row in DOCUMENTS)
    assert results["local_documents"]["word_perplexity"] == pytest.approx(math.exp(-total / words), rel=1e-3)
    assert results["local_documents"]["bits_per_byte"] == pytest.approx(-total / num_bytes / math.log(2), rel=1e-4)

    logged = sorted(done["samples"]["local_prompts"], key=lambda sample: sample["doc_id"])
    completions = [reference.complete(row["prompt"]) for row in PROMPTS]
    assert [sample["filtered_resps"][0] for sample in logged] == completions
    assert results["local_prompts"]["exact_match"] == sum(not text for text in completions) / len(PROMPTS)


def test_command_line(artifact: Path, tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["optc"])
    arguments = ["lm-eval", "--model", "optc", "--model_args", f"path={artifact},native=False", "--tasks", "local_choices",
                 "--include_path", tasks, "--batch_size", "auto", "--output_path", tmp_path / "out"]  # fmt: skip
    result = CliRunner().invoke(main, list(map(str, arguments)))
    assert result.exit_code == 0, result.output
    (written,) = (tmp_path / "out").rglob("results_*.json")
    assert json.loads(written.read_text())["results"]["local_choices"]["acc,none"] in (0, 0.25, 0.5, 0.75, 1)


def test_continuations_are_split_as_the_whole_text_is_tokenized(artifact: Path, reference: Reference) -> None:
    model = ArtifactLM(str(artifact), batch_size=3)
    pairs = [("The quick", " brown fox"), ("The ", "quick"), ("", "The quick"), ("日本", "語の"), ("dog " * 400, "fox")]
    found = model.loglikelihood(instances("loglikelihood", *pairs), disable_tqdm=True)
    encode = reference.tokenizer.encode
    expected = [
        reference.score_text("The quick", " brown fox"),
        reference.score_text("The", " quick"),  # lm-eval moves the space
        reference.score([0], encode("The quick", add_special_tokens=False).ids),
        reference.score_text("日本", "語の"),
    ]
    assert [logprob for logprob, _ in found[:4]] == pytest.approx(expected, abs=1e-3)
    ids, context = encode("dog " * 400 + "fox").ids, encode("dog " * 399 + "dog").ids
    last = len(ids) - len(context)
    assert found[4][0] == pytest.approx(reference.score(ids[-257:-last], ids[-last:]), abs=1e-3)


def test_greedy_is_what_the_model_would_say(artifact: Path) -> None:
    model = ArtifactLM(str(artifact))
    ids = model.tok_encode("The quick")
    for _ in range(3):
        (logits,) = model._scorer.score([_scored(ids)])
        ids.append(int(logits[-1].argmax()))
    greedy = (None, ids[:-3], ids[-3:])
    other = (None, ids[:-3], [*ids[-3:-1], (ids[-1] + 1) % 320])
    found = model._loglikelihood_tokens([greedy, other, (None, ids, [])], disable_tqdm=True)
    assert [is_greedy for _, is_greedy in found] == [True, False, True]
    assert found[0][0] > found[1][0] and found[2][0] == 0


def _scored(ids: list[int]) -> Any:
    from optc.runtime.scorer import Scored

    return Scored(ids)


def test_sampling_depends_on_nothing_but_the_request(artifact: Path) -> None:
    options = {"until": [], "max_gen_toks": 12, "do_sample": True, "temperature": 0.9, "top_p": 0.95}
    requests = instances("generate_until", ("The quick", options), ("The quick", options), ("dog", options))
    alone, together = (ArtifactLM(str(artifact), batch_size=size) for size in (1, 3))
    found = alone.generate_until(requests, disable_tqdm=True)
    assert found == together.generate_until(requests, disable_tqdm=True)
    assert found[0] != found[1]


def test_chat_templates(artifact: Path) -> None:
    model = ArtifactLM(str(artifact))
    chat = [{"role": "user", "content": "hello"}]
    prompt = model.apply_chat_template(chat)
    assert prompt.startswith("<s>") and prompt.endswith("<assistant>")
    assert model.tok_encode(prompt)[:2] != [0, 0]  # the template has BOS already
    begun = model.apply_chat_template([*chat, {"role": "assistant", "content": "It is"}], add_generation_prompt=False)
    assert begun.endswith("<assistant>It is")
    template = model.chat_template(True)
    assert template is not None and "assistant" in template and model.chat_template(False) is None
    assert model.tokenizer_name == ArtifactLM(str(artifact)).tokenizer_name


def test_bad_arguments_are_refused(artifact: Path, tmp_path: Path) -> None:
    refused: list[tuple[dict[str, Any], type[OptcError], str]] = [
        ({"path": str(tmp_path / "none")}, ArtifactError, "no such artifact"),
        ({"batch_size": 0}, UsageError, "batch_size 0"),
        ({"batch_size": "many"}, UsageError, "batch_size 'many'"),
        ({"max_length": 999}, UsageError, "max_length 999: expected 2 to 256"),
    ]
    for options, kind, message in refused:
        with pytest.raises(kind, match=message):
            ArtifactLM(**({"path": str(artifact)} | options))
    model = ArtifactLM(str(artifact), max_length=32)
    for options in ({"max_gen_toks": 32}, {"num_beams": 4}):
        with pytest.raises(RequestError):
            model.generate_until(instances("generate_until", ("The", options)), disable_tqdm=True)
    with pytest.raises(RequestError, match="a continuation of"):
        model.loglikelihood(instances("loglikelihood", ("The", " quick" * 99)), disable_tqdm=True)
