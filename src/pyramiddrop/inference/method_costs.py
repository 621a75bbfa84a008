"""The costs of vanilla and of methods, given as text, in a model of given sizes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pyramiddrop import Method
from pyramiddrop.cost import CostBreakdown, estimate_cost
from pyramiddrop.inference.errors import InputError, user_input
from pyramiddrop.inference.resolve import resolve_method
from pyramiddrop.inference.sizes import Sizes
from pyramiddrop.method_spec import NAMES, VANILLA, method_label, with_defaults


@dataclass(frozen=True)
class MethodCost:
    """A method (None: vanilla), its label, and its cost."""

    label: str
    method: Method | None
    cost: CostBreakdown


def method_costs(specs: Sequence[str], shared: Mapping[str, str], sizes: Sizes) -> list[MethodCost]:
    """The costs of vanilla and of the methods in `specs`, each with its own options and the `shared` ones that it has.

    Raises:
        InputError: for an unknown method or option, a bad value, or a shared option that no method has.
    """
    with user_input():
        full = [with_defaults(spec, shared) for spec in specs]
    for option in shared:
        if not any(option in known for _, known in full):
            raise InputError(f"--{option} belongs to none of the methods {', '.join(specs)}")
    methods = [resolve_method(spec, sizes.name, sizes.shape.decoder.layers) for spec, _ in full]
    vanilla = MethodCost(VANILLA, None, estimate_cost(sizes.shape, sizes.prompt))
    return [vanilla, *(_method_cost(method, sizes) for method in methods if method is not None)]


def published_costs(
    specs: Sequence[str], shared: Mapping[str, str], sizes: Sizes
) -> tuple[list[MethodCost], list[str]]:
    """`method_costs` of default methods, without those that the model does not allow; and the reasons for these.

    Raises:
        InputError: if the model allows none of them.
    """
    found, errors = method_costs([], {}, sizes), dict[str, InputError]()
    for spec in specs:
        try:
            found += method_costs([spec], shared, sizes)[1:]
        except InputError as error:
            errors[spec] = error
    if len(found) == 1:
        raise next(iter(errors.values()))
    return found, [f"{NAMES[spec].__name__} is left out: {error}" for spec, error in errors.items()]


def _method_cost(method: Method, sizes: Sizes) -> MethodCost:
    shape = sizes.shape.decoder
    with user_input():
        attends = method.scorer().needs_attention
        schedule = method.schedule(shape.layers, shape.drop_layers(method.rank_layer, attends))
        shape.check_layers(schedule.layers, method.rank_layer, attends, sizes.prompt)
    cost = estimate_cost(sizes.shape, sizes.prompt, schedule, method.ranking_flops)
    return MethodCost(method_label(method), method, cost)
