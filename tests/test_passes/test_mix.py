"""The best mix at a size, beside trying all of them."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from optc.passes.quantize.mix import Mix, Option, frontier

options = st.builds(
    Option, scheme=st.sampled_from("abc"), num_bytes=st.integers(1, 300), divergence=st.floats(0, 10, width=16)
)
groups = st.lists(st.lists(options, min_size=1, max_size=4), min_size=1, max_size=5)


@given(groups)
def test_no_other_mix_is_better(groups: list[list[Option]]) -> None:
    every = [Mix(choice) for choice in itertools.product(*groups)]
    found = frontier(groups)
    assert [mix.num_bytes for mix in found] == sorted({mix.num_bytes for mix in found})
    assert [mix.divergence for mix in found] == sorted({mix.divergence for mix in found}, reverse=True)
    for mix in found:
        assert all(option in options for option, options in zip(mix.choice, groups, strict=True))
    for other in every:  # sizes are exact here: the unit is one byte
        assert any(mix.num_bytes <= other.num_bytes and mix.divergence <= other.divergence + 1e-9 for mix in found)


def test_large_sizes_are_rounded_up_and_never_down() -> None:
    groups = [[Option("small", 1_000_000 + i, 1.0 + i), Option("large", 3_000_001 + 7 * i, 0.1)] for i in range(40)]
    found = frontier(groups)
    assert found[0].num_bytes == sum(min(o.num_bytes for o in options) for options in groups)
    assert found[-1].divergence == sum(min(o.divergence for o in options) for options in groups)
    # The groups that gain most change first.
    half = next(mix for mix in found if mix.num_bytes > 80_000_000)
    assert [option.scheme for option in half.choice].index("large") > 15


def test_a_single_option_leaves_no_choice() -> None:
    (mix,) = frontier([[Option("only", 10, 0.5)], [Option("only", 20, 0.25)]])
    assert (mix.num_bytes, mix.divergence) == (30, 0.75)
