"""Every error a user can meet.

    OptcError                     the base; the command line prints its message on one line
    +-- UsageError                an option or an argument that makes no sense                      (exit code 2)
    +-- CheckpointError           the checkpoint or adapter cannot be read
    +-- UnsupportedModelError     the model cannot be compiled, and says which module and what to do
    +-- PassError                 a pass did not match what it promised, or broke the graph
    |   +-- VerificationError     the graph computes something else than before                     (exit code 3)
    +-- BudgetError               an accuracy or size budget cannot be kept                         (exit code 3)
    +-- TargetError               an unknown target, or one that lacks what was asked for           (exit code 2)
    +-- LoweringError             native code could not be made
    +-- ArtifactError             an artifact cannot be written, read or trusted
    +-- RequestError              a prompt or a sampling parameter is wrong
    +-- OverloadedError           the engine's queue is full; the same request may be taken later
    +-- DeadlineError             a request did not end in the time it was given
    +-- ClosedError               the engine was closed, or its thread died
    +-- ExecutionError            the model computed something that is no number, or a step failed

Messages name the thing, what was found, what was expected, and the way out. `assert` is for optc's own invariants.
"""

from __future__ import annotations

from collections.abc import Sequence


class OptcError(Exception):
    """Base of all errors raised on purpose. `exit_code` is what the command line exits with."""

    exit_code = 1


class UsageError(OptcError):
    exit_code = 2


class CheckpointError(OptcError):
    pass


class UnsupportedModelError(OptcError):
    pass


class PassError(OptcError):
    pass


class VerificationError(PassError):
    exit_code = 3


class BudgetError(OptcError):
    """`details` are the lines of the table that says why; the command line prints them first."""

    exit_code = 3

    def __init__(self, message: str, *, details: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.details = tuple(details)


class TargetError(OptcError):
    exit_code = 2


class LoweringError(OptcError):
    pass


class ArtifactError(OptcError):
    pass


class RequestError(OptcError):
    pass


class ExecutionError(OptcError):
    pass


class OverloadedError(OptcError):
    pass


class DeadlineError(OptcError):
    pass


class ClosedError(OptcError):
    pass
