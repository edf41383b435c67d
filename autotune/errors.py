"""The one family of errors that users see: a sentence with the numbers, and a remedy."""

from __future__ import annotations


class AutotuneError(Exception):
    """Base of every error this package raises on purpose.

    Args:
        message: One line that names what is wrong, with the numbers.
        hint: One line that says what to do about it.
    """

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message


def first_line(error: BaseException) -> str:
    """The first line of an error of another library, or its type where it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


class ModelError(AutotuneError):
    """The model is unknown, unreadable, or not a pipeline this package can trace."""


class RequestError(AutotuneError):
    """The requested image (size, batch, steps, dtype, quality) is impossible for the model."""


class MemoryShortageError(RequestError):
    """It does not fit in the memory there is, or ran out of it and nothing smaller was left."""


class MachineError(AutotuneError):
    """The machine cannot be measured, or a machine file cannot be read."""


class ProfileError(AutotuneError):
    """The profile folder or a profile file cannot be read or written."""


class OptimizationError(AutotuneError):
    """An optimization is unknown, unavailable here, or incoherent with another."""
