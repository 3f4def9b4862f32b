"""What tests of the engine share: greedy parameters, and steps after which every invariant is checked."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from optc.runtime import SamplingParams
from optc.runtime.engine import Engine
from optc.runtime.request import Request

BLOCK, VOCAB, LIMIT = 16, 320, 256
BLOCK_BYTES = 8192  # 2 layers of 2 heads, keys and values of 16 floats, 16 tokens


def greedy(count: int, **options: Any) -> SamplingParams:
    return SamplingParams(**{"max_tokens": count, "ignore_eos": True, **options})


def check(engine: Engine, alive: Iterable[Request]) -> None:
    """The invariants between two steps, given the requests that have not ended. Completions not begun count with their first."""
    pool, size = engine.pool, engine.pool.block_size
    running, waiting = engine.scheduler.running, list(engine.queue)
    pool.check([request.blocks[request.num_freed :] for request in running])
    assert len(running) <= engine.scheduler.max_num_seqs
    forks = [fork for request in (*running, *waiting) for fork in request.forks]
    inside = [*running, *waiting, *engine._inbox, *forks]
    assert len({id(request) for request in inside}) == len(inside)
    assert {id(request) for request in inside} == {id(request) for request in alive}
    assert not engine.kv.pending_copies
    for request in running:
        assert request.finish_reason is None
        assert 0 <= request.num_computed < request.num_tokens
        assert len(request.blocks) == pool.blocks_for(request.num_computed)
        # Full blocks are shared and never written; the next token goes into a block of its own, or a new one.
        for number, block in enumerate(request.blocks):
            if block in pool._cached and number >= request.num_freed:
                found = pool._cached[block]
                assert found.token_ids == tuple(request.token_ids[number * size : (number + 1) * size])
                assert (number + 1) * size <= request.num_computed, "only full, computed blocks can be found"
    for request in (*waiting, *forks):
        assert request.blocks == [] and request.num_computed == 0 and request.num_freed == 0
    if engine.config.policy == "fcfs" and running and waiting:
        assert max(r.request_id for r in running) < min(r.request_id for r in waiting), "first come, first served"


def drain(engine: Engine, alive: list[Request]) -> list[Request]:
    """Step until nothing is left, checking after each step; the requests in the order they finished."""
    finished: list[Request] = []
    steps = 0
    while alive:
        done = [request for request in engine.step() if request.finish_reason]
        finished += done
        alive = [request for request in alive if request not in done]
        check(engine, alive)
        steps += 1
        assert steps < 10_000
    check_empty(engine)
    return finished


def check_empty(engine: Engine) -> None:
    """Nothing is left of any request."""
    assert not engine.has_work()
    assert engine.pool.num_free == engine.pool.num_blocks
    assert not engine.admission._waiting
    assert not engine._timed
    assert not engine.queue._present and not engine.queue._served


def run(engine: Engine, prompts: list[tuple[list[int], SamplingParams]]) -> list[Request]:
    """All completions of the prompts, in order."""
    requests = [member for prompt, params in prompts for member in engine.add(prompt, params).group]
    finished = drain(engine, list(requests))
    assert sorted(r.request_id for r in finished) == [r.request_id for r in requests]
    return requests
