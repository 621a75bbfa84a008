"""Load a checkpoint, ask it about pictures under a method, and report the answer and its cost."""

from collections.abc import Iterator
from contextlib import contextmanager


class InputError(ValueError):
    """The user's input cannot be used; the message is one line that names the input and the reason."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))


@contextmanager
def user_input(about: str = "", caught: tuple[type[Exception], ...] = (ValueError,)) -> Iterator[None]:
    """Turn the `caught` errors into an :class:`InputError`: `about`, then the first line of the error's message."""
    try:
        yield
    except InputError:
        raise
    except caught as error:
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise InputError(f"{about}: {reason}" if about else reason) from error
