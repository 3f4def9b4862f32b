"""What the user asks for, as a recipe: presets, algorithms, YAML files, and every way to ask wrongly."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from optc.errors import TargetError, UsageError
from optc.optimizer.quantization import PRESETS, make_recipe, parse_algorithm, preset_schemes, read_recipe
from optc.optimizer.targets import TARGETS, find_target
from optc.passes.quantize.recipe import Recipe, Rule, near_names
from optc.runtime.scheme import scheme_names

from .test_cli import failed, run

NATIVE, H100, A100 = find_target("native"), find_target("h100"), find_target("a100")


def written(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return path


# ------------------------------------------------------------------------------------------------- presets


@pytest.mark.parametrize(
    ("target", "int8", "int4", "fp8"),
    [
        ("native", "w8a8g-g128", "w4a8g-g128", "fp8-weight"),
        ("cpu-avx512", "w8a8g-g128", "w4a8g-g128", "fp8-weight"),
        ("a100", "w8a8", "w4a16-g128", None),
        ("h100", "w8a8", "w4a16-g128", "fp8-dynamic"),
    ],
)
def test_presets_choose_by_target(target: str, int8: str, int4: str, fp8: str | None) -> None:
    assert preset_schemes(find_target(target)) == {"int8": int8, "int4": int4, "fp8": fp8}


def test_every_preset_of_every_target_is_one_that_the_target_can_compute() -> None:
    for target in TARGETS.values():
        for preset, scheme in preset_schemes(target).items():
            if scheme is None:
                with pytest.raises(TargetError, match=rf"--{preset} .*{target.architecture} has no FP8 tensor cores"):
                    make_recipe(preset, target)
            else:
                of_head = target.device == "cpu" and preset != "fp8"
                rules = (Rule(role="lm_head", scheme="w8a8g-g128"),) if of_head else ()
                assert make_recipe(preset, target) == Recipe(default=scheme, adapt=True, rules=rules)
                assert make_recipe(preset, target, with_head=False) == Recipe(default=scheme, adapt=True)


def test_fp8_activations_are_refused_where_there_is_no_fp8(tmp_path: Path) -> None:
    for scheme in ("fp8-tensor", "fp8-dynamic", "fp8-block"):
        assert make_recipe(scheme, H100) is not None
        for target in (A100, NATIVE):
            with pytest.raises(TargetError, match=rf"{scheme} for {target.name}.*fp8-weight"):
                make_recipe(scheme, target)
    rule = written(tmp_path, "rules: [{role: mlp, scheme: fp8-dynamic}]")
    with pytest.raises(TargetError, match="fp8-dynamic for a100"):
        make_recipe(rule, A100)
    assert make_recipe("fp8-weight", A100) is not None


def test_nothing_asked_is_no_recipe() -> None:
    assert make_recipe(None, NATIVE) is None
    assert make_recipe(None, NATIVE, kv_cache="fp8") == Recipe(kv_cache="fp8")


# ------------------------------------------------------------------------------------------------- algorithms


@pytest.mark.parametrize(
    ("text", "transforms", "rounding"),
    [
        ("rtn", (), "rtn"),
        ("rtn-minmax", (), "rtn-minmax"),
        ("hqq", (), "hqq"),
        ("gptq", (), "gptq"),
        ("awq", ("awq",), "rtn"),
        ("smoothquant+gptq", ("smoothquant",), "gptq"),
        ("smoothquant+awq+hqq", ("smoothquant", "awq"), "hqq"),
    ],
)
def test_algorithms_by_name(text: str, transforms: tuple[str, ...], rounding: str) -> None:
    assert parse_algorithm(text) == (transforms, rounding)


@pytest.mark.parametrize("text", ["", "GPTQ", "awq+", "gptq+awq", "rtn+gptq", "awq+awq", "awq gptq", "spqr"])
def test_wrong_algorithms_list_the_right_ones(text: str) -> None:
    with pytest.raises(UsageError, match=r"rtn, rtn-minmax, hqq, gptq.*"):
        make_recipe("int4", NATIVE, algorithm=text)


def test_an_algorithm_replaces_that_of_the_recipe_but_not_of_its_rules(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        "{default: w4a16-g64-asym, rounding: hqq, transforms: [awq], rules: [{role: mlp, scheme: w8a8, rounding: rtn-minmax}]}",
    )
    found = make_recipe(path, NATIVE, algorithm="smoothquant+gptq")
    assert found is not None
    assert (found.rounding, found.transforms, found.rules[0].rounding) == ("gptq", ("smoothquant",), "rtn-minmax")


@pytest.mark.parametrize("algorithm", ["gptq", "hqq", "awq+gptq"])
def test_an_algorithm_that_changes_nothing_is_refused(algorithm: str) -> None:
    with pytest.raises(UsageError, match="no weights are quantized"):
        make_recipe(None, NATIVE, algorithm=algorithm)
    with pytest.raises(UsageError, match="fp8-weight has FP8 codes, which are rounded to nearest"):
        make_recipe("fp8", NATIVE, algorithm=algorithm)


@pytest.mark.parametrize(
    ("scheme", "algorithm", "lacks"),
    [
        ("w4a16-g128", "smoothquant", "rounded activations, and w4a16-g128 has none"),
        ("w8a16", "smoothquant+gptq", "rounded activations, and w8a16 has none"),
        ("fp8", "awq", "integer weights, and fp8-weight has none"),
    ],
)
def test_a_transform_that_no_scheme_is_for_is_refused(scheme: str, algorithm: str, lacks: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=lacks):
        make_recipe(scheme, NATIVE, algorithm=algorithm)
    one_rule = written(tmp_path, f"{{default: {scheme_of(scheme)}, rules: [{{role: mlp, scheme: w4a8-g32}}]}}")
    assert make_recipe(one_rule, NATIVE, algorithm=algorithm.split("+")[0]) is not None


def scheme_of(preset: str) -> str:
    return preset_schemes(NATIVE).get(preset) or preset


@pytest.mark.parametrize(
    "content",
    [
        "adapt: true",
        "rounding: rtn",
        "rules: [{role: mlp, scheme: none}]",
        "{rounding: gptq, rules: [{name: '*', scheme: none}]}",
    ],
)
def test_a_recipe_that_quantizes_nothing_is_refused(content: str, tmp_path: Path) -> None:
    path = written(tmp_path, content)
    with pytest.raises(UsageError, match=r"recipe\.yaml: the recipe quantizes nothing"):
        make_recipe(path, NATIVE)
    with pytest.raises(UsageError, match="quantizes nothing"):
        make_recipe(Recipe.model_validate(yaml.safe_load(content)), NATIVE)


def test_transforms_alone_and_the_scheme_none_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="awq is for integer weights, and the recipe has none"):
        make_recipe(written(tmp_path, "transforms: [awq]"), NATIVE)
    for nothing in ("none", Recipe()):
        with pytest.raises(UsageError, match="quantizes nothing"):
            make_recipe(nothing, NATIVE)
    assert make_recipe("none", NATIVE, kv_cache="int8") == Recipe(kv_cache="int8")


@pytest.mark.parametrize(
    ("recipe", "uses", "requires"),
    [
        (Recipe(), False, None),
        (Recipe(default="w4a16-g128"), True, None),
        (Recipe(default="w3a16-g128", rounding="hqq"), False, None),
        (Recipe(default="w8a8"), False, None),
        (Recipe(default="fp8-dynamic", rounding="gptq"), False, None),
        (Recipe(default="w8a8", rounding="gptq"), True, "gptq"),
        (Recipe(default="w8a8", transforms=("smoothquant",), rounding="rtn"), True, "smoothquant"),
        (Recipe(default="w8a8-static"), True, "a static scale of activations"),
        (Recipe(default="fp8-tensor"), True, "a static scale of activations"),
        (Recipe(default="w8a8", rules=(Rule(role="mlp", scheme="w4a16-g32"),)), True, None),
        (Recipe(default="w8a8", rules=(Rule(role="mlp", scheme="w4a16-g32", rounding="gptq"),)), True, "gptq"),
        (Recipe(default="w8a8", rules=(Rule(role="mlp", scheme="none", rounding="gptq"),)), False, None),
        (Recipe(default="w8a8", rules=(Rule(role="embedding", scheme="w4a16-g32"),)), False, None),
        (Recipe(default="w8a8", rules=(Rule(name="*.embed*", scheme="w4a16-g32"),)), True, None),
    ],
)
def test_what_needs_calibration_data(recipe: Recipe, uses: bool, requires: str | None) -> None:
    """Used: codes depend on it. Required: the user asked by name for what cannot be done without."""
    assert (recipe.uses_calibration, recipe.requires_calibration) == (uses, requires)
    if requires is None:
        assert not recipe.without_calibration().uses_calibration


# ------------------------------------------------------------------------------------------------- names

LLAMA = [
    f"model.layers.{layer}.{part}.weight"
    for layer in range(12)
    for part in ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
] + ["model.embed_tokens.weight", "lm_head.weight"]


@pytest.mark.parametrize(
    ("pattern", "wanted"),
    [
        ("*.qproj.*", "model.layers.*.self_attn.q_proj.weight"),
        ("model.layer.3.mlp.up_proj.weight", "model.layers.*.mlp.up_proj.weight"),
        ("layers.*.mlp.down_porj*", "model.layers.*.mlp.down_proj.weight"),
        ("embed_token", "model.embed_tokens.weight"),
        ("*", "lm_head.weight"),
        ("", "lm_head.weight"),
        ("lmhead*", "lm_head.weight"),
    ],
)
def test_near_names_of_a_pattern(pattern: str, wanted: str) -> None:
    near = near_names(pattern, LLAMA, count=7 if pattern in ("", "*") else 3)
    assert wanted in near if pattern in ("", "*") else near[0] == wanted


# ------------------------------------------------------------------------------------------------- files


def test_a_recipe_file(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        """\
default: w4a16-g128
rounding: gptq
transforms: [awq]
adapt: true
kv_cache: int8
rules:
  - {role: lm_head, scheme: w8a8}
  - {name: "model.layers.0.*", scheme: none}
  - {role: mlp, name: "*.down_proj*", scheme: w8a16, rounding: rtn}
