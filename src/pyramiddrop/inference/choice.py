"""Parse method specifications such as `fastv:layer=2,keep=0.5`."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from transformers.utils import cached_file

from pyramiddrop.inference.errors import InputError, user_input
from pyramiddrop.method_spec import NAMES, check_options, dashed, option_names, parse_method_spec, read_words
from pyramiddrop.methods import FILE_NAME, Method, PyramidDrop

VANILLA = "vanilla"


@dataclass(frozen=True)
class MethodOptions:
    """What was asked for; None where nothing was said. Lists are comma-separated text."""

    method: str | None = None
    lam: float | None = None
    stages: int | None = None
    layers: str | None = None
    layer: int | None = None
    keep: str | None = None
    positions: str | None = None
    score: str | None = None
    reserve: float | None = None
    random_from: int | None = None
    merge: bool | None = None

    @property
    def given(self) -> dict[str, Any]:
        """The options that were given, without the method's name."""
        named = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "method"}
        return {name: value for name, value in named.items() if value is not None}


def choose_method(options: MethodOptions, source: str | Path, num_layers: int) -> Method | None:
    """The method that `options` name, fit for a model of `num_layers` layers; None for vanilla.

    Where no option is given at all, a method saved beside the checkpoint `source` is taken, or else PyramidDrop as
    the paper has it.

    Raises:
        InputError: for an unknown method, an option that the method does not have, or a bad value.
    """
    method = _named(options, source)
    if method is not None:
        with user_input():
            method.schedule(num_layers)
    return method


def _named(options: MethodOptions, source: str | Path) -> Method | None:
    if options.method is None and not options.given:
        return saved_method(source) or PyramidDrop()
    name = options.method or "pyramiddrop"
    if name == VANILLA:
        if options.given:
            raise InputError(
                f"--{dashed(next(iter(options.given)))} means nothing with --method vanilla, which drops no tokens"
            )
        return None
    kind = _kind(name)
    with user_input():
        return kind(**_arguments(name, option_names(kind), options.given))


def _kind(name: str) -> type[Method]:
    if name not in NAMES:
        raise InputError(f"method {name!r} is not one of {', '.join([*NAMES, VANILLA])}")
    return NAMES[name]


def saved_method(source: str | Path) -> Method | None:
    """The method saved beside the checkpoint `source` (a folder or a name on the hub), or None.

    Raises:
        InputError: for a file that cannot be read as a method.
    """
    try:
        found = cached_file(source, FILE_NAME)
    except OSError:  # there is none, or the hub cannot be reached and it was never fetched
        return None
    with user_input(f"cannot use the {FILE_NAME} of {source}"):
        return Method.from_pretrained(Path(str(found)).parent)


def parse_method(text: str) -> Method | None:
    """The method that one word names with its options, as `parse_method_spec` reads it; None for vanilla.

    Raises:
        InputError: for an unknown method, an option that the method does not have, or a bad value.
    """
    with user_input():
        name, given = read_words(text)
        if name != VANILLA:
            _kind(name)
            return parse_method_spec(text)
    if given:
        raise InputError(f"vanilla drops no tokens and has no options; got {text!r}")
    return None


def method_label(method: Method) -> str:
    """The Python expression, without what is as the method's default has it."""
    told = method.settings()
    changed = [entry.name for entry in fields(method) if entry.init and getattr(method, entry.name) != entry.default]
    settings = ", ".join(f"{name}={told[name]!r}" for name in changed)
    return type(method).__name__ + (f"({settings})" if settings else "")


def _arguments(name: str, known: set[str], given: dict[str, Any]) -> dict[str, Any]:
    check_options(name, known, given)
    arguments = dict(given)
    if "layers" in arguments:
        arguments["layers"] = numbers("layers", arguments["layers"], int)
    if "keep" in arguments:
        keep = numbers("keep", arguments["keep"], float)
        arguments["keep"] = keep if "layers" in known else _only(keep)
    return arguments


def numbers(name: str, text: str, kind: type[int] | type[float]) -> list[Any]:
    """The numbers of the option `name`, which are written with commas between them.

    Raises:
        InputError: for anything else.
    """
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError:
        what = "whole numbers" if kind is int else "numbers"
        raise InputError(f"--{name} must be {what} with commas between them; got {text!r}") from None


def _only(keep: list[float]) -> float:
    if len(keep) != 1:
        raise InputError(f"--keep is one number for this method; got {len(keep)}")
    return keep[0]
