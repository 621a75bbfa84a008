"""Owns the true FLOPs: 2 for each multiply-add of every matrix product of a prefill, of a decode step, of the ranking.

Attention counts all pairs of rows, as `torch.utils.flop_counter` does and as kernels compute that are given a mask; a
causal kernel may skip up to half of them. What is no matrix product (norms, softmax, activations, embeddings) is not
counted.
"""

from __future__ import annotations

from collections.abc import Sequence

from pyramiddrop.cost.shapes import DecoderShape, Prompt, VisionShape


def layer_flops(shape: DecoderShape, rows: int, layer: int = 0) -> int:
    """The 0-based decoder `layer` over `rows` rows: projections, attention over all pairs, MLP."""
    return rows * _row_flops(shape, layer) + 4 * rows * rows * shape.heads * shape.head_dim


def ranking_flops(shape: DecoderShape, rows: int, queries: int = 1) -> int:
    """Ranking `rows` rows by attention: their keys, the asking rows' queries, keys and values, and the products of
    queries and keys."""
    keys = 2 * rows * shape.hidden * shape.kv_heads * shape.head_dim
    asking = 2 * queries * shape.hidden * (shape.heads + 2 * shape.kv_heads) * shape.head_dim
    return keys + asking + 2 * queries * rows * shape.heads * shape.head_dim


def prefill_flops(shape: DecoderShape, lengths: Sequence[int], ranked: Sequence[int] = ()) -> int:
    """A prefill of one sample: `lengths` rows in each layer, `ranked` rows at each ranking. The head is not in it."""
    layers = sum(layer_flops(shape, rows, layer) for layer, rows in enumerate(lengths))
    return layers + sum(ranking_flops(shape, rows) for rows in ranked)


def head_flops(shape: DecoderShape, rows: int = 1) -> int:
    """The language-model head over `rows` rows; `generate` computes it for the prompt's last row alone."""
    return 2 * rows * shape.hidden * shape.vocabulary


def step_flops(shape: DecoderShape, cached: Sequence[int]) -> int:
    """One decode step, head included, with `cached` rows in the KV cache of each layer before it."""
    attention = sum(4 * (rows + 1) * shape.heads * shape.head_dim for rows in cached)
    return attention + sum(_row_flops(shape, layer) for layer in range(len(cached))) + head_flops(shape)


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


def _row_flops(shape: DecoderShape, layer: int) -> int:
    """What one row costs in `layer`, without attention's products."""
    query_width, key_width = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    projections = 2 * shape.hidden * (2 * query_width + 2 * key_width)
    experts = shape.experts_of(layer)
    # The router, and the gate of the shared expert, which is a single column.
    routing = 2 * shape.hidden * (experts.count + (experts.shared > 0)) if experts else 0
    return projections + routing + 6 * shape.hidden * shape.mlp_width(layer)
