"""The accuracy budget: the mix keeps it, a budget that cannot be kept writes nothing, and the manifest says what was chosen."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import optc
from optc.errors import BudgetError, UsageError
from optc.optimizer.budget import Budget, check_budget, choose_mix, measure_whole, quantized, scheme_options
from optc.optimizer.calibration import load_calibration, measuring_samples, prepare_calibration
from optc.optimizer.captured import capture_checkpoint
from optc.optimizer.checkpoint import Checkpoint, load_checkpoint
from optc.optimizer.config import CompileConfig
from optc.optimizer.progress import Progress
from optc.optimizer.targets import find_target
from optc.passes.base import run_passes
from optc.passes.canonicalize import Canonicalize
from optc.passes.graph import Program
from optc.passes.quantize.calibrate import Calibration
from optc.passes.quantize.recipe import KEEP, Recipe, Rule
from optc.passes.quantize.sensitivity import Group
from optc.runtime.artifact import read_manifest

from .budget_cases import chosen, with_text
from .conftest import TEXT
from .test_cli import failed, run

BUNDLED = Path(__file__).resolve().parents[1] / "examples/tiny-llama"
INT4 = Recipe(default="w4a16-g128", adapt=True, rounding="rtn")


@pytest.fixture(scope="module")
def folder(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny checkpoint with a text to measure on."""
    return with_text(checkpoint, tmp_path_factory.mktemp("budget"))


@pytest.fixture(scope="module")
def loaded(folder: Path) -> Checkpoint:
    return load_checkpoint(str(folder))


def prepared(folder: Path) -> Program:
    """A checkpoint as it is when schemes are chosen."""
    config = CompileConfig(source=str(folder), output=Path("unused"), target=find_target("native"))
    program = capture_checkpoint(config, Progress()).program
    run_passes(program, [Canonicalize()])
    return program


@pytest.fixture(scope="module")
def program(folder: Path) -> Program:
    return prepared(folder)


@pytest.fixture(scope="module")
def samples(loaded: Checkpoint) -> list[Tensor]:
    return measuring_samples(loaded, None, num_samples=8, sequence_length=64, seed=0)[:8]


def uniform(program: Program, scheme: str, samples: list[Tensor], calibration: Calibration | None = None) -> float:
    """The divergence of the model with one scheme everywhere."""
    recipe = Recipe(default=scheme, rounding="rtn")
    return measure_whole(program, quantized(program, recipe, calibration), samples).divergence


# ------------------------------------------------------------------------------------------------- the choice


