"""Errors a user can act on.

Every one of them prints as one line that names the place and what was expected there; the
launchers turn them into an exit code (2 for bad input) without a traceback.
"""

from __future__ import annotations

from pathlib import Path


class NmarError(Exception):
    """Base of every error caused by input, configuration or the machine, not by a bug.

    Attributes:
        shared: all ranks know of it, so one of them reports it.
        exit_code: of a launcher that it ends (docs/operations.md lists them).
    """

    shared = False
    exit_code = 2


def shared(error: NmarError) -> NmarError:
    """Mark an error that every rank raises at the same place; to be raised."""
    error.shared = True
    return error


class ConfigError(NmarError):
    """A configuration file or override that cannot be used; names the key and the value."""


class TraceError(NmarError):
    """A record or trace that breaks a rule of SPEC section 2.

    Args:
        path: file the record came from.
        line: 1-based line in it, or None where the fault is the whole file's.
        field: the field at fault, in dotted form (`segments[2].role`).
        problem: what was found.
        expected: what would have been right, without the word "expected".
    """

    def __init__(
        self, path: str | Path, line: int | None, field: str, problem: str, expected: str
    ) -> None:
        self.path = str(path)
        self.line = line
        self.field = field
        self.problem = problem
        self.expected = expected
        place = self.path if line is None else f"{self.path}:{line}"
        super().__init__(f"{place}: {field}: {problem}, expected {expected}")

    def __reduce__(self) -> tuple[type, tuple[object, ...]]:
        return type(self), (self.path, self.line, self.field, self.problem, self.expected)


class VocabularyError(NmarError):
    """Tokenizer, embedding rows and stored ids that do not fit each other.

    Attributes:
        expected: what a record should have held instead, where a text is at fault.
    """

    expected = "text in the tokenizer's alphabet"


class NoUndoTokenError(VocabularyError):
    """A tokenizer that lacks the undo token and can be given one."""


class StoreError(NmarError):
    """A trace store that is missing, damaged or of another version."""


class CheckpointError(NmarError):
    """A checkpoint that is missing, damaged, or belongs to another run."""


class SaveError(CheckpointError):
    """A checkpoint that could not be written; the one before is untouched."""

    exit_code = 1


class FolderError(NmarError):
    """A folder or file that cannot be made, read or written, or has no room."""


class LockedError(NmarError):
    """A run folder that another job is using."""

    exit_code = 4


class LaunchError(NmarError):
    """Ranks that were started with missing or contradictory settings."""


class PeerLostError(NmarError):
    """Another rank ended in the middle of a collective."""

    exit_code = 1


class WorkerLostError(NmarError):
    """A process of a preparation ended in the middle of its work; the others' results are kept."""

    exit_code = 1


class IsolationError(NmarError):
    """The start-up canary saw packed traces influence each other, or a wrong loss."""

    exit_code = 1


class DivergenceError(NmarError):
    """Training stopped because losses or gradients stayed non-finite."""

    exit_code = 1


class NoProgressError(NmarError):
    """The latest attempts of a job all ended without a new checkpoint."""

    exit_code = 3


class HangError(NmarError):
    """A rank waited too long for the others, or for itself."""

    exit_code = 5
