"""`AsyncEngine`: streams, cancellation, slow readers, failures and the end."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest

from optc.errors import ClosedError, OverloadedError, RequestError
from optc.runtime import LLM, AsyncEngine, RequestOutput, StructuredOutput

from .engine_cases import VOCAB, check_empty

Stream = AsyncGenerator[RequestOutput, None]


@pytest.fixture(scope="module")
def engine(artifact: Path) -> Iterator[AsyncEngine]:
    engine = AsyncEngine(artifact)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def llm(artifact: Path) -> Iterator[LLM]:
    with LLM(artifact) as llm:
        yield llm


def within(awaitable: Awaitable[Any], seconds: float = 60) -> Any:
    """Run to the end; a test that hangs fails."""
    return asyncio.run(asyncio.wait_for(awaitable, seconds))  # type: ignore[arg-type]


async def read(stream: Stream) -> dict[int, list[RequestOutput]]:
    """All outputs by completion."""
    found: dict[int, list[RequestOutput]] = {}
    async for output in stream:
        found.setdefault(output.index, []).append(output)
    return found


def joined(outputs: list[RequestOutput]) -> tuple[str, list[int]]:
    assert [output.finish_reason is not None for output in outputs] == [False] * (len(outputs) - 1) + [True]
    assert outputs[-1].metrics is not None and outputs[-1].metrics.finished is not None
    return "".join(output.text for output in outputs), [token for output in outputs for token in output.token_ids]


async def settle(engine: AsyncEngine) -> None:
    """Until the engine has nothing to do."""
    for _ in range(500):
        if not engine.engine.has_work():
            check_empty(engine.engine)
            return
        await asyncio.sleep(0.01)
    raise AssertionError("the engine still has work")


def slow_down(engine: AsyncEngine) -> None:
    """Steps take 5 ms at least, so that what is to happen in the midst of a request does."""
    real = engine.engine.executor.run

    def run(inputs: Any) -> Any:
        time.sleep(0.005)
        return real(inputs)

    engine.engine.executor.run = run  # type: ignore[method-assign]


def test_streams_give_what_generate_gives(engine: AsyncEngine, llm: LLM) -> None:
    prompts = ["The quick brown", "Où est la", "日本", "def f(x):"] * 4
    expected = llm.generate(prompts, max_tokens=24, logprobs=1, ignore_eos=True)

    async def main() -> list[dict[int, list[RequestOutput]]]:
        streams = [engine.generate(prompt, max_tokens=24, logprobs=1, ignore_eos=True) for prompt in prompts]
        return await asyncio.gather(*map(read, streams))

    for found, wanted in zip(within(main()), expected, strict=True):
        assert joined(found[0]) == (wanted.text, wanted.token_ids)
        logprobs = [entry for output in found[0] for entry in output.logprobs or []]
        assert [set(entry) for entry in logprobs] == [set(entry) for entry in wanted.logprobs or []]


def test_several_completions_with_stop_strings(engine: AsyncEngine, llm: LLM) -> None:
    options: dict[str, Any] = {"n": 4, "temperature": 1.2, "seed": 5, "max_tokens": 40, "stop": ["e", "the"]}
    (wanted,) = llm.generate("The quick", **options)
    found = within(read(engine.generate("The quick", **options)))
    assert [joined(found[number]) for number in range(4)] == [(c.text, c.token_ids) for c in wanted.completions]


def test_chat(engine: AsyncEngine, llm: LLM) -> None:
    messages = [{"role": "user", "content": "Hi"}]
    (wanted,) = llm.chat(messages, max_tokens=8)
    assert joined(within(read(engine.chat(messages, max_tokens=8)))[0])[1] == wanted.token_ids


@pytest.mark.parametrize("how", ["break", "cancel", "queued"])
def test_one_who_leaves_frees_the_blocks(how: str, artifact: Path) -> None:
    async def main() -> None:
        async with AsyncEngine(artifact, max_num_seqs=1) as engine:
            slow_down(engine)
            holder = asyncio.create_task(read(engine.generate([5, 6], max_tokens=200, ignore_eos=True)))
            await asyncio.sleep(0.05)
            if how == "break":
                async with aclosing(engine.generate([7], max_tokens=200, n=1, ignore_eos=True)) as stream:
                    holder.cancel()
                    async for _ in stream:
                        break
            else:
                task = asyncio.create_task(read(engine.generate([7], max_tokens=200, ignore_eos=True)))
                await asyncio.sleep(0.05)
                (task if how == "queued" else holder).cancel()
                await asyncio.sleep(0.05)
                for each in (task, holder):
                    each.cancel()
            await settle(engine)
            assert engine.stats().finished["abort"] == 2
            assert not engine._readers

    within(main())


@pytest.mark.parametrize("loop_ends", [False, True])
def test_cancelling_while_a_grammar_compiles(
    loop_ends: bool, engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is added when nobody is there any more is dropped, even if the event loop has ended by then."""
    real = engine.engine.add
    added = threading.Event()

    def slow(*arguments: Any) -> Any:
        time.sleep(0.2)
        try:
            return real(*arguments)
        finally:
            added.set()

    async def main() -> None:
        structured = StructuredOutput(regex="[a-z]{100}")
        task = asyncio.create_task(read(engine.generate([5, 6], max_tokens=200, structured=structured)))
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        if not loop_ends:
            await asyncio.to_thread(added.wait)

    monkeypatch.setattr(engine.engine, "add", slow)
    before = engine.stats().finished.get("abort", 0)
    within(main())
    assert added.wait(10)
    within(settle(engine))
    assert engine.stats().finished["abort"] == before + 1


