"""FLOPs of prefill, decode step, ranking, vision tower and head; a multiply-add counts as 2.

Attention counts all pairs of rows, as `torch.utils.flop_counter` does and as kernels compute that are given a mask; a
causal kernel may skip up to half of them. What is no matrix product (norms, softmax, activations, embeddings) is not
counted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pyramiddrop.cost.mixers import Mixer
from pyramiddrop.cost.shapes import DecoderShape, Prompt, VisionShape


@dataclass(frozen=True)
class DropCounts:
    """Token counts at one drop of one sample; what its ranking costs depends on these.

    Attributes:
        layer: the 0-based layer before which tokens are dropped.
        rows: rows present, text among them.
        visual: visual tokens among them.
        kept: how many of these are kept.
        queries: query tokens: the prompt's last one, or one for each answer in training.
        instruction: tokens of the instruction.
    """

    layer: int
    rows: int
    visual: int
    kept: int
    queries: int = 1
    instruction: int = 1


#: FLOPs of ranking at one drop.
RankingCost = Callable[[DecoderShape, DropCounts], int]


def layer_flops(shape: DecoderShape, rows: int, layer: int = 0, keys: int | None = None, visual: int = 0) -> int:
    """The 0-based decoder `layer` over `rows` rows: what each row goes through, attention over all pairs, MLP.

    Args:
        keys: rows that are attended to, where they are those of an earlier layer.
        visual: visual tokens among the rows, which matters where they have experts of their own.
    """
    mixer = shape.mixer(layer)
    attention = _attention_flops(mixer, rows, rows if keys is None else keys)
    return _rows_flops(shape, layer, rows, visual) + attention + _filled(mixer, rows) * mixer.scan


def ranking_flops(shape: DecoderShape, rows: int, queries: int = 1) -> int:
    """Ranking `rows` rows by attention: what `projecting_flops` counts, and the products of queries and keys."""
    return projecting_flops(shape, rows, queries) + 2 * queries * rows * shape.ranking_mixer.query_width


def projecting_flops(shape: DecoderShape, rows: int, queries: int = 1) -> int:
    """The keys of `rows` rows, and the asking rows' queries."""
    mixer = shape.ranking_mixer
    return 2 * (rows * mixer.keys + queries * mixer.queries)


def attention_ranking_flops(shape: DecoderShape, drop: DropCounts) -> int:
    """Ranking by the attention of the query tokens."""
    return ranking_flops(shape, drop.rows, drop.queries)


def merging_flops(shape: DecoderShape, drop: DropCounts) -> int:
    """Comparing all rows with the kept ones, to find for each dropped visual token the most similar kept one."""
    return 2 * drop.rows * (drop.rows - drop.visual + drop.kept) * shape.hidden


def prefill_flops(
    shape: DecoderShape, lengths: Sequence[int], ranked: Sequence[int] = (), visual: Sequence[int] = ()
) -> int:
    """A prefill of one sample, without the head: `lengths` rows in each layer, `visual` tokens of them (none where
    nothing is said), and `ranked` rows at each ranking by attention."""
    layers = sum(
        layer_flops(shape, rows, layer, _attended(shape, layer, lengths), visual[layer] if visual else 0)
        for layer, rows in enumerate(lengths)
    )
    return layers + sum(ranking_flops(shape, rows) for rows in ranked)


def head_flops(shape: DecoderShape, rows: int = 1) -> int:
    """The language-model head over `rows` rows; `generate` computes it for the prompt's last row alone."""
    return 2 * rows * shape.hidden * shape.vocabulary


def step_flops(shape: DecoderShape, cached: Sequence[int]) -> int:
    """One decode step, head included, with `cached` rows in the KV cache of each layer before it; of those a layer with
    a window holds the last ones alone."""
    return head_flops(shape) + sum(
        _layer_step(shape, layer, _attended(shape, layer, cached)) for layer in range(len(cached))
    )


def _attended(shape: DecoderShape, layer: int, rows: Sequence[int]) -> int:
    """Of `rows` in each layer, those to which `layer` attends."""
    return rows[shape.source(layer)]


def _layer_step(shape: DecoderShape, layer: int, cached: int) -> int:
    mixer = shape.mixer(layer)
    return _rows_flops(shape, layer, 1) + _attention_flops(mixer, 1, mixer.held(cached) + 1) + mixer.step


def _attention_flops(mixer: Mixer, queries: int, keys: int) -> int:
    """Of so many rows that attend to so many: expanding the keys and values, and the products with them."""
    products = queries * keys * (mixer.query_width + mixer.value_width)
    return 2 * (keys * mixer.expansion + products)


def _filled(mixer: Mixer, rows: int) -> int:
    return -(-rows // mixer.chunk) * mixer.chunk


def vision_flops(shape: VisionShape, prompt: Prompt) -> int:
    """The vision tower over all crops of `prompt`."""
    crops, tokens = _crops(shape, prompt)
    patches = tokens * shape.rows_per_token
    rows = patches + shape.extra_rows
    matrices = 4 * shape.hidden + (3 if shape.gated else 2) * shape.intermediate
    windowed = shape.layers - shape.full_layers if shape.window else 0
    pairs = (shape.layers - windowed) * rows * rows + windowed * rows * min(rows, shape.window)
    embedding = 2 * patches * shape.patch_values * shape.hidden
    return crops * (embedding + 2 * shape.layers * rows * shape.hidden * matrices + 4 * pairs * shape.hidden)


def projector_flops(shape: VisionShape, prompt: Prompt) -> int:
    """The projector over all visual tokens, those included that LLaVA-NeXT cuts off after it."""
    crops, tokens = _crops(shape, prompt)
    return 2 * crops * tokens * sum(into * out for into, out in shape.projector)


def _crops(shape: VisionShape, prompt: Prompt) -> tuple[int, int]:
    """How many crops, and the visual tokens of each."""
    if shape.crop_tokens is None:
        crops = prompt.crops or 1
        return crops, prompt.visual_tokens // crops
    return prompt.crops or -(-prompt.visual_tokens // shape.crop_tokens), shape.crop_tokens


def _rows_flops(shape: DecoderShape, layer: int, rows: int, visual: int = 0) -> int:
    """What so many rows cost in `layer`, without what each costs for there being others."""
    mixer, experts = shape.mixer(layer), shape.experts_of(layer)
    gate = bool(experts and experts.shared and experts.shared_gate)
    routing = shape.hidden * (experts.count + gate) if experts else 0
    mlp = shape.matrices * shape.hidden * shape.mlp_values(layer, rows, visual)
    return 2 * (rows * (mixer.inputs + mixer.output + routing + shape.further_weights(layer)) + mlp)