def test_the_whole_is_measured_as_a_model(program: Program, loaded: Checkpoint, samples: list[Tensor]) -> None:
    """Beside the checkpoint as transformers runs it, with dequantized weights, in float64."""
    recipe = Recipe(default="w4a16-g32", rounding="rtn")
    found = quantized(program, recipe, None)
    measured = measure_whole(program, found, samples)
    divergence, increase = measured.divergence, measured.ppl_increase
    changed = load_checkpoint(loaded.source).model
    assert found.quantization is not None
    with torch.no_grad():
        for layer in found.quantization.layers:
            parts = {part: found.weights()[name] for part, name in layer.constants.items()}
            scale = parts["scale"].float().repeat_interleave(32, 1)
            words = parts["codes"]
            shifts = torch.arange(0, 32, 4)
            codes = ((words[..., None] >> shifts) & 15).flatten(1).float()
            changed.get_parameter(layer.name).copy_((codes - 8) * scale)
    kl = losses = tokens = 0.0
    with torch.no_grad():
        for sample in samples:
            a, b = (m(sample[None]).logits[0].double().log_softmax(-1) for m in (loaded.model, changed))
            kl += float((a.exp() * (a - b)).sum())
            losses += float((a - b)[:-1].gather(1, sample[1:, None]).sum())
            tokens += len(sample)
    assert divergence == pytest.approx(kl / tokens, rel=1e-3)
    assert increase == pytest.approx(math.expm1(losses / (tokens - len(samples))), rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("bits", [3.5, 4.5])
def test_bits_are_kept_and_used(program: Program, samples: list[Tensor], bits: float) -> None:
    recipe, record = choose_mix(program, INT4, Budget(bits=bits), None, samples)
    assert record.bits_per_weight is not None and 0.97 * bits < record.bits_per_weight <= bits
    result = quantized(program, recipe, None).quantization
    assert result is not None and result.bits_per_weight == pytest.approx(record.bits_per_weight)
    by_name = {layer.name: layer.scheme for layer in result.layers}
    for group in record.groups:
        assert {by_name[program.sources[name]] for name in group.weights} == {group.chosen}
    assert record.rounds == 1
    assert any("w3" in name for group in record.groups for name in group.kl) == (bits < 4)


def test_tighter_limits_take_more_bits(program: Program, samples: list[Tensor]) -> None:
    largest, sizes = uniform(program, "w4a16-g64", samples), []
    for part in (0.7, 0.1):
        recipe, record = choose_mix(program, INT4, Budget(max_kl=part * largest), None, samples)
        assert record.kl is not None and record.kl <= part * largest
        assert record.kl == measure_whole(program, quantized(program, recipe, None), samples).divergence
        assert record.bits_per_weight is not None
        sizes.append(record.bits_per_weight)
    assert sizes == sorted(set(sizes)) and sizes[-1] < 8.2, "smaller than 8 bits everywhere"


def test_a_limit_that_the_smallest_keeps_takes_the_smallest(program: Program, samples: list[Tensor]) -> None:
    _, record = choose_mix(program, INT4, Budget(max_kl=100.0), None, samples)
    smallest = [min(group.bits_per_weight.values()) for group in record.groups]
    assert [group.bits_per_weight[str(group.chosen)] for group in record.groups] == smallest


def test_perplexity_and_several_limits(program: Program, samples: list[Tensor]) -> None:
    by_kl = choose_mix(program, INT4, Budget(max_kl=0.02), None, samples)[1]
    budget = Budget(max_kl=0.02, max_ppl_increase=0.003, bits=8.0)
    record = choose_mix(program, INT4, budget, None, samples)[1]
    assert record.kl is not None and record.ppl_increase is not None
    assert record.kl <= 0.02 and record.ppl_increase <= 0.003
    assert by_kl.bits_per_weight is not None and record.bits_per_weight is not None
    assert by_kl.bits_per_weight <= record.bits_per_weight <= 8.0
    alone = choose_mix(program, INT4, Budget(max_ppl_increase=0.01), None, samples)[1]
    assert alone.ppl_increase is not None and alone.ppl_increase <= 0.01


@pytest.mark.parametrize("scheme", ["w8a8", "fp8-weight", "fp8-dynamic"])
def test_eight_bits_mix_with_full_precision(program: Program, samples: list[Tensor], scheme: str) -> None:
    everywhere = uniform(program, scheme, samples)
    recipe = Recipe(default=scheme, adapt=True)
    _, record = choose_mix(program, recipe, Budget(max_kl=everywhere / 2), None, samples)
    assert set(chosen(record)) == {scheme, KEEP}
    assert record.kl is not None and record.kl <= everywhere / 2
    assert sum(group.kl[scheme] for group in record.groups) == pytest.approx(everywhere, rel=0.5), "they about add up"


def test_the_same_data_give_the_same_choice(program: Program, samples: list[Tensor]) -> None:
    once, again = (choose_mix(program, INT4, Budget(max_kl=0.02), None, samples) for _ in range(2))
    assert once == again


def test_rules_of_the_recipe_decide_what_there_is_to_choose(program: Program, samples: list[Tensor]) -> None:
    rules = (Rule(name="model.layers.0.*", scheme=KEEP), Rule(role="lm_head", scheme="w4a16-g64"))
    recipe, record = choose_mix(program, INT4.model_copy(update={"rules": rules}), Budget(bits=4.5), None, samples)
    names = [program.sources[name] for group in record.groups for name in group.weights]
    assert "lm_head.weight" in names and not any("layers.0" in name for name in names)
    found = quantized(program, recipe, None).quantization
    assert found is not None and {layer.name for layer in found.layers} == set(names)


@pytest.mark.parametrize(
    ("default", "columns", "bits", "expected"),
    [
        ("w4a16-g128", 256, None, ["w4a16-g128", "w4a16-g64", "w4a16-g32", "w8a16", KEEP]),
        ("w4a16-g128", 64, 4.3, ["w4a16-g64", "w4a16-g32", "w8a16", KEEP]),
        ("w4a16-g128", 64, 4.2, ["w4a16-g64", "w4a16-g32", "w3a16-g64", "w3a16-g32", "w8a16", KEEP]),
        ("w4a16-g128", 48, None, ["w4a16-channel", "w8a16", KEEP]),
        ("w4a16-g128", 48, 3.5, ["w4a16-channel", "w3a16-channel", "w8a16", KEEP]),
        ("w8a8", 48, None, ["w8a8", KEEP]),
    ],
)
def test_options_fit_the_layer(default: str, columns: int, bits: float | None, expected: list[str]) -> None:
    group = Group(("w",), None, 10 * columns, columns, ("mlp",))  # type: ignore[arg-type]
    budget = Budget(max_kl=0.1, bits=bits)
    assert scheme_options(default, group, budget) == expected


# --------------------------------------------------------------------------------------------- what is refused


def test_a_budget_that_cannot_be_kept_shows_what_was_measured(program: Program, samples: list[Tensor]) -> None:
    for budget, words in (
        (Budget(max_kl=1e-12), "best mix of 1 tried.*allow more"),
        (Budget(bits=4.5, max_kl=1e-6), r"--max-kl 1e-06, --bits 4.5.*cannot be kept.*at 4\.[45]\d* bits"),
        (Budget(bits=3.0), r"--bits 3: the smallest mix has 3\.222 bits"),
    ):
        with pytest.raises(BudgetError, match=words) as caught:
            choose_mix(program, INT4, budget, None, samples)
        title, header, *rows = caught.value.details
        assert "KL divergence" in title and header.split()[-2:] == ["chosen", "weights"] and len(rows) == 8
        assert header.split()[-4:-2] == ["w8a16", "none"], "from the fewest bits to the most"
        assert any("q_proj.weight" in row and "v_proj.weight" in row for row in rows)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--max-kl", "0"), "--max-kl 0: expected a number above 0"),
        (("--max-kl", "-1"), "--max-kl -1"),
        (("--max-kl", "nan"), "--max-kl nan"),
        (("--max-kl", "inf"), "--max-kl inf"),
        (("--max-ppl-increase", "0"), "--max-ppl-increase 0%"),
        (("--max-ppl-increase", "-2%"), "--max-ppl-increase -2%: expected a percentage above 0"),
        (("--max-ppl-increase", "nan"), "--max-ppl-increase nan"),
        (("--bits", "1"), "--bits 1: expected"),
        (("--bits", "-4"), "--bits -4"),
        (("--bits", "16.5"), "--bits 16.5"),
        (("--bits", "nan"), "--bits nan"),
    ],
)
def test_limits_without_sense(folder: Path, tmp_path: Path, options: tuple[str, ...], words: str) -> None:
    failed(run("compile", folder, "-o", tmp_path / "out.optc", *options), 2, words)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("options", [("--max-kl", "small"), ("--max-ppl-increase", "2%%"), ("--bits", "four")])
