"""FLOPs of prefill, decode step, ranking, vision tower and head; a multiply-add counts as 2.

Attention counts all pairs of rows, as `torch.utils.flop_counter` does and as kernels with a mask compute; a causal
kernel may skip up to half of them. Only matrix products are counted: no norms, softmax, activations or embeddings.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pyramiddrop.cost.mixers import Mixer
from pyramiddrop.cost.shapes import DecoderShape, Prompt, VisionShape


@dataclass(frozen=True)
class DropCounts:
    """Token counts at one drop of one sample, on which the cost of its ranking depends.

    Attributes:
        layer: the 0-based layer before which tokens are dropped.
        rows: number of rows before the drop, text included.
        visual: number of visual tokens among them.
        kept: number of visual tokens that are kept.
        queries: number of query tokens: the prompt's last one, or one for each answer in training.
        instruction: number of instruction tokens.
    """

    layer: int
    rows: int
    visual: int
    kept: int
    queries: int = 1
    instruction: int = 1


#: Gives the FLOPs of ranking at one drop.
RankingCost = Callable[[DecoderShape, DropCounts], int]


def layer_flops(shape: DecoderShape, rows: int, layer: int = 0, keys: int | None = None, visual: int = 0) -> int:
    """FLOPs of the 0-based decoder `layer` over `rows` rows: projections, attention over all pairs, MLP.

    Args:
        keys: number of rows that are attended to, if they are those of an earlier layer.
        visual: number of visual tokens among the rows; it matters if these have experts of their own.
    """
    mixer = shape.mixer(layer)
    attention = _attention_flops(mixer, rows, rows if keys is None else keys)
    return _rows_flops(shape, layer, rows, visual) + attention + _filled(mixer, rows) * mixer.scan


def ranking_flops(shape: DecoderShape, rows: int, queries: int = 1) -> int:
    """FLOPs of ranking `rows` rows by attention: `projecting_flops`, and the products of queries and keys."""
    return projecting_flops(shape, rows, queries) + 2 * queries * rows * shape.ranking_mixer.query_width


def projecting_flops(shape: DecoderShape, rows: int, queries: int = 1) -> int:
    """FLOPs of the keys of `rows` rows and of the queries of the query rows."""
    mixer = shape.ranking_mixer
    return 2 * (rows * mixer.keys + queries * mixer.queries)


def attention_ranking_flops(shape: DecoderShape, drop: DropCounts) -> int:
    """FLOPs of ranking by the attention of the query tokens."""
    return ranking_flops(shape, drop.rows, drop.queries)


def merging_flops(shape: DecoderShape, drop: DropCounts) -> int:
    """FLOPs of comparing all rows with the kept ones to find the most similar kept token of each dropped one."""
    return 2 * drop.rows * (drop.rows - drop.visual + drop.kept) * shape.hidden


def prefill_flops(
    shape: DecoderShape, lengths: Sequence[int], ranked: Sequence[int] = (), visual: Sequence[int] = ()
) -> int:
    """FLOPs of a prefill of one sample, without the head.

    Args:
        lengths: number of rows in each layer.
        visual: number of visual tokens among them; None: none.
        ranked: number of rows at each ranking by attention.
    """
    layers = sum(
        layer_flops(shape, rows, layer, _attended(shape, layer, lengths), visual[layer] if visual else 0)
        for layer, rows in enumerate(lengths)
    )
    return layers + sum(ranking_flops(shape, rows) for rows in ranked)


def head_flops(shape: DecoderShape, rows: int = 1) -> int:
    """FLOPs of the language-model head over `rows` rows; `generate` computes it for the prompt's last row alone."""
    return 2 * rows * shape.hidden * shape.vocabulary


def step_flops(shape: DecoderShape, cached: Sequence[int]) -> int:
    """FLOPs of one decode step, head included, after `cached` rows in each layer, of which a layer with a window holds
    the last ones alone."""
    return head_flops(shape) + sum(
        _layer_step(shape, layer, _attended(shape, layer, cached)) for layer in range(len(cached))
    )


def _attended(shape: DecoderShape, layer: int, rows: Sequence[int]) -> int:
    """The number of rows to which `layer` attends, of `rows` in each layer."""
    return rows[shape.source(layer)]


def _layer_step(shape: DecoderShape, layer: int, cached: int) -> int:
    mixer = shape.mixer(layer)
    return _rows_flops(shape, layer, 1) + _attention_flops(mixer, 1, mixer.held(cached) + 1) + mixer.step


def _attention_flops(mixer: Mixer, queries: int, keys: int) -> int:
    """FLOPs of attention: expanding the cached keys and values, and the products with them."""
    products = queries * keys * (mixer.query_width + mixer.value_width)
    return 2 * (keys * mixer.expansion + products)


def _filled(mixer: Mixer, rows: int) -> int:
    return -(-rows // mixer.chunk) * mixer.chunk


def vision_flops(shape: VisionShape, prompt: Prompt) -> int:
    """FLOPs of the vision tower over all crops of `prompt`."""
    crops, tokens = _crops(shape, prompt)
    patches = tokens * shape.rows_per_token
    rows = patches + shape.extra_rows
    matrices = 4 * shape.hidden + (3 if shape.gated else 2) * shape.intermediate
    windowed = shape.layers - shape.full_layers if shape.window else 0
    pairs = (shape.layers - windowed) * rows * rows + windowed * rows * min(rows, shape.window)
    embedding = 2 * patches * shape.patch_values * shape.hidden
    return crops * (embedding + 2 * shape.layers * rows * shape.hidden * matrices + 4 * pairs * shape.hidden)


def projector_flops(shape: VisionShape, prompt: Prompt) -> int:
    """FLOPs of the projector over all visual tokens, including those that LLaVA-NeXT crops after it."""
    crops, tokens = _crops(shape, prompt)
    return 2 * crops * tokens * sum(into * out for into, out in shape.projector)


def _crops(shape: VisionShape, prompt: Prompt) -> tuple[int, int]:
    """The number of crops, and the visual tokens of each."""
    if shape.crop_tokens is None:
        crops = prompt.crops or 1
        return crops, prompt.visual_tokens // crops
    return prompt.crops or -(-prompt.visual_tokens // shape.crop_tokens), shape.crop_tokens


def _rows_flops(shape: DecoderShape, layer: int, rows: int, visual: int = 0) -> int:
    """FLOPs of `rows` rows in `layer` that do not depend on other rows."""
    mixer, experts = shape.mixer(layer), shape.experts_of(layer)
    gate = bool(experts and experts.shared and experts.shared_gate)
    routing = shape.hidden * (experts.count + gate) if experts else 0
    mlp = shape.matrices * shape.hidden * shape.mlp_values(layer, rows, visual)
    return 2 * (rows * (mixer.inputs + mixer.output + routing + shape.further_weights(layer)) + mlp)
