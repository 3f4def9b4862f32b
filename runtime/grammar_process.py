"""The process in which grammars are compiled first, and its end when one takes too long. It runs `grammar_worker.py`."""

from __future__ import annotations

import contextlib
import json
import select
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from ..errors import ClosedError, RequestError

START_DEADLINE = 60.0  # seconds to start, which reads the tokenizer


class GrammarProcess:
    """Starts with the first grammar, and again after it was killed. One thread at a time may use it; any may close it.

    Args:
        library: folder that has llguidance.
        arguments: of the worker.
        deadline: seconds that a grammar may take.
    """

    def __init__(self, library: Path, arguments: Sequence[str], deadline: float) -> None:
        self._library = str(library)
        self._arguments, self._deadline = arguments, deadline
        self._worker: subprocess.Popen[str] | None = None
        self._is_closed = False

    def check(self, kind: str, text: str) -> str | None:
        """Why the grammar cannot be used; None if it can.

        Raises:
            RequestError: it took too long, or ended the process.
            ClosedError: `close` was called meanwhile.
        """
        if self._is_closed:
            raise ClosedError("the engine was closed")
        try:
            if self._worker is None or self._worker.poll() is not None:
                self._start()
            worker = self._worker
            assert worker is not None and worker.stdin is not None
            worker.stdin.write(json.dumps({"kind": kind, "text": text}) + "\n")
            worker.stdin.flush()
            return self._read(self._deadline)
        except (BrokenPipeError, EOFError) as error:
            code = self._stop()
            if self._is_closed:
                raise ClosedError("the engine was closed") from error
            how = signal.Signals(-code).name if code < 0 else f"code {code}"
            raise RequestError(
                f"{kind}: too complex: the process that compiled it ended ({how}), out of memory or stack"
            ) from error
        except TimeoutError as error:
            self._stop()
            raise RequestError(f"{kind}: too complex: compiling it took longer than {self._deadline:g} s") from error
        except BaseException:
            self._stop()  # or the next one would read the answer to this
            raise

    def close(self) -> None:
        """End the process now; a `check` that runs in another thread raises."""
        self._is_closed = True
        if (worker := self._worker) is not None:
            worker.kill()
            worker.wait()

    def _start(self) -> None:
        self._stop()
        file = Path(__file__).with_name("grammar_worker.py")
        # -I: nothing of the caller's folder or environment; where llguidance is, it is told.
        path = [self._library, str(file.parent)]
        code = f"import sys; sys.path += {path!r}; import grammar_worker; grammar_worker.main()"
        self._worker = subprocess.Popen(
            [sys.executable, "-I", "-c", code, *self._arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        if self._is_closed:
            self._worker.kill()
        try:
            self._read(START_DEADLINE)
        except (EOFError, TimeoutError) as error:
            self._stop()
            if self._is_closed:
                raise ClosedError("the engine was closed") from error
            raise RequestError("structured output: the process that compiles grammars does not start") from error

    def _read(self, seconds: float) -> str | None:
        """The worker's answer.

        Raises:
            TimeoutError: none came in time.
            EOFError: the worker died.
        """
        assert self._worker is not None and self._worker.stdout is not None
        poll = select.poll()  # which knows file numbers above 1,023
        poll.register(self._worker.stdout, select.POLLIN)
        if not poll.poll(1000 * seconds):
            raise TimeoutError
        line = self._worker.stdout.readline()
        if not line:
            raise EOFError
        found: str | None = json.loads(line)["error"]
        return found

    def _stop(self) -> int:
        """End the process, if there is one; its exit code, negative for a signal."""
        if (worker := self._worker) is None:
            return 0
        with contextlib.suppress(subprocess.TimeoutExpired):
            worker.wait(0.2)  # one that died by itself says of what
        worker.kill()
        code = worker.wait()
        for stream in (worker.stdin, worker.stdout):
            assert stream is not None
            with contextlib.suppress(BrokenPipeError):
                stream.close()
        self._worker = None
        return code
