"""Parse method specifications such as `fastv:layer=2,keep=0.5`."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, get_args, get_origin, get_type_hints

from transformers.utils import cached_file

from pyramiddrop import Downsample, FastV, Method, PyramidDrop, RandomDrop, UniformDrop, VisionDrop
from pyramiddrop.inference.errors import InputError, user_input
from pyramiddrop.methods import FILE_NAME

VANILLA = "vanilla"
NAMES: dict[str, type[Method]] = {
    "pyramiddrop": PyramidDrop,
    "fastv": FastV,
    "random": RandomDrop,
    "uniform": UniformDrop,
    "vision": VisionDrop,
    "downsample": Downsample,
}
#: An option that the other one makes meaningless.
OVERRULED = (("lam", "keep"), ("stages", "layers"), ("stages", "keep"))


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
                f"--{_dashed(next(iter(options.given)))} means nothing with --method vanilla, which drops no tokens"
            )
        return None
    kind = _kind(name)
    with user_input():
        return kind(**_arguments(name, option_names(kind), options.given))


def _kind(name: str) -> type[Method]:
    if name not in NAMES:
        raise InputError(f"method {name!r} is not one of {', '.join([*NAMES, VANILLA])}")
    return NAMES[name]


def option_names(kind: type[Method]) -> set[str]:
    """The options of a method: the arguments of its class."""
    return {entry.name for entry in fields(kind) if entry.init}


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
    """The method that one word names with its options; None for vanilla.

    >>> parse_method("pyramiddrop:lam=0.6,stages=4")
    >>> parse_method("fastv:layer=2,keep=0.4")
    >>> parse_method("pyramiddrop:layers=2/4/6,keep=0.5/0.25/0.125")

    Every field of the method's class is an option; `read_words` says how they are written.

    Raises:
        InputError: for an unknown method, an option that the method does not have, or a bad value.
    """
    name, given = read_words(text)
    if name == VANILLA:
        if given:
            raise InputError(f"vanilla drops no tokens and has no options; got {text!r}")
        return None
    kind = _kind(name)
    _check_options(name, option_names(kind), given)
    hints = get_type_hints(kind)
    with user_input(f"method {text!r}"):
        return kind(**{option: _typed(text, option, values, hints[option]) for option, values in given.items()})


def read_words(text: str) -> tuple[str, dict[str, list[str]]]:
    """The name of a method and its options, each with its values: `pyramiddrop:layers=8/16,keep=0.5/0.25`.

    Between options stand commas or colons, in lists slashes or commas: what has no `=` goes on with the list before.

    Raises:
        InputError: for an option without a value, or one that is given twice.
    """
    name, *pieces = re.split("[:,]", text)
    given: dict[str, list[str]] = {}
    for piece in pieces:
        option, equals, value = piece.partition("=")
        if not equals and not given:
            raise InputError(f"{piece!r} in {text!r} is no option of a method; write e.g. fastv:layer=3,keep=0.25")
        if not equals:
            given[next(reversed(given))] += piece.split("/")
        elif option in given:
            raise InputError(f"{text!r} gives {option} twice")
        else:
            given[option] = value.split("/")
    return name, given


def method_label(method: Method) -> str:
    """The Python expression, without what is as the method's default has it."""
    told = method.settings()
    changed = [entry.name for entry in fields(method) if entry.init and getattr(method, entry.name) != entry.default]
    settings = ", ".join(f"{name}={told[name]!r}" for name in changed)
    return type(method).__name__ + (f"({settings})" if settings else "")


def _typed(text: str, option: str, values: list[str], hint: Any) -> Any:
    """`values` as a field of this type holds them: as the first of the types that can be made of them."""
    value = "/".join(values)
    kinds = get_args(hint) if isinstance(hint, UnionType) else (hint,)
    readers = [_reader(kind) for kind in kinds if kind in READERS or get_origin(kind) is Sequence]
    for _, made in readers:
        with suppress(ValueError):
            return made(value)
    raise InputError(f"{option} in {text!r} must be {', or '.join(what for what, _ in readers)}; got {value!r}")


def _reader(kind: Any) -> Reader:
    """What a value of this type is, for people, and how it is made of text."""
    if get_origin(kind) is not Sequence:
        return READERS[kind]
    what, made = READERS[get_args(kind)[0]]
    return f"{what}, or several with slashes between them", lambda text: [made(part) for part in text.split("/")]


def _one_of(words: dict[str, Any], text: str) -> Any:
    if text.lower() not in words:
        raise ValueError(text)
    return words[text.lower()]


Reader = tuple[str, Callable[[str], Any]]
READERS: dict[Any, Reader] = {
    int: ("a whole number", int),
    float: ("a number", float),
    bool: ("true or false", partial(_one_of, {"true": True, "false": False})),
    NoneType: ("none", partial(_one_of, {"none": None})),
    str: ("text", str),
}


def _arguments(name: str, known: set[str], given: dict[str, Any]) -> dict[str, Any]:
    _check_options(name, known, given)
    arguments = dict(given)
    if "layers" in arguments:
        arguments["layers"] = numbers("layers", arguments["layers"], int)
    if "keep" in arguments:
        keep = numbers("keep", arguments["keep"], float)
        arguments["keep"] = keep if "layers" in known else _only(keep)
    return arguments


def _check_options(name: str, known: set[str], given: Collection[str]) -> None:
    for option in given:
        if option not in known:
            raise InputError(f"--{_dashed(option)} does not belong to the method {name!r}")
    for option, stronger in OVERRULED:
        if option in given and stronger in given:
            raise InputError(f"give --{option} or --{stronger}, not both")


def _dashed(option: str) -> str:
    """An option as a command line has it."""
    return option.replace("_", "-")


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
