"""Errors for users: one message with place, problem, expectation and remedy. Asserts are for us."""

from __future__ import annotations


class FtError(Exception):
    """Something a user can mend. The command line prints it on one screen and exits with status 2.

    Args:
        problem: one sentence that says what is wrong.
        where: the place, as "file.jsonl:17" or a recipe path such as "optim.lr".
        expected: what should have stood there.
        got: what stood there.
        fix: what to do about it; a command where one helps.
    """

    def __init__(self, problem: str, *, where: str = "", expected: str = "", got: str = "", fix: str = ""):
        self.problem, self.where, self.expected, self.got, self.fix = problem, where, expected, got, fix
        lines = [f"{where}: {problem}" if where else problem]
        lines += [f"  {name}: {text}" for name, text in
                  (("expected", expected), ("got", got), ("fix", fix)) if text]  # fmt: skip
        self.message = "\n".join(lines)
        super().__init__(self.message)

    def __str__(self) -> str:
        return self.message


class RecipeError(FtError, ValueError):
    """A recipe, an override or a command-line value is wrong."""


class DataError(FtError, ValueError):
    """A row, a data file or a chat template is wrong."""


class MissingFileError(FtError, FileNotFoundError):
    """A file or folder that was named does not exist."""


class ModelError(FtError, ValueError):
    """A model folder, a weight or an adapter does not fit."""


class CapacityError(FtError, MemoryError):
    """The machine cannot hold what was asked for: memory, disk or devices."""


class ServerError(FtError, ConnectionError):
    """A server that samples does not start, is gone, refuses, or does not sample from the policy."""


class CheckpointError(FtError, RuntimeError):
    """A checkpoint is damaged, or does not belong to this run."""


class RunFolderError(FtError, FileExistsError):
    """A run folder is in use, or holds another run."""


class NumericsError(FtError, ArithmeticError):
    """Losses or gradients were not finite, or a trained tensor got no gradient."""
