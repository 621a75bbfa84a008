"""Choose the methods of an evaluation, and solve their keep ratios for a percentage of vanilla's FLOPs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from pyramiddrop.cost import DecoderShape, ModelShape, Prompt, account, by_attention
from pyramiddrop.hf import attachment_of
from pyramiddrop.inference.errors import InputError
from pyramiddrop.inference.resolve import parse_method, saved_method
from pyramiddrop.method_spec import VANILLA, method_label
from pyramiddrop.methods import Method
from pyramiddrop.planning.solve import largest, shortest
from pyramiddrop.speed.predicted import PUBLISHED


def at_budget(
    method: Method,
    percent: float,
    shape: DecoderShape,
    prompts: Sequence[Prompt],
    layers: Sequence[int] | None = None,
) -> Method:
    """`method` with its shares solved so that all `prompts` together cost `percent` of vanilla, or just less.

    What is counted are the decoder's layers and the ranking. Solved is λ, or the share of a method that has but one;
    where shares were given for several drops, they are scaled alike. One token more would cost more than the budget.

    Args:
        shape: of the model's decoder.
        prompts: what is asked; those of one size count as often as they come.
        layers: before which the method drops in this model, where that is not what its depth alone says.

    Raises:
        InputError: for a percentage that is none, a method that has no share to solve, or a budget out of its reach.
    """
    check_percent(percent)
    counted = Counter(prompts)
    limit = percent / 100 * decoder_flops(None, shape, counted)
    scaled = _scaled(method)

    def spent(share: float) -> int:
        return decoder_flops(scaled(share), shape, counted, layers)

    if spent(1.0) <= limit:
        return scaled(1.0)
    least = 1 / (2 * max(prompt.visual_tokens for prompt in counted))  # leaves one token everywhere
    if spent(least) > limit:
        reached = 100 * spent(least) / decoder_flops(None, shape, counted)
        raise InputError(
            f"{percent:g} % of vanilla's decoder FLOPs is out of reach of {type(method).__name__}: "
            f"the least that it can spend here is {reached:.1f} %"
        )
    share = largest(lambda share: spent(share) <= limit, least, 1.0)
    return scaled(shortest(share, lambda short: spent(short) == spent(share)))


def check_percent(percent: float) -> None:
    """Raise InputError for what is no percentage of a cost."""
    if not 0 < percent <= 100:
        raise InputError(f"--percent must be above 0 and at most 100; got {percent:g}")


def decoder_flops(
    method: Method | None,
    shape: DecoderShape,
    prompts: Mapping[Prompt, int],
    layers: Sequence[int] | None = None,
) -> int:
    """FLOPs of the decoder's layers and the ranking over all `prompts`, each as often as it says."""
    schedule = method.schedule(shape.layers, layers) if method else None
    choosing = method.choosing_flops if method else by_attention
    costs = {prompt: account(ModelShape(shape), prompt, schedule, choosing).full for prompt in prompts}
    return sum(count * (costs[prompt].decoder + costs[prompt].ranking) for prompt, count in prompts.items())


def _scaled(method: Method) -> Callable[[float], Method]:
    """The method at a share in (0, 1]: 1 keeps all that it can keep."""
    settings: Any = method
    keep = getattr(method, "keep", None)
    if isinstance(keep, Sequence):
        most = max(keep)
        return lambda share: replace(settings, keep=[ratio / most * share for ratio in keep])
    name = "lam" if keep is None else "keep"
    if not hasattr(method, name):
        raise InputError(f"{type(method).__name__} has no share to solve for --percent")
    return lambda share: replace(settings, **{name: share})


def choose_methods(words: Sequence[str], source: str) -> list[Method]:
    """The methods that `words` name; vanilla, which always runs, is not among them.

    Without any word: the method saved beside the checkpoint `source`, or else those published.

    Raises:
        InputError: for an unknown method, option or value, or a method that is named twice.
    """
    saved = None if words else saved_method(source)
    if saved is not None:
        return [saved]
    methods = [method for method in map(parse_method, words or PUBLISHED) if method is not None]
    if len(methods) < len(words) - 1:
        raise InputError(f"{VANILLA} is named twice; it always runs, once")
    labels = [method_label(method) for method in methods]
    for label in labels:
        if labels.count(label) > 1:
            raise InputError(f"{label} is named twice")
    return methods


def drop_layers(model: Any, method: Method) -> tuple[int, ...]:
    """The layers before which `method` drops in `model`, where it also sees whether it can work there.

    Raises:
        UnsupportedModelError, ValueError: where it cannot.
    """
    with method(model):
        attachment = attachment_of(model)
        assert attachment is not None
        return attachment.rules.schedule.layers