""",
    )
    assert read_recipe(path) == Recipe(
        default="w4a16-g128",
        rounding="gptq",
        transforms=("awq",),
        adapt=True,
        kv_cache="int8",
        rules=(
            Rule(role="lm_head", scheme="w8a8"),
            Rule(name="model.layers.0.*", scheme="none"),
            Rule(role="mlp", name="*.down_proj*", scheme="w8a16", rounding="rtn"),
        ),
    )
    assert make_recipe(str(path), NATIVE) == read_recipe(path)


WRONG = {
    "unknown key": ("defualt: w8a8", ("unknown key defualt", "default")),
    "unknown key of a rule": ("rules: [{role: mlp, schema: w8a8}]", ("unknown key rules[0].schema", "scheme")),
    "unknown key, nothing near": ("zzz: 1", ("unknown key zzz", "default", "rules")),
    "wrong type": ("default: 4", ("default is 4", "string")),
    "rules of a wrong type": ("rules: {role: mlp}", ("rules is", "tuple")),
    "a rule of a wrong type": ("rules: [w8a8]", ("rules[0] is 'w8a8'", "Rule")),
    "unknown scheme": ("default: w4a16-g12", ("unknown scheme 'w4a16-g12'", "w4a16-g128")),
    "unknown scheme in a rule": ("rules: [{role: mlp, scheme: w5a16}]", ("unknown scheme 'w5a16'", "w4a16")),
    "unknown role": ("rules: [{role: head, scheme: w8a8}]", ("rules[0].role is 'head'", "lm_head")),
    "unknown rounding": ("rounding: round", ("rounding is 'round'", "gptq")),
    "unknown transform": ("transforms: [awk]", ("transforms[0] is 'awk'", "awq")),
    "rule without scheme": ("rules: [{role: mlp}]", ("rules[0] lacks the key scheme",)),
    "rule without role and name": ("rules: [{scheme: w8a8}]", ("neither role nor name",)),
    "rule for routers": ("rules: [{role: router, scheme: w8a8}]", ("routers stay in full precision",)),
    "a key twice": ("default: w8a8\ndefault: w8a16", ("the key default comes twice",)),
    "empty": ("", ("empty recipe", "default")),
    "only a comment": ("# todo\n", ("empty recipe",)),
    "nothing": ("default: none", ("quantizes nothing",)),
    "not YAML": ("default: [w8a8", ("not YAML",)),
    "an object": ("!!python/object/apply:os.system ['true']", ("not YAML", "python/object")),
    "several documents": ("default: w8a8\n---\ndefault: w8a16", ("2 YAML documents",)),
    "a list": ("- default: w8a8", ("holds a list", "mapping")),
    "a word": ("w8a8", ("holds a str", "mapping")),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_recipe_files(case: str, tmp_path: Path) -> None:
    text, words = WRONG[case]
    with pytest.raises(UsageError) as caught:
        read_recipe(written(tmp_path, text))
    assert all(word in str(caught.value) for word in ("recipe.yaml", *words)), caught.value


def test_a_recipe_file_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    for path in (tmp_path / "none.yaml", tmp_path, tmp_path / "binary.yaml"):
        with pytest.raises(UsageError, match="not a readable recipe file"):
            read_recipe(path)


# ------------------------------------------------------------------------------------------------- the command line


def test_the_command_line_refuses_in_one_line_and_writes_nothing(checkpoint: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.optc"

    def wrong(*arguments: object, words: tuple[str, ...]) -> None:
        failed(run("compile", checkpoint, "-o", output, "--backend", "eager", *arguments), 2, *words)
        assert not output.exists()

    recipe = written(tmp_path, "defualt: w8a8")
    wrong("--recipe", recipe, words=("recipe.yaml", "unknown key defualt", "default"))
    wrong("--recipe", tmp_path / "no.yaml", words=("no.yaml", "not a readable recipe file"))
    wrong("--scheme", "w4a16", words=("unknown scheme 'w4a16'", "w4a16-g128"))
    wrong("--int4", "--algorithm", "magic", words=("unknown algorithm 'magic'", "gptq", "smoothquant"))
    wrong("--int4", "--int8", "--scheme", "w8a8", words=("choose one of",))
    wrong("--algorithm", "gptq", words=("no weights are quantized",))
    wrong("--fp8", "--target", "a100", words=("sm_80", "no FP8 tensor cores", "--int8", "fp8-weight", "h100"))
    wrong("--scheme", "fp8-block", words=("fp8-block for native", "h100"))
    wrong("--scheme", "w4a16-g128", "--algorithm", "rtn", words=("64 inputs", "g32, g64"))
    written(tmp_path, "rules: [{name: model.layers.0.mlp.upproj*, scheme: w8a8}]")
    wrong("--recipe", recipe, words=("matches no weight", "model.layers.*.mlp.up_proj.weight"))


def test_a_recipe_from_file_to_artifact(checkpoint: Path, tmp_path: Path) -> None:
    rules = "[{role: lm_head, scheme: w8a16}, {name: model.layers.1.*, scheme: none}]"
    recipe, output = written(tmp_path, f"default: w4a16-g32\nrounding: rtn\nrules: {rules}\n"), tmp_path / "out.optc"
    result = run("compile", checkpoint, "-o", output, "--backend", "eager", "--recipe", recipe, "-q")
    assert result.exit_code == 0, result.output
    layers = json.loads(run("inspect", output, "--json").stdout)["quantization"]["layers"]
    found = {layer["name"]: layer["scheme"] for layer in layers}
    assert found.pop("lm_head.weight") == "w8a16"
    assert len(found) == 7 and all(name.startswith("model.layers.0.") for name in found)
    assert set(found.values()) == {"w4a16-g32"}


def test_targets_shows_presets_and_schemes() -> None:
    targets = {target["name"]: target["presets"] for target in json.loads(run("targets", "--json").stdout)}
    assert set(targets["a100"]) == set(PRESETS)
    assert (targets["h100"]["fp8"], targets["a100"]["fp8"], targets["native"]["fp8"]) == (
        "fp8-dynamic",
        None,
        "fp8-weight",
    )
    found = {scheme["name"]: scheme for scheme in json.loads(run("targets", "--schemes", "--json").stdout)}
    assert list(found) == scheme_names()
    assert found["w4a16-g128"]["bits_per_weight"] == 4.125 and found["w4a16-g128"]["weights"]["num_bits"] == 4
    listed = run("targets", "--schemes").stdout
    assert all(name in listed for name in scheme_names())
