"""Choose the methods of an evaluation, and solve their keep ratios for equal FLOPs or average visual tokens."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
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


PERCENT, TOKENS = "percent", "average_tokens"


@dataclass(frozen=True)
class Budget:
    """The largest cost of all prompts together: `limit` PERCENT of vanilla's FLOPs, or on average TOKENS in a layer.

    FLOPs are those of the decoder's layers and the ranking. The average of visual tokens is over layers and prompts;
    published tables call it "average tokens". InputError if the limit is not allowed.
    """

    kind: str
    limit: float

    def __post_init__(self) -> None:
        if self.kind == PERCENT and not 0 < self.limit <= 100:
            raise InputError(f"--percent must be above 0 and at most 100; got {self.limit:g}")
        if self.kind == TOKENS and not 0 < self.limit < math.inf:
            raise InputError(f"--average-tokens must be above 0; got {self.limit:g}")

    def solve(
        self, method: Method, shape: DecoderShape, prompts: Sequence[Prompt], layers: Sequence[int] | None = None
    ) -> Method:
        """Solve the keep ratios of `method` for this budget, which one more token would exceed.

        λ is solved, or the keep ratio of a method with a single one; given keep ratios of several drops are scaled by
        one factor. InputError if the method has no keep ratio to solve, or the budget is out of its reach.

        Args:
            layers: the method's drop layers in this model, if they differ from those by depth alone.
        """
        counted = Counter(prompts)
        if self.kind == PERCENT:
            option, unit, words = "--percent", "%", f"{self.limit:g} % of vanilla's decoder FLOPs"
            full = decoder_flops(None, shape, counted)
        else:
            option, unit, words = "--average-tokens", "tokens", f"an average of {self.limit:g} visual tokens a layer"
        scaled = _scaled(method, option)

        def spent(share: float) -> float:
            if self.kind == PERCENT:
                return 100 * decoder_flops(scaled(share), shape, counted, layers) / full
            schedule, depth = scaled(share).schedule(shape.layers, layers), shape.layers
            visual = (n * sum(visual_by_layer(schedule, one.visual_tokens, depth)) for one, n in counted.items())
            return sum(visual) / depth / len(prompts)

        if spent(1.0) <= self.limit:
            return scaled(1.0)
        least = 1 / (2 * max(prompt.visual_tokens for prompt in prompts))  # keeps one token everywhere
        if (lowest := spent(least)) > self.limit:
            name = type(scaled(least)).__name__
            raise InputError(
                f"{words} is out of reach of {name}: the least that it can spend here is {lowest:.1f} {unit}"
            )
        share = largest(lambda share: spent(share) <= self.limit, least, 1.0)
        return scaled(shortest(share, lambda short: spent(short) == spent(share)))


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

    By default: the method saved beside the checkpoint `source`, or else the published ones. InputError for an unknown
    method, option or value, or a method that is named twice.
    """
    if not words and (saved := saved_method(source)) is not None:
        return [saved]
    methods = [method for method in map(parse_method, words or PUBLISHED) if method is not None]
    if len(methods) < len(words) - 1:
        raise InputError(f"{VANILLA} is named twice; it always runs, once")
    for label, count in Counter(map(method_label, methods)).items():
        if count > 1:
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

    UnsupportedModelError or ValueError if the model does not support the method.
    """
    share, inside = split_downsampling(method, checkpoint.processor)
    smaller = () if share is None else (0,)
    if inside is None:
        return smaller
    with inside(checkpoint.model):
        attachment = attachment_of(checkpoint.model)
        assert attachment is not None
        return *smaller, *attachment.rules.schedule.layers