def test_cancelling_n_completions_ends_all(engine: AsyncEngine) -> None:
    async def main() -> None:
        task = asyncio.create_task(read(engine.generate([5, 6], n=8, temperature=1, max_tokens=200, ignore_eos=True)))
        await asyncio.sleep(0.1)
        task.cancel()
        await settle(engine)

    within(main())


def test_a_slow_reader_holds_up_nobody(engine: AsyncEngine) -> None:
    async def main() -> None:
        slow = engine.generate([5, 6], max_tokens=100, ignore_eos=True)
        first = await anext(slow)
        others = await asyncio.gather(
            *(read(engine.generate([n], max_tokens=50, ignore_eos=True)) for n in range(3, 9))
        )
        assert all(len(joined(other[0])[1]) == 50 for other in others)
        await settle(engine)  # also the slow one has run to its end
        rest = [output async for output in slow]
        assert len(rest) == 1, "what waited comes at once"
        assert len(first.token_ids) + len(rest[0].token_ids) == 100

    within(main())


def test_several_event_loops_and_threads(engine: AsyncEngine, llm: LLM) -> None:
    expected = [result.token_ids for result in llm.generate([[5, n] for n in range(3, 9)], max_tokens=16)]
    found: dict[int, list[int]] = {}

    def run(number: int) -> None:
        outputs = within(read(engine.generate([5, 3 + number], max_tokens=16)))
        found[number] = joined(outputs[0])[1]

    threads = [threading.Thread(target=run, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[number] for number in range(6)] == expected


@pytest.mark.parametrize(
    ("prompt", "options", "said"),
    [
        ("", {}, "empty prompt"),
        ([], {}, "empty prompt"),
        ([VOCAB], {}, "320"),
        ("a", {"temperature": -1}, "temperature"),
        ("a", {"no_such": 1}, "no_such"),
        ("a", {"echo": True}, "echo"),
        ("a", {"structured": StructuredOutput(regex="(")}, "regex"),
        ("a", {"timeout": -1}, "timeout"),
        ("a", {"n": 65}, "n=65"),
        ("x " * 500, {}, "context length"),
    ],
    ids=str,
)
def test_refusals(prompt: Any, options: dict[str, Any], said: str, engine: AsyncEngine) -> None:
    async def main() -> None:
        with pytest.raises(RequestError, match=said):
            await read(engine.generate(prompt, **options))
        await settle(engine)
        assert len(joined((await read(engine.generate("a", max_tokens=3)))[0])[1]) == 3

    within(main())


def test_deadlines(engine: AsyncEngine) -> None:
    async def main() -> None:
        found = await read(engine.generate([5, 6], max_tokens=250, timeout=0.02, ignore_eos=True))
        last = found[0][-1]
        assert last.finish_reason == "timeout" and "0.02 s" in (last.error or "")
        await settle(engine)

    within(main())


def test_a_full_queue_refuses(artifact: Path) -> None:
    async def main() -> None:
        async with AsyncEngine(artifact, max_num_seqs=1, max_queued_requests=2) as engine:
            slow_down(engine)
            tasks = [asyncio.create_task(read(engine.generate([5], max_tokens=250, ignore_eos=True))) for _ in range(8)]
            found = await asyncio.gather(*tasks, return_exceptions=True)
            refused = [each for each in found if isinstance(each, OverloadedError)]
            assert refused and all("queue is full" in str(each) for each in refused)
            served = [each for each in found if isinstance(each, dict)]
            assert len(served) + len(refused) == 8 and len(served) >= 2
            await settle(engine)

    within(main())


def test_a_failed_step_fails_its_requests_and_no_others(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        async with AsyncEngine(artifact) as engine:
            real = engine.engine.executor.run
            calls: list[int] = []

            def run(inputs: Any) -> Any:
                calls.append(1)
                if len(calls) == 10:
                    raise RuntimeError("out of memory")
                return real(inputs)

            monkeypatch.setattr(engine.engine.executor, "run", run)
            found = await asyncio.gather(*(read(engine.generate([n], max_tokens=30)) for n in (5, 6, 7)))
            for each in found:
                assert each[0][-1].finish_reason == "error" and "out of memory" in (each[0][-1].error or "")
            assert len(joined((await read(engine.generate([5], max_tokens=30)))[0])[1]) == 30
            assert engine.is_healthy
            await settle(engine)

    within(main())


def test_an_engine_that_dies_tells_everybody(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        async with AsyncEngine(artifact) as engine:
            slow_down(engine)

            def step() -> Any:
                raise AssertionError("a bug")

            task = asyncio.create_task(read(engine.generate([5], max_tokens=200, ignore_eos=True)))
            await asyncio.sleep(0.05)
            monkeypatch.setattr(engine.engine, "step", step)
            with pytest.raises(ClosedError, match="died: a bug"):
                await task
            assert not engine.is_healthy
            with pytest.raises(ClosedError, match="died"):
                await read(engine.generate([5]))

    within(main())


@pytest.mark.parametrize("drain", [0.0, 30.0])
def test_closing(drain: float, artifact: Path) -> None:
    async def main() -> None:
        engine = AsyncEngine(artifact)
        slow_down(engine)
        task = asyncio.create_task(read(engine.generate([5, 6], max_tokens=250, ignore_eos=True)))
        await asyncio.sleep(0.05)
        closing = asyncio.create_task(asyncio.to_thread(engine.close, drain=drain))
        await asyncio.sleep(0.02)
        with pytest.raises(ClosedError, match="closed"):
            await read(engine.generate([5]))
        found = await task
        assert found[0][-1].finish_reason == ("length" if drain else "abort")
        await closing
        engine.close()  # once more changes nothing
        check_empty(engine.engine)
        assert not engine.is_healthy and not engine._thread.is_alive()
        with pytest.raises(ClosedError):
            engine.llm.generate("a")

    within(main())


def test_a_loop_that_is_gone_does_not_disturb(engine: AsyncEngine) -> None:
    loop = asyncio.new_event_loop()
    stream = engine.generate([5, 6], max_tokens=200, ignore_eos=True)
    loop.run_until_complete(anext(stream))
    loop.close()
    end = time.monotonic() + 30
    while engine.engine.has_work() and time.monotonic() < end:
        time.sleep(0.01)
    check_empty(engine.engine)
    assert engine.is_healthy


@pytest.mark.parametrize("what", ["request", "grammar"])
def test_the_process_ends_though_it_has_work(what: str, artifact: Path) -> None:
    import subprocess
    import sys

    code = (
        "import asyncio, signal, sys, time\nfrom optc import AsyncEngine, StructuredOutput\n"
        "engine = AsyncEngine(sys.argv[1])\n"
        "async def main():\n"
        "    async for _ in engine.generate([5, 6], max_tokens=250, ignore_eos=True): break\n"
    )
    if what == "grammar":  # a worker that does not answer; closing is left to the end of the process
        code += (
            "    async for _ in engine.generate([5], structured=StructuredOutput(regex='a')): pass\n"
            "    process = engine.engine._constrainer._compiler._process\n"
            "    process._deadline = 1000\n"
            "    process._worker.send_signal(signal.SIGSTOP)\n"
            "    try: await asyncio.wait_for(anext(engine.generate([5], structured=StructuredOutput(regex='b'))), 0.5)\n"
            "    except TimeoutError: pass\n"
        )
    code += "asyncio.run(main())\nprint('done')"
    done = subprocess.run([sys.executable, "-c", code, str(artifact)], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout.strip()) == (0, "done"), done.stderr


def test_progress(engine: AsyncEngine) -> None:
    def check(stats: Callable[[], Any]) -> None:
        assert engine.engine.seconds_since_step is not None and stats().generated_tokens > 0

    within(read(engine.generate("a", max_tokens=3)))
    check(engine.stats)


def test_long_texts_are_encoded_in_another_thread(engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    threads: dict[int, str] = {}
    real = engine.llm.encode

    def encode(prompt: Any) -> list[int]:
        threads[len(prompt)] = threading.current_thread().name
        return real(prompt)

    async def main() -> None:
        monkeypatch.setattr(engine.llm, "encode", encode)
        with pytest.raises(RequestError, match="context length is 256"):
            await read(engine.generate("x " * 20_000))
        await read(engine.generate("x ", max_tokens=2))

    within(main())
    assert threads[40_000].startswith("optc helper") and threads[2] == "MainThread"