def test_limits_that_are_no_numbers(folder: Path, tmp_path: Path, options: tuple[str, ...]) -> None:
    result = run("compile", folder, "-o", tmp_path / "out.optc", *options)
    assert result.exit_code == 2 and options[1] in result.stderr and "Traceback" not in result.output


def test_a_percentage_with_and_without_its_sign(folder: Path, tmp_path: Path) -> None:
    found = [
        run("compile", folder, "-o", tmp_path / "o", "--recipe", tmp_path / "none.yaml", "--max-ppl-increase", given)
        for given in ("2%", "2", "0.5 %")
    ]
    assert all("not a readable recipe file" in result.stderr for result in found), "the numbers were taken"
    assert str(Budget(max_ppl_increase=0.02)) == "--max-ppl-increase 2%"


def test_a_budget_needs_text_that_is_not_calibrated_on(
    folder: Path, checkpoint: Path, loaded: Checkpoint, tmp_path: Path
) -> None:
    output = tmp_path / "out.optc"
    failed(run("compile", checkpoint, "-o", output, "--int4", "--max-kl", 1), 2, "measured on text", "--calibration")
    assert not output.exists()
    short = tmp_path / "short.txt"
    short.write_text(TEXT * 8, encoding="utf-8")
    with pytest.raises(UsageError, match=r"short\.txt: all of its \d+ sequences are calibrated on") as caught:
        measuring_samples(loaded, short, num_samples=128, sequence_length=64, seed=0)
    count = int(str(caught.value).rsplit(maxsplit=1)[1])  # what the message says to ask for works
    assert count > 1 and measuring_samples(loaded, short, num_samples=count, sequence_length=64, seed=0)
    # What is rounded to nearest needs none of the data, so there is all of it to measure on.
    assert measuring_samples(loaded, short, num_samples=0, sequence_length=64, seed=0)


def test_nothing_is_both_calibrated_and_measured_on(loaded: Checkpoint) -> None:
    arguments: dict[str, Any] = {"num_samples": 8, "sequence_length": 64, "seed": 5}
    _, calibration, _ = prepare_calibration(Recipe(default="w4a16-g32"), loaded, None, **arguments)
    assert calibration is not None
    measured = {tuple(sample.tolist()) for sample in measuring_samples(loaded, None, **arguments)}
    assert len(calibration.samples) == 8 and measured
    text = Path(loaded.source) / "calibration.txt"
    assert loaded.tokenizer is not None
    drawn, _ = load_calibration(text, loaded.tokenizer, num_samples=1000, sequence_length=64, seed=5)
    assert all(map(torch.equal, drawn.samples[:8], calibration.samples))
    assert measured <= {tuple(sample.tolist()) for sample in drawn.samples[8:]}


