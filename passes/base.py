"""The pass interface and its runner.

A pass is a frozen dataclass whose docstring is the rewrite. It reads and edits the graph in `apply` and returns how
many rewrites it made and which candidates it left alone, each with the reason. The runner alone removes dead code,
lints, recompiles, recomputes shapes, checks the count, checks the numbers against the graph before, dumps and times.
"""

from __future__ import annotations

import hashlib
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, fx

from ..errors import OptcError, PassError, VerificationError
from ..runtime.manifest import PassRecord
from .graph import Program, propagate, to_text
from .verify import Probe


@dataclass(frozen=True)
class Decline:
    """A candidate that looked like a match and was left alone."""

    node: str
    reason: str

    def __str__(self) -> str:
        return f"{self.node}: {self.reason}"


@dataclass
class Result:
    """What a pass did: how many rewrites, and what it declined.

    `rounding` is how far the logits may move, beyond the pass's tolerance, because new weights were rounded to the dtype of
    the old ones. `meant` holds, by name, the weights of the graph before as the graph after means them, f32 in the layout
    that the graph before has them in; only a pass that `changes_weights` gives any.
    """

    matches: int = 0
    declined: list[Decline] = field(default_factory=list)
    rounding: float = 0.0
    meant: Mapping[str, Tensor] = field(default_factory=dict)

    def decline(self, node: fx.Node, reason: str) -> None:
        self.declined.append(Decline(node.name, reason))


@dataclass(frozen=True, kw_only=True)
class Pass(ABC):
    """One rewrite.

    Class attributes:
        requires: facts that earlier passes must have provided.
        provides: facts that hold afterwards.
        tolerance: largest relative error of the fp32 logits that the rewrite may cause.
        changes_weights: whether the rewrite puts other weights in place of some, and so is lossy. It is then held against
            the graph before with those weights in it, and the difference to the graph before as it was is recorded.
    """

    requires: ClassVar[frozenset[str]] = frozenset()
    provides: ClassVar[frozenset[str]] = frozenset()
    tolerance: ClassVar[float] = 1e-4
    changes_weights: ClassVar[bool] = False

    @property
    def name(self) -> str:
        """The class name in snake case, as in file names, logs and `optc passes`."""
        letters = (f"_{c.lower()}" if c.isupper() else c for c in type(self).__name__)
        return "".join(letters).lstrip("_").replace("k_v_", "kv_")

    @abstractmethod
    def apply(self, program: Program) -> Result:
        """Rewrite `program` in place.

        Raises:
            PassError: the graph holds something this rewrite cannot deal with and must not leave behind.
        """

    def expected_matches(self, program: Program) -> int | None:
        """How many matches the graph before the pass must give; None if any number is right."""
        return None

    def config(self) -> dict[str, Any]:
        """The parameters that decide what the pass does."""
        return asdict(self)

    def config_sha256(self) -> str:
        return hashlib.sha256(f"{self.name}{sorted(self.config().items())}".encode()).hexdigest()


def run_passes(
    program: Program,
    passes: Sequence[Pass],
    *,
    facts: Iterable[str] = (),
    probe: Probe | None = None,
    dump: Path | None = None,
    on_record: Callable[[PassRecord], None] = lambda record: None,
) -> list[PassRecord]:
    """Apply `passes` to `program` in order.

    Args:
        program: rewritten in place.
        passes: in the order they run.
        facts: what earlier passes provided.
        probe: token sequences on which the logits before and after each pass are compared; None skips the check.
        dump: folder for `NN_name.before.txt` and `NN_name.after.txt`.
        on_record: called after each pass, for progress.

    Raises:
        PassError: a requirement is missing, a count is wrong, or the graph is broken.
        VerificationError: the logits moved by more than the pass's tolerance, or are not finite.
    """
    known = set(facts)
    records: list[PassRecord] = []
    expected = probe.logits(program) if probe else None
    for number, item in enumerate(passes):
        if missing := item.requires - known:
            raise PassError(f"pass {item.name} needs {sorted(missing)}; passes run so far: {[r.name for r in records]}")
        before_nodes, started = len(program.graph.nodes), time.perf_counter()
        if dump:
            dump.mkdir(parents=True, exist_ok=True)
            (dump / f"{number:02d}_{item.name}.before.txt").write_text(to_text(program))
        before = program.copy() if probe and item.changes_weights else None
        result = _apply(item, program, records)
        if dump:
            (dump / f"{number:02d}_{item.name}.after.txt").write_text(to_text(program))
        error = None
        if probe and expected is not None:
            found = probe.logits(program)
            error = probe.error(expected, found)
            wrong = probe.error(probe.logits(before, result.meant), found) if before else error
            allowed = item.tolerance + result.rounding
            if not (wrong <= allowed and math.isfinite(error)):
                raise VerificationError(
                    f"pass {item.name} changed the logits by {wrong:.2e} (relative, fp32; allowed {allowed:.0e}). "
                    "This is a bug in optc or a model it does not understand; `--dump DIR` shows the graphs"
                )
            expected = found
        record = PassRecord(
            name=item.name,
            config_sha256=item.config_sha256(),
            matches=result.matches,
            declined=tuple(map(str, result.declined)),
            node_delta=len(program.graph.nodes) - before_nodes,
            max_error=error,
            seconds=time.perf_counter() - started,
        )
        known |= item.provides
        records.append(record)
        on_record(record)
    return records


def _apply(item: Pass, program: Program, records: Sequence[PassRecord]) -> Result:
    wanted = item.expected_matches(program)
    try:
        result = item.apply(program)
        program.graph.eliminate_dead_code()
        program.graph.lint()
        program.module.recompile()
        propagate(program)
    except OptcError:
        raise
    except Exception as error:
        raise PassError(f"pass {item.name} broke the graph, after {[r.name for r in records]}: {error}") from error
    if wanted is not None and result.matches != wanted:
        reasons = "; ".join(map(str, result.declined[:3])) or "no candidate was declined"
        raise PassError(f"pass {item.name} matched {result.matches} times, expected {wanted} ({reasons})")
    return result
