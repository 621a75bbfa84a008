"""Sizes of a decoder layer's token mixer: attention of several kinds, or a recurrent state."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

#: Rows in a chunk of the gated delta rule, in Transformers and in the kernels that it replaces.
DELTA_CHUNK = 64


@dataclass(frozen=True)
class Mixer:
    """Sizes of one layer's token mixer. "Weights" counts the entries of matrices that multiply each row.

    Attributes:
        inputs: weights before the mixing.
        output: weights after it.
        keys: weights among `inputs` and `expansion` that ranking applies to every row.
        queries: weights among `inputs` that ranking applies to a query row.
        expansion: weights that every cached row is multiplied with in each forward.
        query_width: width of a row's queries over all heads; 0 without attention.
        key_width: width of a row's keys over all key heads.
        value_width: width of the attention output over all heads.
        source: the layer whose keys and values are attended to; None: its own.
        cached: values in the cache for each row.
        window: number of rows that a row attends to, itself included (the cache holds one less); 0: no limit.
        state: values in the cache that do not depend on the number of rows, in the cache's dtype.
        float_state: the same in float32.
        scan: further FLOPs of a row in a prefill, whose rows are padded to a multiple of `chunk`.
        step: further FLOPs of a row in a decode step.
    """

    inputs: int
    output: int
    keys: int = 0
    queries: int = 0
    expansion: int = 0
    query_width: int = 0
    key_width: int = 0
    value_width: int = 0
    source: int | None = None
    cached: int = 0
    window: int = 0
    state: int = 0
    float_state: int = 0
    scan: int = 0
    step: int = 0
    chunk: int = 1

    @property
    def ranks(self) -> bool:
        """True if its attention can rank a prompt of any length."""
        return self.query_width > 0 and not self.window

    def held(self, rows: int) -> int:
        """The number of cached rows after `rows` rows."""
        return min(rows, self.window - 1) if self.window else rows


@cache
def grouped_attention(
    hidden: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    *,
    window: int = 0,
    gate: int = 0,
    before: int = 0,
    keys_are_values: bool = False,
    fused: bool = False,
    source: int | None = None,
) -> Mixer:
    """Grouped-query attention.

    Args:
        window: number of rows that a row attends to, itself included; 0: no limit.
        gate: width of the output gate, which a matrix computes (Qwen3.5 and others).
        before: weights before the attention that ranking applies too (Gemma 3n).
        keys_are_values: True if the values are the keys before their rotation (Gemma 4, full layers).
        fused: True if one matrix computes queries, keys and values, so that ranking computes all three.
        source: the earlier layer whose keys and values are attended to, if the layer has none of its own (last layers
            of Gemma 3n and 4).
    """
    queries, keys = heads * head_dim, kv_heads * head_dim
    made = 0 if source is not None else 1 if keys_are_values else 2
    inputs = before + hidden * (queries + gate + made * keys)
    return Mixer(
        inputs=inputs,
        output=hidden * queries,
        keys=inputs if fused else before + min(made, 1) * hidden * keys,
        queries=inputs if fused else before + hidden * (queries + gate),
        query_width=queries,
        key_width=keys,
        value_width=queries,
        source=source,
        cached=0 if source is not None else 2 * keys,
        window=window,
    )


def latent_attention(
    hidden: int, heads: int, query_rank: int | None, latent: int, rotated: int, plain: int, value: int
) -> Mixer:
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434) as Transformers computes it.

    The cache holds compressed keys and values, and each forward expands all of them.

    Args:
        query_rank: width of the compressed queries; None if they are not compressed.
        latent: width of the compressed keys and values.
        rotated: width of a head's queries and keys with rotation; all heads share the rotated keys.
        plain: width of a head's queries and keys without rotation.
        value: width of a head's values.
    """
    queries, values = heads * (rotated + plain), heads * value
    down = hidden * query_rank if query_rank else 0
    compressed = hidden * (latent + rotated)
    expansion = latent * heads * (plain + value)
    return Mixer(
        inputs=down + (query_rank or hidden) * queries + compressed,
        output=values * hidden,
        keys=down + compressed + expansion,
        queries=down + (query_rank or hidden) * queries + compressed + expansion,
        expansion=expansion,
        query_width=queries,
        key_width=queries,
        value_width=values,
        cached=latent + rotated,
    )


def delta_rule(hidden: int, key_heads: int, value_heads: int, key_dim: int, value_dim: int, kernel: int) -> Mixer:
    """The gated delta rule (arXiv 2412.06464) in chunks of 64 rows, after a short convolution of its inputs.

    A row is multiplied with the 64 rows of its chunk (keys with keys, queries with keys, weights with values) and with
    the state (queries, keys and corrections). Solving for the corrections is not a matrix product and is not counted.

    Args:
        kernel: width of the convolution in rows.
    """
    keys, values = key_heads * key_dim, value_heads * value_dim
    convolved = 2 * keys + values
    with_state = 6 * value_heads * key_dim * value_dim
    return Mixer(
        inputs=hidden * (convolved + values + 2 * value_heads) + kernel * convolved,
        output=values * hidden,
        state=kernel * convolved,
        float_state=value_heads * key_dim * value_dim,
        scan=with_state + 2 * DELTA_CHUNK * value_heads * (2 * key_dim + value_dim),
        step=with_state,
        chunk=DELTA_CHUNK,
    )


def short_convolution(hidden: int, kernel: int) -> Mixer:
    """A convolution over the last `kernel` rows, channel by channel, between two gates (LFM2)."""
    return Mixer(inputs=hidden * (3 * hidden + kernel), output=hidden * hidden, state=kernel * hidden)
