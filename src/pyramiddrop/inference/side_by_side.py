"""Parse several method specifications, to be compared side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from pyramiddrop import Method
from pyramiddrop.cost import Account, account
from pyramiddrop.inference.choice import VANILLA, MethodOptions, choose_method, method_label
from pyramiddrop.inference.errors import InputError, user_input
from pyramiddrop.inference.sizes import Sizes
from pyramiddrop.method_spec import NAMES, read_words

#: Options that are numbers; the others are text, or lists that `choose_method` reads.
NUMBERS: dict[str, type[int] | type[float]] = {"lam": float, "stages": int, "layer": int}


@dataclass(frozen=True)
class Column:
    """One method (None is vanilla), what to call it, and what it costs."""

    label: str
    method: Method | None
    cost: Account


def side_by_side(words: Sequence[str], shared: MethodOptions, sizes: Sizes) -> list[Column]:
    """Vanilla, and the methods that `words` name, each with its own options and the `shared` ones that it knows.

    Raises:
        InputError: for an unknown method or option, a bad value, or a shared option that none of the methods knows.
    """
    stated = [_stated(word) for word in words]
    known = set().union(*(_known(options.method) for options in stated))
    for option in shared.given:
        if option not in known:
            raise InputError(f"--{option} belongs to none of the methods {', '.join(words)}")
    methods = [_method(_with_shared(options, shared), sizes) for options in stated]
    columns = [Column(VANILLA, None, account(sizes.shape, sizes.prompt))]
    return columns + [_column(method, sizes) for method in methods if method is not None]


def published(words: Sequence[str], shared: MethodOptions, sizes: Sizes) -> tuple[list[Column], list[str]]:
    """The same for methods that nobody named: those that this model cannot have are left out. And why they are.

    Raises:
        InputError: where it can have none of them.
    """
    columns, errors = side_by_side([], MethodOptions(), sizes), dict[str, InputError]()
    for word in words:
        try:
            columns += side_by_side([word], shared, sizes)[1:]
        except InputError as error:
            errors[word] = error
    if len(columns) == 1:
        raise next(iter(errors.values()))
    return columns, [f"{NAMES[word].__name__} is left out: {error}" for word, error in errors.items()]


def _stated(word: str) -> MethodOptions:
    """`fastv:layer=3,keep=0.25` as options."""
    with user_input():
        name, values = read_words(word)
    given: dict[str, Any] = {}
    for option, parts in values.items():
        value = ",".join(parts)
        if option not in {field.name for field in fields(MethodOptions)} - {"method"}:
            raise InputError(f"{option!r} in {word!r} is no option of a method; write e.g. fastv:layer=3,keep=0.25")
        try:
            given[option] = NUMBERS.get(option, str)(value)
        except ValueError:
            raise InputError(f"{option} in {word!r} must be a number; got {value!r}") from None
    return MethodOptions(name, **given)


def _known(name: str | None) -> set[str]:
    kind = NAMES.get(name or "")
    return {field.name for field in fields(kind) if field.init} if kind else set()


def _with_shared(options: MethodOptions, shared: MethodOptions) -> MethodOptions:
    known = _known(options.method)
    inherited = {option: value for option, value in shared.given.items() if option in known}
    return MethodOptions(options.method, **(inherited | options.given))


def _method(options: MethodOptions, sizes: Sizes) -> Method | None:
    return choose_method(options, sizes.name, sizes.shape.decoder.layers)


def _column(method: Method, sizes: Sizes) -> Column:
    shape = sizes.shape.decoder
    with user_input():
        attends = method.scorer().needs_attention
        schedule = method.schedule(shape.layers, shape.drop_layers(method.rank_layer, attends))
        shape.check_layers(schedule.layers, method.rank_layer, attends, sizes.prompt)
    cost = account(sizes.shape, sizes.prompt, schedule, method.choosing_flops)
    return Column(method_label(method), method, cost)
