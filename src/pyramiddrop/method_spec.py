"""Parse a method in words, such as `fastv:layer=2,keep=0.5`."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import fields
from functools import partial
from types import NoneType, UnionType
from typing import Any, get_args, get_origin, get_type_hints

from pyramiddrop.methods import Downsample, FastV, Method, PyramidDrop, RandomDrop, UniformDrop, VisionDrop

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


def parse_method_spec(text: str) -> Method:
    """The method that one word names with its options.

    >>> parse_method_spec("pyramiddrop:lam=0.6,stages=4")
    >>> parse_method_spec("fastv:layer=2,keep=0.4")
    >>> parse_method_spec("pyramiddrop:layers=2/4/6,keep=0.5/0.25/0.125")

    Every field of the method's class is an option; `read_words` says how they are written.

    Raises:
        ValueError: for an unknown method, an option that the method does not have, or a bad value.
    """
    name, given = read_words(text)
    if name not in NAMES:
        raise ValueError(f"method {name!r} is not one of {', '.join(NAMES)}")
    kind = NAMES[name]
    check_options(name, option_names(kind), given)
    hints = get_type_hints(kind)
    values = {option: _typed(text, option, words, hints[option]) for option, words in given.items()}
    try:
        return kind(**values)
    except ValueError as error:
        raise ValueError(f"method {text!r}: {error}") from error


def read_words(text: str) -> tuple[str, dict[str, list[str]]]:
    """The name of a method and its options, each with its values: `pyramiddrop:layers=8/16,keep=0.5/0.25`.

    Between options stand commas or colons, in lists slashes or commas: what has no `=` goes on with the list before.

    Raises:
        ValueError: for an option without a value, or one that is given twice.
    """
    name, *pieces = re.split("[:,]", text)
    given: dict[str, list[str]] = {}
    for piece in pieces:
        option, equals, value = piece.partition("=")
        if not equals and not given:
            raise ValueError(f"{piece!r} in {text!r} is no option of a method; write e.g. fastv:layer=3,keep=0.25")
        if not equals:
            given[next(reversed(given))] += piece.split("/")
        elif option in given:
            raise ValueError(f"{text!r} gives {option} twice")
        else:
            given[option] = value.split("/")
    return name, given


def option_names(kind: type[Method]) -> set[str]:
    """The options of a method: the arguments of its class."""
    return {entry.name for entry in fields(kind) if entry.init}


def check_options(name: str, known: set[str], given: Collection[str]) -> None:
    for option in given:
        if option not in known:
            raise ValueError(f"--{dashed(option)} does not belong to the method {name!r}")
    for option, stronger in OVERRULED:
        if option in given and stronger in given:
            raise ValueError(f"give --{option} or --{stronger}, not both")


def dashed(option: str) -> str:
    """An option as a command line has it."""
    return option.replace("_", "-")


def _typed(text: str, option: str, values: list[str], hint: Any) -> Any:
    """`values` as a field of this type holds them: as the first of the types that can be made of them."""
    value = "/".join(values)
    kinds = get_args(hint) if isinstance(hint, UnionType) else (hint,)
    readers = [_reader(kind) for kind in kinds if kind in READERS or get_origin(kind) is Sequence]
    for _, made in readers:
        with suppress(ValueError):
            return made(value)
    raise ValueError(f"{option} in {text!r} must be {', or '.join(what for what, _ in readers)}; got {value!r}")


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
