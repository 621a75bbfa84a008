"""Choose the methods to measure, and predict the cost of each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pyramiddrop.cost import DecoderShape, ModelShape, Prompt, head_flops
from pyramiddrop.inference import InputError
from pyramiddrop.inference.sizes import MethodCost, Sizes, method_costs, published_costs

PUBLISHED = ("pyramiddrop", "fastv")


@dataclass(frozen=True)
class Predicted:
    """The cost model's prediction for a prefill of the whole batch.

    Attributes:
        flops: FLOPs of the decoder's layers and of ranking, with attention over all pairs of rows.
        causal_flops: the same with attention over each row and those before it, as a causal kernel computes it.
    """

    flops: int
    causal_flops: int
    kv_bytes: int


def choose_variants(
    words: Sequence[str], shape: DecoderShape, prompt: Prompt, tell: Callable[[str], None] = lambda reason: None
) -> list[MethodCost]:
    """Vanilla, then the methods in `words` (such as `fastv:layer=3`); by default, the published ones that the model
    allows; `tell` is called with the reason if one is left out. Raises InputError for an unknown method, option or
    value, one that does not fit the model, or one that is named twice."""
    sizes = Sizes("", ModelShape(shape), prompt)
    if not words:
        variants, left_out = published_costs(PUBLISHED, {}, sizes)
        for reason in left_out:
            tell(reason)
        return variants
    variants = method_costs(words, {}, sizes)
    labels = [variant.label for variant in variants]
    if twice := [label for label in labels if labels.count(label) > 1]:
        raise InputError(f"{twice[0]} would be measured twice; name each method once")
    if len(variants) == 1:
        raise InputError("vanilla is always measured; name a method to set beside it")
    return variants


def predict(variant: MethodCost, shape: DecoderShape, prompt: Prompt, batch: int) -> Predicted:
    """Predict the cost of a prefill of `batch` equal samples."""
    flops = variant.cost.full.pruned
    # Of the pairs of rows, a causal kernel skips those whose key comes after the query.
    skipped = _attention(shape, [rows * (rows - 1) // 2 for rows in rows_by_layer(variant, prompt)])
    return Predicted(batch * flops, batch * (flops - skipped), batch * variant.cost.kv_bytes)


def predict_step(
    variant: MethodCost,
    shape: DecoderShape,
    prompt: Prompt,
    batch: int,
    kept_logits: bool,
    checkpointing: bool,
    frozen: bool = False,
) -> int:
    """FLOPs of a training step on `batch` equal samples: layers, ranking and head; a backward counts as two forwards.

    With `frozen` weights, the backward of a matrix counts as one forward (the gradient of its input), and that of
    attention as two. The few adapters around frozen weights are not counted.

    Checkpointing repeats the layers' forward, except the MLP's last product, of which the backward needs only the
    factors. Ranking and head are not repeated.
    """
    rows = rows_by_layer(variant, prompt)
    spared = _attention(shape, [one * one for one in rows]) - variant.cost.full.decoder if frozen else 0
    decoder = 3 * variant.cost.full.decoder + spared
    if checkpointing:
        visual = variant.cost.visual_by_layer
        last = sum(2 * shape.hidden * shape.mlp_values(layer, rows[layer], visual[layer]) for layer in range(len(rows)))
        decoder += variant.cost.full.decoder - last
    head = (2 if frozen else 3) * head_flops(shape, rows[-1] if kept_logits else rows[0])
    return batch * (decoder + variant.cost.full.ranking + head)


def _attention(shape: DecoderShape, pairs: Sequence[int]) -> int:
    """FLOPs of attention's two products over so many pairs of rows in each layer."""
    mixers = map(shape.mixer, range(len(pairs)))
    return sum(2 * count * (one.query_width + one.value_width) for one, count in zip(mixers, pairs, strict=True))


def rows_by_layer(variant: MethodCost, prompt: Prompt) -> list[int]:
    """The number of rows of one sample in each layer."""
    return [visual + prompt.text_tokens for visual in variant.cost.visual_by_layer]