def test_a_recipe_without_weights_has_no_budget(folder: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("kv_cache: int8\n")
    result = run("compile", folder, "-o", tmp_path / "out.optc", "--recipe", recipe, "--max-kl", 1)
    failed(result, 2, "--max-kl 1", "quantized weights")


def test_a_module_has_no_text(tmp_path: Path) -> None:
    example = torch.zeros(1, 4, dtype=torch.long), torch.arange(4)[None]

    class Module(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.up, self.head = nn.Embedding(20, 32), nn.Linear(32, 32), nn.Linear(32, 20)

        def forward(self, input_ids: Tensor, positions: Tensor) -> Tensor:
            x = self.embed(input_ids)
            heads = x[:, None]
            x = x + nn.functional.scaled_dot_product_attention(heads, heads, heads, is_causal=True)[:, 0]
            return self.head(torch.relu(self.up(x)))  # type: ignore[no-any-return]

    with pytest.raises(UsageError, match="measured on text, and that needs a tokenizer"):
        optc.compile(Module().eval(), tmp_path / "out.optc", max_kl=0.1, example_inputs=example, backend="eager")
    assert not list(tmp_path.iterdir())


def test_a_quantized_checkpoint_has_no_budget(folder: Path, tmp_path: Path) -> None:
    copied = Path(shutil.copytree(folder, tmp_path / "quantized"))
    config = json.loads((copied / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"}
    (copied / "config.json").write_text(json.dumps(config))
    result = run("compile", copied, "-o", tmp_path / "out.optc", "--max-kl", 0.1)
    failed(result, 2, "already quantized (AWQ", "unquantized checkpoint")


# ------------------------------------------------------------------------------------ schemes the user chose


def test_a_scheme_is_only_checked(program: Program, samples: list[Tensor]) -> None:
    found = quantized(program, Recipe(default="w4a16-g32", rounding="rtn"), None)
    measured = measure_whole(program, found, samples)
    divergence, increase = measured.divergence, measured.ppl_increase
    record = check_budget(program, found, Budget(max_kl=divergence, bits=4.5), samples)
    assert (record.kl, record.ppl_increase, record.bits_per_weight) == (divergence, increase, 4.5)
    assert record.groups == ()
    for budget, wanted in ((Budget(max_kl=0.99 * divergence), "more"), (Budget(max_kl=1.0, bits=4.49), "fewer")):
        with pytest.raises(
            BudgetError, match=rf"is not kept: .* at 4.500 bits a weight; choose a scheme of {wanted} bits"
        ):
            check_budget(program, found, budget, samples)


def test_a_recipe_is_only_checked_even_if_it_adapts(folder: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("default: w4a16-g128\nadapt: true\nrounding: rtn\nrules: [{role: attention, scheme: w8a16}]\n")
    result = run("compile", folder, "-o", tmp_path / "out.optc", "--backend", "eager", "--recipe", recipe,
                 "--max-kl", 1, "--no-verify", "-q")  # fmt: skip
    assert result.exit_code == 0, result.output
    quantization = read_manifest(tmp_path / "out.optc").quantization
    assert quantization is not None and quantization.budget is not None and quantization.budget.groups == ()
    assert {layer.scheme for layer in quantization.layers if layer.role == "attention"} == {"w8a16"}


# --------------------------------------------------------------------------------------------- a trained model


@pytest.mark.slow
def test_a_mix_is_better_than_one_scheme_of_its_size() -> None:
    """The bundled model at 4.5 bits a weight, beside groups of 32 everywhere; both rounded to nearest."""
    loaded, program = load_checkpoint(str(BUNDLED)), prepared(BUNDLED)
    arguments: dict[str, Any] = {"num_samples": 8, "sequence_length": 256, "seed": 0}
    samples = measuring_samples(loaded, None, **arguments)[:8]
    recipe, record = choose_mix(program, INT4, Budget(bits=4.5), None, samples)
    assert record.bits_per_weight is not None and record.bits_per_weight <= 4.5 and record.kl is not None
    assert record.kl < uniform(program, "w4a16-g32", samples)
    # It is no luck of these samples.
    others = measuring_samples(loaded, None, **(arguments | {"num_samples": 200, "seed": 1}))[:8]
    mixed = measure_whole(program, quantized(program, recipe, None), others).divergence
    assert mixed < uniform(program, "w4a16-g32", others)


@pytest.mark.slow
def test_a_limit_takes_fewer_bits_than_one_scheme_that_keeps_it() -> None:
    loaded, program = load_checkpoint(str(BUNDLED)), prepared(BUNDLED)
    samples = measuring_samples(loaded, None, num_samples=8, sequence_length=256, seed=0)[:8]
    limit = uniform(program, "w4a16-g32", samples)
    _, record = choose_mix(program, INT4, Budget(max_kl=limit), None, samples)
    assert record.kl is not None and record.kl <= limit
    assert record.bits_per_weight is not None and record.bits_per_weight < 4.5
