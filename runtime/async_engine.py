"""`AsyncEngine`: an artifact behind asyncio. One thread runs the engine, event loops read from it."""

from __future__ import annotations

import asyncio
import atexit
import logging
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping, Sequence, Sized
from concurrent.futures import Future
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from ..errors import ClosedError, OverloadedError, RequestError
from .llm import LLM, Message, Prompt, make_params
from .params import SamplingParams
from .reader import CompletionReader, RequestOutput
from .request import Request
from .stats import EngineStats

logger = logging.getLogger("optc")
DEFAULTS = {"decode_stretch": 3.0, "max_queued_requests": 1024, "max_queued_tokens": 2**22}
LONG_PROMPT = 20_000  # characters or tokens, times `n`, which take milliseconds
MOST_HELPERS = 64  # threads that make requests ready: more than grammars may wait


class AsyncEngine:
    """A compiled model for services.

        async with AsyncEngine("qwen3.optc") as engine:
            async for output in engine.generate("Hello", max_tokens=32):
                print(output.text, end="")

    Any number of tasks, in any number of event loops and threads, may use one. Leaving the loop early, or cancelling the
    task, ends the request and frees its blocks by the end of the step that runs. Make it after forking, not before.

    Args:
        path: artifact folder.
        native, verify: as for `LLM`.
        **limits: fields of `EngineConfig`. By default up to 1,024 requests or 4 million tokens wait, and prompts run in
            chunks that at most triple the time between two tokens of the others (`decode_stretch=3`).

    Raises:
        ArtifactError: the artifact is damaged or does not fit this machine.
        UsageError: a limit that makes no sense.
    """

    def __init__(self, path: str | Path, *, native: bool = True, verify: bool = False, **limits: Any) -> None:
        self.llm = LLM(path, native=native, verify=verify, **(DEFAULTS | limits))
        self.engine = self.llm.engine
        self._wake = threading.Condition()
        self._readers: dict[Request, tuple[asyncio.AbstractEventLoop, asyncio.Event]] = {}
        self._close_at: float | None = None
        self._failure: BaseException | None = None
        self._helpers = threading.Semaphore(MOST_HELPERS)
        self._thread = threading.Thread(target=self._run, name="optc engine", daemon=True)
        self._thread.start()
        atexit.register(self.close)  # a daemon thread must not be inside a kernel when the interpreter goes

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await asyncio.to_thread(self.close)

    @property
    def is_healthy(self) -> bool:
        """Whether the engine's thread is there. `engine.seconds_since_step` tells whether it gets on."""
        return self._failure is None and self._close_at is None and self._thread.is_alive()

    def stats(self) -> EngineStats:
        """What the engine has done, and how it stands. Waits for the step that runs; see `asyncio.to_thread`."""
        return self.engine.stats()

    def generate(
        self, prompt: Prompt, params: SamplingParams | None = None, **options: Any
    ) -> AsyncGenerator[RequestOutput, None]:
        """Complete a prompt; what is new, as it comes.

        A reader that takes its time gets more at once; nobody waits for it. Each of `n` completions ends with an output
        that has a `finish_reason`; what goes wrong once a request was taken is in its `error`.

        Args:
            prompt: a text or a list of token ids.
            params: how tokens are chosen.
            **options: fields of `SamplingParams`, over those of `params`, and of `RequestOptions`.

        Raises:
            RequestError: a prompt or a parameter is wrong.
            OverloadedError: the queue is full, or too many grammars wait to be compiled.
            ClosedError: the engine was closed or has died.
        """
        size = len(prompt) if isinstance(prompt, Sized) else 0
        return self._stream(lambda: self.llm.encode(prompt), size, params, options)

    def chat(
        self,
        messages: Sequence[Message],
        params: SamplingParams | None = None,
        *,
        template_variables: Mapping[str, object] | None = None,
        **options: Any,
    ) -> AsyncGenerator[RequestOutput, None]:
        """Answer a conversation through the model's chat template; as `generate`.

        Raises:
            RequestError: no chat template, or messages it refuses; and as `generate`.
        """
        size = sum(len(str(message)) for message in messages) if isinstance(messages, Sequence) else 0
        variables = dict(template_variables or {})
        return self._stream(lambda: self.llm.chat_prompt(messages, **variables), size, params, options)

    async def _stream(
        self, encode: Callable[[], list[int]], size: int, params: SamplingParams | None, options: dict[str, Any]
    ) -> AsyncGenerator[RequestOutput, None]:
        """`encode` makes the prompt's tokens, of `size` characters or tokens."""
        chosen, treatment = make_params(params, options)
        if chosen.echo:
            raise RequestError("echo=True: a stream begins with the completion; the prompt is known")

        def add() -> Request:
            self._check_open()
            return self.engine.add(encode(), chosen, treatment)

        takes_long = chosen.structured is not None or chosen.bad_words or chosen.n * size >= LONG_PROMPT
        request = await self._elsewhere(add) if takes_long else add()
        members = list(request.group)
        try:
            news = asyncio.Event()
            for member in members:
                self._readers[member] = (asyncio.get_running_loop(), news)
            with self._wake:
                self._wake.notify()
            readers = [CompletionReader(member, self.llm.tokenizer, index) for index, member in enumerate(members)]
            while True:
                news.clear()  # before reading, or what comes meanwhile would be missed
                for reader in readers:
                    if (output := reader.read()) is not None:
                        yield output
                if all(reader.is_done for reader in readers):
                    return
                self._check_alive()
                await news.wait()
        finally:
            for member in members:
                self._readers.pop(member, None)
            self._abort(members)

    async def _elsewhere(self, add: Callable[[], Request]) -> Request:
        """Add a request in a thread of its own, as compiling a grammar takes a while, or a long text.

        A daemon thread: one of a pool would hold up the end of the process.
        """
        if not self._helpers.acquire(blocking=False):
            raise OverloadedError(f"{MOST_HELPERS} requests are made ready; try again later")
        adding: Future[Request] = Future()

        def run() -> None:
            try:
                adding.set_result(add())
            except BaseException as error:
                adding.set_exception(error)
            finally:
                self._helpers.release()

        adding.set_running_or_notify_cancel()  # it cannot be cancelled
        threading.Thread(target=run, name="optc helper", daemon=True).start()
        try:
            return await asyncio.wrap_future(adding)
        except BaseException:  # who asked is gone, but the thread goes on
            adding.add_done_callback(self._drop)
            raise

    def _drop(self, added: Future[Request]) -> None:
        if not added.cancelled() and added.exception() is None:
            self._abort(added.result().group)

    def _abort(self, requests: Iterable[Request]) -> None:
        self.engine.abort(request for request in requests if request.finish_reason is None)
        with self._wake:
            self._wake.notify()

    def close(self, *, drain: float = 0.0) -> None:
        """End the engine's thread. What runs or waits has `drain` seconds to finish, the rest ends with abort."""
        with self._wake:
            if self._close_at is not None:
                return
            self._close_at = time.monotonic() + drain
            self._wake.notify()
        self._thread.join()
        self.llm.close()
        self._tell(list(self._readers))
        atexit.unregister(self.close)

    def _check_open(self) -> None:
        self._check_alive()
        if self._close_at is not None:
            raise ClosedError("the engine was closed")

    def _check_alive(self) -> None:
        if self._failure is not None:
            raise ClosedError(f"the engine died: {self._failure}") from self._failure

    def _run(self) -> None:
        """The engine's thread."""
        try:
            while True:
                with self._wake:
                    while not self.engine.has_work() and self._close_at is None:
                        self._wake.wait()
                    if self._close_at is not None and (
                        not self.engine.has_work() or time.monotonic() >= self._close_at
                    ):
                        break
                self._tell(self.engine.step())
        except BaseException as error:
            logger.exception("the engine died")
            self._failure = error
            self._tell(list(self._readers))

    def _tell(self, requests: Sequence[Request]) -> None:
        """Wake the readers of requests: one call into each event loop, whatever their number."""
        events: dict[asyncio.AbstractEventLoop, set[asyncio.Event]] = {}
        for request in requests:
            if (reader := self._readers.get(request)) is not None:
                events.setdefault(reader[0], set()).add(reader[1])
        for loop, news in events.items():
            try:
                loop.call_soon_threadsafe(_set_all, news)
            except RuntimeError:  # the loop is closed: nobody reads any more
                gone = [request for request, reader in list(self._readers.items()) if reader[0] is loop]
                for request in gone:
                    self._readers.pop(request, None)
                self._abort(gone)


def _set_all(events: set[asyncio.Event]) -> None:
    for event in events:
        event.set()
