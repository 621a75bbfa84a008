"""Parse a method in words, such as `fastv:layer=2,keep=0.5`."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import fields
from functools import partial, reduce
from operator import or_
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from pyramiddrop.methods import (
    METHODS,
    SHARED,
    Downsample,
    FastV,
    Method,
    PyramidDrop,
    RandomDrop,
    UniformDrop,
    VisionDrop,
)

#: The unpatched model.
VANILLA = "vanilla"
#: Short names. The class names in METHODS, as `pyramiddrop.json` spells them, are accepted too.
NAMES: dict[str, type[Method]] = {
    "pyramiddrop": PyramidDrop,
    "fastv": FastV,
    "random": RandomDrop,
    "uniform": UniformDrop,
    "vision": VisionDrop,
    "downsample": Downsample,
}
#: Separates a method before the decoder from one inside it.
BAR = "|"
#: Options that override each other.
OVERRULED = (("lam", "keep"), ("stages", "layers"), ("stages", "keep"))


def parse_method_spec(text: str) -> Method | None:
    """Parse a method's name and options; None for `vanilla`, the unpatched model.

    >>> parse_method_spec("pyramiddrop:lam=0.6,stages=4")
    >>> parse_method_spec("FastV:layer=2,keep=0.4")
    >>> parse_method_spec("pyramiddrop:layers=2/4/6,keep=0.5/0.25/0.125")
    >>> parse_method_spec("vision:keep=0.5 | pyramiddrop:lam=0.5")

    Every argument of the method's class is an option. Commas or colons separate options, slashes or commas the items
    of a list, and a bar a method before the decoder from one inside it.

    Raises:
        ValueError: for an unknown method, an option that the method does not have, or a bad value.
    """
    if BAR in text:
        parts = [part for part in map(parse_method_spec, _parts(text)) if part is not None]
        if len(parts) < len(_parts(text)):
            raise ValueError(f"{VANILLA} drops no tokens and cannot be a part of a composition; got {text!r}")
        with _about(text):
            return reduce(or_, parts)
    name, given = _split(text)
    if name == VANILLA:
        if given:
            raise ValueError(f"{VANILLA} drops no tokens and has no options; got {text!r}")
        return None
    kind = _kind(name)
    known = option_names(kind)
    for option in given:
        if option not in known:
            raise ValueError(f"{option} does not belong to the method {name!r}, which takes {', '.join(sorted(known))}")
    for option, stronger in OVERRULED:
        if option in given and stronger in given:
            raise ValueError(f"give {option} or {stronger}, not both")
    hints = get_type_hints(kind)
    values = {option: _typed(text, option, words, hints[option]) for option, words in given.items()}
    with _about(text):
        return kind(**values)


@contextmanager
def _about(text: str) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise ValueError(f"method {text!r}: {error}") from error


def with_defaults(text: str, options: Mapping[str, str]) -> tuple[str, set[str]]:
    """Add to `text` the `options` that its method has and that `text` does not set.

    Returns:
        The full text, and the names of all `options` that the method has.

    Raises:
        ValueError: for an unknown method.
    """
    full, known = [], set[str]()
    for part, own in _shared_out(text, options):
        name, given = _split(part)
        knows = set() if name == VANILLA else option_names(_kind(name)) & own.keys()
        full.append(_with_options(part, {name: own[name] for name in own if name in knows - given.keys()}))
        known |= knows
    return f" {BAR} ".join(full), known


def with_options(text: str, options: Mapping[str, str]) -> str:
    """Append `options` to `text`.

    In a composition they go to the method inside the decoder; settings of a whole forward go to both methods.
    """
    joined = f" {BAR} ".join(_with_options(part, own) for part, own in _shared_out(text, options))
    return joined if options else text


def _shared_out(text: str, options: Mapping[str, str]) -> list[tuple[str, Mapping[str, str]]]:
    """Each part of a composition with the `options` that apply to it."""
    *before, last = _parts(text)
    shared = {name: value for name, value in options.items() if name in SHARED}
    return [*((part, shared) for part in before), (last, options)]


def _with_options(text: str, options: Mapping[str, str]) -> str:
    return f"{text}:{','.join(f'{name}={value}' for name, value in options.items())}" if options else text


def _parts(text: str) -> list[str]:
    """Split a composition at its bars; a single method gives a list of one."""
    return [part.strip() for part in text.split(BAR)]


def method_label(method: Method) -> str:
    """The method's name in tables: its `repr` without empty parentheses."""
    return repr(method).replace("()", "")


def written_option(value: Any) -> str:
    """The value of an option as text, which `parse_method_spec` reads back: lists with slashes, bools in lower case."""
    if isinstance(value, tuple | list):
        return "/".join(map(written_option, value))
    return str(value).lower() if isinstance(value, bool) else str(value)


def option_names(kind: type[Method]) -> set[str]:
    """The options of a method: the arguments of its class."""
    return {entry.name for entry in fields(kind) if entry.init}


def _split(text: str) -> tuple[str, dict[str, list[str]]]:
    """Split a method's name from its options and their values. A part without `=` continues the list before it."""
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


def _kind(name: str) -> type[Method]:
    found = NAMES.get(name) or METHODS.get(name)
    if found is None:
        raise ValueError(f"method {name!r} is not one of {', '.join([*NAMES, VANILLA])}")
    return found


def _typed(text: str, option: str, values: list[str], hint: Any) -> Any:
    """Convert `values` to the first type of the annotation that accepts them."""
    value = "/".join(values)
    kinds = get_args(hint) if get_origin(hint) in (UnionType, Union) else (hint,)
    readers = [reader for kind in kinds if (reader := _reader(kind))]
    for _, made in readers:
        with suppress(ValueError):
            return made(value)
    raise ValueError(f"{option} in {text!r} must be {', or '.join(what for what, _ in readers)}; got {value!r}")


def _reader(kind: Any) -> Reader | None:
    """A readable name of a type and its parser from text; None if the type cannot be given as text."""
    if get_origin(kind) is Literal:
        return ", ".join(get_args(kind)), partial(_one_of, {word: word for word in get_args(kind)})
    if get_origin(kind) is Sequence:
        what, made = READERS[get_args(kind)[0]]
        return f"{what}, or several with slashes between them", lambda text: [made(part) for part in text.split("/")]
    return READERS.get(kind)


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
