"""The sampler draws from the distribution it should, and from nothing else."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from optc.errors import RequestError
from optc.runtime import SamplingParams
from optc.runtime.request import Request
from optc.runtime.sampler import sample


def request(seed: int = 0, length: int = 3, **options: object) -> Request:
    return Request(0, [1], SamplingParams(**options), seed, [1] * length)  # type: ignore[arg-type]


def reference(
    logits: Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> list[float]:
    """The textbook: soften, keep the k most likely, keep the nucleus, drop the unlikely, normalise. In double precision."""
    weights = [math.exp(value / temperature) for value in logits.tolist()]
    order = sorted(range(len(weights)), key=lambda token: -weights[token])
    kept = order[: top_k or None]
    total = sum(weights[token] for token in kept)
    nucleus, mass = [], 0.0
    for token in kept:
        if mass >= top_p:
            break
        nucleus.append(token)
        mass += weights[token] / total
    nucleus = [token for token in nucleus if weights[token] >= min_p * max(weights)]
    total = sum(weights[token] for token in nucleus)
    return [weights[token] / total if token in nucleus else 0.0 for token in range(len(weights))]


def p_value(counts: list[int], expected: list[float]) -> float:
    """Of Pearson's chi-square test that `counts` were drawn with the probabilities `expected`."""
    draws = sum(counts)
    cells = [(count, p * draws) for count, p in zip(counts, expected, strict=True) if p > 0]
    statistic = sum((count - mean) ** 2 / mean for count, mean in cells)
    if len(cells) == 1:
        return 1.0
    return float(torch.special.gammaincc(torch.tensor((len(cells) - 1) / 2), torch.tensor(statistic / 2)))


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 1.0},
        {"temperature": 0.5},
        {"temperature": 3.0},
        {"temperature": 1.0, "top_k": 1},
        {"temperature": 1.0, "top_k": 3},
        {"temperature": 1.0, "top_k": 100},
        {"temperature": 1.0, "top_p": 0.8},
        {"temperature": 1.0, "top_p": 1e-6},
        {"temperature": 2.0, "top_k": 5, "top_p": 0.7},
        {"temperature": 1.0, "min_p": 0.2},
        {"temperature": 1.0, "min_p": 1.0},
        {"temperature": 3.0, "top_p": 0.8, "min_p": 0.4},
        {"temperature": 3.0, "top_k": 6, "top_p": 0.9, "min_p": 0.3},
    ],
    ids=str,
)
@pytest.mark.parametrize("over", ["seeds", "positions"])
def test_distribution(options: dict[str, float], over: str) -> None:
    logits = torch.tensor([0.3, 2.0, -1.0, 1.1, 0.0, -3.0, 1.9, 0.5])
    draws = 4000
    if over == "seeds":
        requests = [request(seed=number, **options) for number in range(draws)]
    else:
        requests = [request(seed=7, length=number + 1, **options) for number in range(draws)]
    tokens = sample(logits.repeat(draws, 1), requests)
    counts = torch.bincount(torch.tensor(tokens), minlength=len(logits)).tolist()
    expected = reference(logits, **options)  # type: ignore[arg-type]
    assert all(count == 0 for count, p in zip(counts, expected, strict=True) if p == 0)
    assert p_value(counts, expected) > 1e-3


@pytest.mark.parametrize(
    "options", [{}, {"top_k": 700}, {"top_p": 0.95}, {"min_p": 0.05}, {"top_p": 0.5, "min_p": 0.01}], ids=str
)
def test_distribution_over_many_tokens(options: dict[str, float]) -> None:
    """More tokens than are sorted or summed up at once; they are counted in cells of like probability."""
    logits = torch.randn(3000, generator=torch.Generator().manual_seed(5))
    draws = 6000
    tokens = sample(logits.repeat(draws, 1), [request(seed=n, temperature=1.0, **options) for n in range(draws)])
    expected = torch.tensor(reference(logits, **options))  # type: ignore[arg-type]
    assert (expected[torch.tensor(tokens)] > 0).all()
    cells = torch.empty(3000, dtype=torch.long)
    cells[expected.argsort(stable=True)] = torch.arange(3000) * 40 // 3000
    counts = torch.zeros(40).index_add_(0, cells[torch.tensor(tokens)], torch.ones(draws))
    masses = torch.zeros(40, dtype=torch.float64).index_add_(0, cells, expected.double())
    keep = masses * draws > 5
    assert p_value([int(n) for n in counts[keep]], (masses[keep] / masses[keep].sum()).tolist()) > 1e-3


@given(
    seed=st.integers(0, 2**63 - 1),
    length=st.integers(1, 10_000),
    others=st.integers(0, 5),
    place=st.integers(0, 5),
    temperature=st.floats(0.0, 3.0),
)
def test_a_token_depends_on_its_own_row_and_request_alone(
    seed: int, length: int, others: int, place: int, temperature: float
) -> None:
    logits = torch.randn(50, generator=torch.Generator().manual_seed(seed % 2**31))
    alone = sample(logits[None].clone(), [request(seed, length, temperature=temperature)])
    place = min(place, others)
    batch = torch.randn(others + 1, 50)
    batch[place] = logits
    requests = [request(number, number + 1, temperature=1.0) for number in range(others + 1)]
    requests[place] = request(seed, length, temperature=temperature)
    assert sample(batch, requests)[place] == alone[0]


