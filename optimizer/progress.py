"""Where the driver reports to while it works."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

from ..runtime.manifest import PassRecord


@dataclass
class Progress:
    """Where the driver reports to; the defaults are silent. `seconds` fills up with the time each stage took.

    `on_fraction` is called in the course of a long stage with the fraction of it that is done.
    """

    show: Callable[[str], AbstractContextManager[Any]] = field(default=lambda stage: nullcontext())
    on_fraction: Callable[[float], None] = field(default=lambda fraction: None)
    on_pass: Callable[[PassRecord], None] = field(default=lambda record: None)
    on_warning: Callable[[str], None] = field(default=lambda warning: None)
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        with self.show(name):
            yield
        self.seconds[name] = time.perf_counter() - started
