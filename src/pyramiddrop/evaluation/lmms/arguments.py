"""Parse and write `--model_args`: the method's options and the backend's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from pyramiddrop import Compose, Method, PyramidDrop
from pyramiddrop.inference.errors import InputError
from pyramiddrop.inference.resolve import parse_method, saved_method
from pyramiddrop.method_spec import BAR, NAMES, VANILLA, option_names, with_options


@dataclass(frozen=True)
class Arguments:
    """The parsed `--model_args`.

    Attributes:
        method: the method; None for vanilla.
        backend: the name of the backend, or "auto".
        passed: further arguments for the backend.
    """

    method: Method | None
    backend: str
    passed: dict[str, Any]


def read_arguments(pretrained: str, given: Mapping[str, Any]) -> Arguments:
    """Separate the method's fields from the backend's arguments.

    A composition is one `method` without commas: `vision:keep=0.5|pyramiddrop:layers=8/16:keep=0.5/0.25`. Fields beside
    it go to the method inside the decoder; settings of a whole forward go to both methods.

    By default, as in `pyramiddrop generate`, the method is the one saved beside the checkpoint, or else the paper's
    PyramidDrop.

    Args:
        given: lmms-eval's parsed arguments: numbers, True and False, and text (lists with slashes: 8/16/24).

    Raises:
        InputError: for an unknown method, or a field or value that it does not have.
    """
    known = set().union(*map(option_names, NAMES.values()))
    options = {name: value for name, value in given.items() if name in known}
    passed = {name: value for name, value in given.items() if name not in known | {"method", "backend"}}
    backend = str(given.get("backend", "auto"))
    if "method" not in given and not options:
        return Arguments(saved_method(pretrained) or PyramidDrop(), backend, passed)
    name = str(given.get("method", "pyramiddrop"))
    words = {option: str(value) for option, value in options.items()}
    return Arguments(parse_method(with_options(name, words)), backend, passed)


def write_arguments(pretrained: str, method: Method | None, others: Mapping[str, Any]) -> str:
    """Write the text of `--model_args` that `read_arguments` parses to the same values.

    Args:
        others: arguments of the backend; None if not given.

    Raises:
        InputError: for names with commas, which lmms-eval cannot read, methods without a name, and scorers with
            settings.
    """
    if "," in pretrained:
        raise InputError(f"lmms-eval cannot read the name of a checkpoint with a comma: {pretrained}")
    given = {"pretrained": pretrained, **_words(method), **others}
    return ",".join(f"{name}={_written(value)}" for name, value in given.items() if value is not None)


def _words(method: Method | None) -> dict[str, Any]:
    """The method's name and its non-default settings; a composition as one text."""
    if method is None:
        return {"method": VANILLA}
    if isinstance(method, Compose):
        return {"method": BAR.join(map(_part, method.parts))}
    name = next((name for name, kind in NAMES.items() if type(method) is kind), None)
    if name is None:
        raise InputError(f"lmms-eval is told a method by its name, and {type(method).__name__} has none")
    told = method.settings()
    changed = [field.name for field in fields(method) if field.init and getattr(method, field.name) != field.default]
    return {"method": name, **{option: "none" if told[option] is None else told[option] for option in changed}}


def _part(method: Method) -> str:
    """A part of a composition, with colons between its options, because commas separate arguments."""
    words = _words(method)
    return ":".join([words.pop("method"), *(f"{option}={_written(value)}" for option, value in words.items())])


def _written(value: Any) -> str:
    if isinstance(value, Mapping):
        raise InputError(f"lmms-eval is told a scorer by its name alone; got {dict(value)}")
    if isinstance(value, tuple | list):
        return "/".join(map(_written, value))
    return str(value).lower() if isinstance(value, bool) else str(value)
