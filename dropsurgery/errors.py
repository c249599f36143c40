"""What can go wrong, as types: each message says what was expected, what came, where, and what to do."""

from __future__ import annotations


class SurgeryError(Exception):
    """Base of every error that dropsurgery raises on purpose; the model given is left as it was."""


class CaptureError(SurgeryError):
    """A model (or one of its modules) cannot be turned into a graph that can be trusted."""


class RecipeError(SurgeryError):
    """A recipe is not valid; `problems` holds every problem, each with line, column and path where known."""

    def __init__(self, message: str, problems: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.problems = problems or (message,)

    def __reduce__(self) -> tuple[type, tuple[str, tuple[str, ...]]]:
        return type(self), (str(self), self.problems)


class PlanError(SurgeryError):
    """A valid recipe does not fit this model: nothing was hit, a count is off, two edits collide."""


class SurgeryWarning(UserWarning):
    """Something works, but most likely not as its user thinks."""
