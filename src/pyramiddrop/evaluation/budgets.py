"""Choose the methods of an evaluation, and solve their keep ratios for equal FLOPs or average visual tokens."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from pyramiddrop.cost import DecoderShape, ModelShape, Prompt, attention_ranking_flops, estimate_cost
from pyramiddrop.cost.estimate import visual_by_layer
from pyramiddrop.hf import attachment_of
from pyramiddrop.inference import InputError
from pyramiddrop.inference.checkpoint import Checkpoint
from pyramiddrop.inference.downsampling import split_downsampling
from pyramiddrop.inference.resolve import parse_method, saved_method
from pyramiddrop.method_spec import VANILLA, method_label
from pyramiddrop.methods import (
    Compose,
    Downsample,
    Method,
    PyramidDrop,
    RandomDrop,
    StagedMethod,
    UniformDrop,
    VisionDrop,
)
from pyramiddrop.planning.solve import largest, shortest
from pyramiddrop.speed.predicted import PUBLISHED

#: Seeds of random controls, because a single draw is not a baseline.
DRAWS = (0, 1, 2)


def at_budget(
    method: Method, percent: float, shape: DecoderShape, prompts: Sequence[Prompt], layers: Sequence[int] | None = None
) -> Method:
    """Solve the keep ratios of `method` so that all `prompts` together cost at most `percent` of vanilla.

    The cost is that of the decoder's layers and the ranking. λ is solved, or the keep ratio of a method with a single
    one; given keep ratios of several drops are scaled by one factor. One more token would exceed the budget.

    Args:
        shape: the sizes of the model's decoder.
        prompts: the token counts of each prompt, with their number.
        layers: the method's drop layers in this model, if they differ from those by depth alone.

    Raises:
        InputError: if the percentage is not allowed, the method has no keep ratio to solve, or the budget is out of its
            reach.
    """
    check_percent(percent)
    counted = Counter(prompts)
    vanilla = decoder_flops(None, shape, counted)

    def spent(method: Method) -> float:
        return 100 * decoder_flops(method, shape, counted, layers) / vanilla

    words = (f"{percent:g} % of vanilla's decoder FLOPs", "%")
    return _solve(_scaled(method, "--percent"), spent, percent, words, prompts)


def at_average_tokens(
    method: Method, tokens: float, shape: DecoderShape, prompts: Sequence[Prompt], layers: Sequence[int] | None = None
) -> Method:
    """Solve the keep ratios of `method` so that layers have at most `tokens` visual tokens on average.

    The average is over layers and `prompts`; published tables call it "average tokens". Arguments as for `at_budget`.

    Raises:
        InputError: if the number is not positive, the method has no keep ratio to solve, or the budget is out of its
            reach.
    """
    check_average_tokens(tokens)
    counted = Counter(prompts)

    def spent(method: Method) -> float:
        schedule = method.schedule(shape.layers, layers)
        visual = {prompt: visual_by_layer(schedule, prompt.visual_tokens, shape.layers) for prompt in counted}
        return sum(count * sum(visual[prompt]) for prompt, count in counted.items()) / shape.layers / len(prompts)

    words = (f"an average of {tokens:g} visual tokens a layer", "tokens")
    return _solve(_scaled(method, "--average-tokens"), spent, tokens, words, prompts)


def _solve(
    scaled: Callable[[float], Method],
    spent: Callable[[Method], float],
    limit: float,
    words: tuple[str, str],
    prompts: Sequence[Prompt],
) -> Method:
    """The method at the largest share that costs at most `limit`.

    Args:
        scaled: gives the method at a share in (0, 1].
        words: the budget and its unit, for errors.
    """
    if spent(scaled(1.0)) <= limit:
        return scaled(1.0)
    least = 1 / (2 * max(prompt.visual_tokens for prompt in prompts))  # keeps one token everywhere
    if spent(scaled(least)) > limit:
        budget, unit = words
        raise InputError(
            f"{budget} is out of reach of {type(scaled(least)).__name__}: "
            f"the least that it can spend here is {spent(scaled(least)):.1f} {unit}"
        )
    share = largest(lambda share: spent(scaled(share)) <= limit, least, 1.0)
    return scaled(shortest(share, lambda short: spent(scaled(short)) == spent(scaled(share))))


def check_percent(percent: float) -> None:
    """Raise InputError if `percent` is not a percentage of a cost."""
    if not 0 < percent <= 100:
        raise InputError(f"--percent must be above 0 and at most 100; got {percent:g}")


def check_average_tokens(tokens: float) -> None:
    """Raise InputError if `tokens` is not a number of tokens."""
    if not 0 < tokens < math.inf:
        raise InputError(f"--average-tokens must be above 0; got {tokens:g}")


def decoder_flops(
    method: Method | None, shape: DecoderShape, prompts: Mapping[Prompt, int], layers: Sequence[int] | None = None
) -> int:
    """FLOPs of the decoder's layers and the ranking over all `prompts`, each times its number."""
    schedule = method.schedule(shape.layers, layers) if method else None
    ranking_cost = method.ranking_flops if method else attention_ranking_flops
    costs = {prompt: estimate_cost(ModelShape(shape), prompt, schedule, ranking_cost).full for prompt in prompts}
    return sum(count * costs[prompt].pruned for prompt, count in prompts.items())


