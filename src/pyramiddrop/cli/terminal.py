"""Terminal output of all verbs: results, messages, progress and errors."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import typer
from rich.console import Console
from rich.text import Text
from typer.core import TyperGroup

from pyramiddrop.inference import InputError, user_input

#: Exit codes: for bad user input, and after Ctrl-C, as in shells.
BAD_INPUT, STOPPED = 2, 130


def stdout() -> Console:
    """Standard output, for results only."""
    return Console(highlight=False, markup=False)


def stderr() -> Console:
    """Standard error, for progress and messages beside the result."""
    return Console(stderr=True, highlight=False, markup=False)


def say(message: str, **style: Any) -> None:
    """Print a message beside the result."""
    stderr().print(message, soft_wrap=True, **style)


def print_json(record: Any) -> None:
    """Print the result as JSON."""
    print(json.dumps(record, indent=2))


def print_result(record: Any, parts: Iterable[Any], as_json: bool) -> None:
    """Print the record of a result as JSON, or else its parts."""
    if as_json:
        print_json(record)
    else:
        print_parts(parts)


def print_parts(parts: Iterable[Any]) -> None:
    """Print the parts of a result, with an empty line after each."""
    console = stdout()
    for part in parts:
        console.print(part)
        console.print()


def make_folder(path: Path) -> None:
    """Make a folder for output; InputError if that fails."""
    with user_input(f"cannot write into {path}", (OSError,)):
        path.mkdir(parents=True, exist_ok=True)


@contextmanager
def spinner(message: str) -> Iterator[Callable[[str], None]]:
    """Show a spinner on a terminal; yields a function that changes its message.

    Transformers' own bars are silenced, because they would break the line.
    """
    from transformers.utils import logging

    logging.disable_progress_bar()
    with stderr().status(Text(message)) as status:
        yield lambda step: status.update(Text(step))


@contextmanager
def progress() -> Iterator[Callable[[str, int], Callable[..., None]]]:
    """Show progress bars on standard error, if it is a terminal.

    Yields a context manager that starts a bar, given its description and the number of steps. This one yields a
    function that advances the bar, given the steps and optionally a new description.
    """
    from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn
    from transformers.utils import logging

    logging.disable_progress_bar()
    console = stderr()
    columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:

        def begin(description: str, total: int) -> Callable[..., None]:
            task = bars.add_task(description, total=total)
            return lambda steps=1, description=None: bars.update(task, advance=steps, description=description)

        yield begin


class OneLineErrors(TyperGroup):
    """Shows errors about user input and about unsupported models as one line `error: ...`, with exit code 2.

    Other errors keep their traceback.
    """

    def main(self, *args: Any, **settings: Any) -> Any:
        standalone, settings["standalone_mode"] = settings.get("standalone_mode", True), False
        if not standalone:
            return super().main(*args, **settings)
        try:
            code = super().main(*args, **settings)
        except typer.Abort:
            _fail("stopped")
        except Exception as error:
            shown = getattr(error, "format_message", None)  # click's own; Typer has no public name for their class
            if shown is None and not _about_input(error):
                raise
            _fail(shown() if shown else str(error))
        if code == STOPPED:
            given = args[0] if args else settings.get("args")
            print(f"stopped{_how_to_go_on(sys.argv[1:] if given is None else list(given))}", file=sys.stderr)
        sys.exit(code if isinstance(code, int) else 0)


def _how_to_go_on(words: list[str]) -> str:
    """How a stopped command continues when it is run again."""
    verb = next(iter(words), "")
    given = {word.partition("=")[0] for word in words}
    if verb == "eval" and "--tasks" in given and not {"digits", "reader"} & set(words):
        return ""  # lmms-eval starts again
    if verb == "study" or (verb == "eval" and "--output" in given):
        return "; the same command goes on where it stopped"
    if verb == "eval":
        return "; with --output FOLDER the same command goes on where it stopped"
    if verb == "train":
        return "; the same command with --resume goes on from the last checkpoint (--save-every writes them more often)"
    return ""


def _about_input(error: Exception) -> bool:
    from pyramiddrop.hf import UnsupportedModelError

    return isinstance(error, InputError | UnsupportedModelError)


def _fail(message: str) -> NoReturn:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(BAD_INPUT)
