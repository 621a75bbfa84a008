"""The error for bad user input, with a one-line message that gives the reason."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class InputError(ValueError):
    """Something that the user gave cannot be used. Its message is one line that names the thing and the reason."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))


@contextmanager
def user_input(about: str = "", caught: tuple[type[Exception], ...] = (ValueError,)) -> Iterator[None]:
    """Turn errors about what the user gave into an :class:`InputError` that says `about` what.

    Args:
        about: put before the first line of the error's message.
        caught: the classes that are turned.
    """
    try:
        yield
    except InputError:
        raise
    except caught as error:
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise InputError(f"{about}: {reason}" if about else reason) from error