def _scaled(method: Method, option: str) -> Callable[[float], Method]:
    """The method at a share in (0, 1] of its largest keep ratios; in a composition, those inside the decoder."""
    settings: Any = method
    if isinstance(method, Compose):
        inside = _scaled(method.parts[1], option)
        return lambda share: replace(settings, inside=inside(share))
    keep = getattr(method, "keep", None)
    if isinstance(keep, Sequence):
        most = max(keep)
        if not most:
            raise InputError(f"{method_label(method)} keeps no visual token: there is no share to solve for {option}")
        return lambda share: replace(settings, keep=[ratio / most * share for ratio in keep])
    name = "lam" if keep is None else "keep"
    if not hasattr(method, name):
        raise InputError(f"{type(method).__name__} has no share to solve for {option}")
    return lambda share: replace(settings, **{name: share})


def choose_methods(words: Sequence[str], source: str) -> list[Method]:
    """The methods in `words`, without vanilla, which always runs.

    By default: the method saved beside the checkpoint `source`, or else the published ones.

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


def control_methods(methods: Sequence[Method]) -> list[Method]:
    """Controls for `methods`: random tokens inside and before the decoder (three draws each), evenly spaced tokens, and
    downsampled pictures. Controls inside the decoder have the drop layers of the first staged method."""
    inside = [method.parts[1] if isinstance(method, Compose) else method for method in methods]
    staged = next((method for method in inside if isinstance(method, StagedMethod)), PyramidDrop())
    shared: dict[str, Any] = {name: getattr(staged, name) for name in ("positions", "layers", "stages", "keep")}
    chance = [RandomDrop(seed=seed, **shared) for seed in DRAWS]
    before = [VisionDrop(score={"name": "random", "seed": seed}, positions=staged.positions) for seed in DRAWS]
    controls = [*chance, UniformDrop(**shared), *before, Downsample(positions=staged.positions)]
    return [control for control in controls if control not in methods]


def drop_layers(checkpoint: Checkpoint, method: Method) -> tuple[int, ...]:
    """The layers before which `method` drops in a model; 0 for downsampled pictures.

    Raises:
        UnsupportedModelError, ValueError: if the model does not support the method.
    """
    share, inside = split_downsampling(method, checkpoint.processor)
    smaller = () if share is None else (0,)
    if inside is None:
        return smaller
    with inside(checkpoint.model):
        attachment = attachment_of(checkpoint.model)
        assert attachment is not None
        return *smaller, *attachment.rules.schedule.layers
