"""Schemes by name: what each stores, and the names that are near."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from optc.errors import UsageError
from optc.runtime.scheme import GROUPS, QuantizationArgs, Scheme, find_scheme, scheme_names


def test_every_name_is_found_and_means_something_else() -> None:
    found = [find_scheme(name) for name in scheme_names()]
    assert len(set(scheme_names())) == len(found) == len({scheme.model_dump_json() for scheme in found})


def test_every_scheme_survives_json() -> None:
    for name in scheme_names():
        assert Scheme.model_validate_json(find_scheme(name).model_dump_json()) == find_scheme(name)


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("asymmetric", [False, True])
def test_a_grouped_name_says_what_it_is(bits: int, group: int, asymmetric: bool) -> None:
    weights = find_scheme(f"w{bits}a16-g{group}{'-asym' * asymmetric}").weights
    assert weights == QuantizationArgs(num_bits=bits, strategy="group", group_size=group, symmetric=not asymmetric)
    assert weights.bits_per_weight == bits + (16 + bits * asymmetric) / group


def test_the_vocabulary_is_that_of_compressed_tensors() -> None:
    schemes = pytest.importorskip("compressed_tensors.quantization.quant_scheme")
    presets = schemes.PRESET_SCHEMES
    pairs = {
        "w8a8": "W8A8",
        "w8a16-g128": "W8A16",
        "w4a16-g128": "W4A16",
        "w4a16-g128-asym": "W4A16_ASYM",
        "fp8-tensor": "FP8",
        "fp8-dynamic": "FP8_DYNAMIC",
        "fp8-block": "FP8_BLOCK",
    }
    for ours, theirs in pairs.items():
        for part in ("weights", "input_activations"):
            mine, expected = getattr(find_scheme(ours), part), presets[theirs].get(part)
            assert (mine is None) == (expected is None)
            for key in ("num_bits", "type", "symmetric", "strategy", "group_size", "dynamic") * (mine is not None):
                assert getattr(mine, key) == getattr(expected, key), f"{ours} {part} {key}"
            if mine is not None and mine.block_structure is not None:
                assert list(mine.block_structure) == list(expected.block_structure)


@pytest.mark.parametrize(
    ("name", "activation"),
    [
        ("w8a16", "none"),
        ("w8a8", "int8-token"),
        ("w8a8-static", "int8-static"),
        ("w4a8-g64", "int8-token"),
        ("fp8-weight", "none"),
        ("fp8-tensor", "fp8-static"),
        ("fp8-dynamic", "fp8-token"),
        ("fp8-block", "fp8-group128"),
    ],
)
def test_activations(name: str, activation: str) -> None:
    assert find_scheme(name).activation == activation


@pytest.mark.parametrize(
    ("strategy", "expected"),
    [("tensor", (6, 256)), ("channel", (1, 256)), ("group", (1, 32)), ("block", (128, 128))],
)
def test_blocks_that_share_a_scale(strategy: str, expected: tuple[int, int]) -> None:
    args = QuantizationArgs.model_validate({"strategy": strategy, "group_size": 32, "block_structure": (128, 128)})
    assert args.block(6, 256) == expected


@pytest.mark.parametrize(
    ("bits", "symmetric", "expected"),
    [(8, True, (-127, 127)), (8, False, (-128, 127)), (4, True, (-8, 7)), (3, False, (-4, 3))],
)
def test_code_ranges(bits: int, symmetric: bool, expected: tuple[int, int]) -> None:
    assert QuantizationArgs(num_bits=bits, symmetric=symmetric).code_range() == expected


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("w4a16", "w4a16-g128"),
        ("W8A8", "w8a8"),
        ("int4", "w8a16"),
        ("w4a16-g256", "w4a16-g32"),
        ("fp8", "fp8-tensor"),
        ("", "w8a16"),
    ],
)
def test_an_unknown_name_lists_near_ones(name: str, near: str) -> None:
    with pytest.raises(UsageError, match=rf"unknown scheme '{name}'.*{near}.*optc targets --schemes"):
        find_scheme(name)


def test_schemes_are_frozen_and_closed() -> None:
    with pytest.raises(ValidationError):
        QuantizationArgs.model_validate({"bits": 4})
    with pytest.raises(ValidationError):
        find_scheme("w8a8").weights.num_bits = 4  # type: ignore[misc]