def test_seeds_and_positions_give_different_draws() -> None:
    flat = torch.zeros(1, 10**6)
    drawn = {
        sample(flat.clone(), [request(seed, length, temperature=1.0)])[0] for seed in range(5) for length in range(1, 6)
    }
    assert len(drawn) == 25


def test_greedy_ties_go_to_the_first() -> None:
    logits = torch.tensor([[0.0, 5.0, 1.0, 5.0, 5.0], [2.0, 2.0, 2.0, 2.0, 2.0]])
    assert sample(logits, [request(), request(seed=9)]) == [1, 0]


def test_top_k_one_is_greedy() -> None:
    logits = torch.randn(20, 100, generator=torch.Generator().manual_seed(1))
    requests = [request(seed, temperature=5.0, top_k=1) for seed in range(20)]
    assert sample(logits.clone(), requests) == logits.argmax(-1).tolist()


@given(temperature=st.floats(0.0, 1e-4, exclude_min=True))
def test_temperatures_near_zero_are_nearly_greedy(temperature: float) -> None:
    logits = torch.tensor([[-40.0, 3.0, 2.9, 80.0, 79.0]])
    assert sample(logits, [request(temperature=temperature)]) == [3]


def test_excluded_tokens_are_never_drawn() -> None:
    logits = torch.full((200, 6), float("-inf"))
    logits[:, [2, 4]] = torch.tensor([0.0, 1.0])
    drawn = sample(logits, [request(seed, temperature=2.0, top_p=0.9999, top_k=5) for seed in range(200)])
    assert set(drawn) == {2, 4}


@pytest.mark.parametrize("count", [0, 1, 5, 100])
def test_logprobs_are_the_models(count: int) -> None:
    """They are log_softmax of the logits, before temperature, top-k and top-p; the chosen token is among them."""
    logits = torch.randn(30, 64, generator=torch.Generator().manual_seed(3)) * 4
    requests = [request(seed, temperature=3.0, top_k=20, top_p=0.9, logprobs=count) for seed in range(30)]
    tokens = sample(logits.clone(), requests)
    expected = torch.log_softmax(logits.double(), -1)
    for row, (token, done) in enumerate(zip(tokens, requests, strict=True)):
        (reported,) = done.logprobs
        best = expected[row].topk(min(count, 64)).indices.tolist()
        assert set(reported) == {token, *best}
        for reported_token, value in reported.items():
            assert value == pytest.approx(expected[row, reported_token].item(), abs=2e-6)


def test_no_logprobs_unless_asked_for() -> None:
    done = request()
    sample(torch.randn(1, 5), [done])
    assert done.logprobs == []


@pytest.mark.parametrize(
    "options",
    [
        {"max_tokens": 0},
        {"max_tokens": -1},
        {"max_tokens": 1.5},
        {"max_tokens": "3"},
        {"max_tokens": True},
        {"max_tokens": None},
        {"temperature": -0.1},
        {"temperature": 101},
        {"temperature": math.nan},
        {"temperature": math.inf},
        {"temperature": "hot"},
        {"temperature": None},
        {"top_k": -1},
        {"top_k": 2.0},
        {"top_p": 0},
        {"top_p": 1.01},
        {"top_p": math.nan},
        {"top_p": None},
        {"seed": -1},
        {"seed": 2**63},
        {"seed": 0.5},
        {"logprobs": -1},
        {"logprobs": 101},
        {"logprobs": True},
        {"ignore_eos": "no"},
        {"n": 0},
        {"n": 65},
        {"n": 10**6},
        {"n": True},
        {"min_tokens": -1},
        {"min_tokens": 129},
        {"min_p": -0.1},
        {"min_p": 1.5},
        {"min_p": math.nan},
        {"repetition_penalty": 0},
        {"repetition_penalty": math.inf},
        {"presence_penalty": 3},
        {"frequency_penalty": -2.5},
        {"frequency_penalty": math.nan},
        {"logit_bias": [1]},
        {"logit_bias": {"1": 1.0}},
        {"logit_bias": {-1: 1.0}},
        {"logit_bias": {1: math.nan}},
        {"logit_bias": {1: 101}},
        {"logit_bias": dict.fromkeys(range(5000), 1.0)},
        {"allowed_token_ids": []},
        {"allowed_token_ids": [1.5]},
        {"allowed_token_ids": [-1]},
        {"allowed_token_ids": "12"},
        {"bad_words": "word"},
        {"bad_words": [""]},
        {"stop": ""},
        {"stop": [""]},
        {"stop": [5]},
        {"stop": ["x"] * 17},
        {"stop": ["x" * 2**20]},
        {"stop_token_ids": list(range(129))},
        {"stop_token_ids": [2**31]},
        {"include_stop": 1},
        {"prompt_logprobs": 101},
        {"echo": None},
        {"structured": "json"},
    ],
    ids=str,
)
def test_wrong_parameters_are_refused_by_name(options: dict[str, object]) -> None:
    (name,) = options
    with pytest.raises(RequestError, match=rf"{name}(\[1\])?=.*expected"):
        SamplingParams(**options)  # type: ignore[arg-type]


def test_right_parameters_at_the_edges() -> None:
    SamplingParams(max_tokens=1, temperature=100, top_k=0, top_p=1, seed=2**63 - 1, logprobs=100)
    SamplingParams(temperature=0, seed=0, logprobs=0)
