"""Grammars come from strangers: compiling them is bounded in time, in number and in memory, and holds up nobody."""

from __future__ import annotations

import asyncio
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from optc.errors import ClosedError, OverloadedError, RequestError
from optc.runtime import AsyncEngine, StructuredOutput
from optc.runtime import grammar as grammar_module
from optc.runtime.grammar import GrammarCompiler
from optc.runtime.tokenizer import Tokenizer

from .engine_cases import VOCAB


@pytest.fixture
def make_compiler(artifact: Path) -> Iterator[Callable[..., GrammarCompiler]]:
    made: list[GrammarCompiler] = []

    def make(**options: Any) -> GrammarCompiler:
        made.append(GrammarCompiler(artifact / "tokenizer/tokenizer.json", vocab_size=VOCAB, end_ids=[1], **options))
        return made[-1]

    yield make
    for compiler in made:
        compiler.close()


def regex(text: str) -> StructuredOutput:
    return StructuredOutput(regex=text)


def stop_worker(compiler: GrammarCompiler) -> Any:
    """Stands for a compilation that does not end."""
    compiler.matcher(regex("a"))
    worker = compiler._process._worker
    assert worker is not None
    worker.send_signal(signal.SIGSTOP)
    return worker


def in_thread(call: Callable[[], object]) -> tuple[threading.Thread, list[object]]:
    found: list[object] = []

    def run() -> None:
        try:
            found.append(call())
        except Exception as error:
            found.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, found


def test_a_worker_that_takes_too_long_is_killed_and_started_again(
    make_compiler: Callable[..., GrammarCompiler],
) -> None:
    compiler = make_compiler(deadline=0.5)
    worker = stop_worker(compiler)
    started = time.monotonic()
    with pytest.raises(RequestError, match=r"longer than 0\.5 s"):
        compiler.matcher(regex("b"))
    assert time.monotonic() - started < 3
    assert worker.poll() is not None, "killed"
    compiler.matcher(regex("b2"))
    again = compiler._process._worker
    assert again is not None
    again.kill()
    again.wait()
    compiler.matcher(regex("c"))


@pytest.mark.parametrize("how", ["SIGKILL", "SIGSEGV"])
def test_a_worker_that_dies(
    how: str, make_compiler: Callable[..., GrammarCompiler], monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = make_compiler()
    worker = stop_worker(compiler)
    real = compiler._process._read

    def read(seconds: float) -> str | None:
        worker.send_signal(getattr(signal, how))
        worker.send_signal(signal.SIGCONT)
        return real(seconds)

    with monkeypatch.context() as patch:
        patch.setattr(compiler._process, "_read", read)
        with pytest.raises(RequestError, match=rf"ended \({how}\)"):
            compiler.matcher(regex("b"))
    compiler.matcher(regex("c"))


def test_what_took_too_long_is_not_tried_again_at_once(
    make_compiler: Callable[..., GrammarCompiler], monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = make_compiler(deadline=0.3)
    stop_worker(compiler)
    for _ in range(3):  # the worker was killed, and a new one would compile it
        with pytest.raises(RequestError, match="longer than"):
            compiler.matcher(regex("b"))
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + grammar_module.RETRY_AFTER + 1)
    compiler.matcher(regex("b"))
    assert compiler._num_characters == 2


def test_an_interrupt_leaves_no_answer_behind(
    make_compiler: Callable[..., GrammarCompiler], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or the next grammar would get it."""
    compiler = make_compiler()
    compiler.matcher(regex("a"))

    def read(seconds: float) -> str | None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(compiler._process, "_read", read)
        with pytest.raises(KeyboardInterrupt):
            compiler.matcher(regex("(b"))
    compiler.matcher(regex("c"))


def test_what_is_kept_waits_for_nobody_and_few_may_wait(
    make_compiler: Callable[..., GrammarCompiler], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grammar_module, "MOST_WAITING", 2)
    compiler = make_compiler(deadline=30.0)
    worker = stop_worker(compiler)
    waiting = [in_thread(lambda text=text: compiler.matcher(regex(text))) for text in "bc"]
    while compiler._num_waiting < 2:
        time.sleep(0.01)
    compiler.matcher(regex("a"))
    with pytest.raises(OverloadedError, match="2 grammars wait"):
        compiler.matcher(regex("d"))
    worker.send_signal(signal.SIGCONT)
    for thread, found in waiting:
        thread.join()
        assert not isinstance(found[0], Exception)
    compiler.matcher(regex("d"))


def test_refusals_are_kept(make_compiler: Callable[..., GrammarCompiler], monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = make_compiler()
    with pytest.raises(RequestError, match="regex") as first:
        compiler.matcher(regex("(a"))
    monkeypatch.setattr(compiler._process, "check", None)
    with pytest.raises(RequestError) as second:
        compiler.matcher(regex("(a"))
    assert str(first.value) == str(second.value)


def test_the_cache_is_bounded(make_compiler: Callable[..., GrammarCompiler], monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = make_compiler()
    monkeypatch.setattr(grammar_module, "KEPT", 5)
    for number in range(12):
        compiler.matcher(regex(f"a{number}"))
    assert len(compiler._kept) == 5
    monkeypatch.setattr(grammar_module, "KEPT_CHARACTERS", 100)
    for number in range(3):
        compiler.matcher(regex("b" * 45 + str(number)))
    assert [len(text) for _, text in compiler._kept] == [46, 46] and compiler._num_characters == 92


def test_closing_waits_for_no_grammar(make_compiler: Callable[..., GrammarCompiler]) -> None:
    compiler = make_compiler(deadline=30.0)
    worker = stop_worker(compiler)
    thread, found = in_thread(lambda: compiler.matcher(regex("b")))
    time.sleep(0.1)
    started = time.monotonic()
    compiler.close()
    thread.join()
    assert time.monotonic() - started < 2 and worker.poll() is not None
    assert isinstance(found[0], ClosedError)
    with pytest.raises(ClosedError):
        compiler.matcher(regex("c"))
    assert compiler._process._worker is None, "and none is left behind"


def test_bad_words_are_encoded_once_a_prompt(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoded: list[str] = []
    real = Tokenizer.encode

    def encode(self: Tokenizer, text: str, **options: Any) -> list[int]:
        encoded.append(text)
        return real(self, text, **options)

    async def main() -> list[Any]:
        async with AsyncEngine(artifact) as engine:
            monkeypatch.setattr(Tokenizer, "encode", encode)
            outputs = engine.generate("The", n=8, bad_words=["the"], temperature=1.0, max_tokens=4)
            return [output async for output in outputs]

    assert {output.index for output in asyncio.run(main())} == set(range(8))
    assert encoded == ["The", "the", " the"]
