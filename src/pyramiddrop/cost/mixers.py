"""The token mixer of a decoder layer, as numbers: attention of several kinds, or a recurrent state."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

#: Rows that the gated delta rule takes at a time, in Transformers and in the kernels that it stands in for.
DELTA_CHUNK = 64


@dataclass(frozen=True)
class Mixer:
    """The sizes of what mixes the rows of one layer. Weights are entries of matrices that each row goes through.

    Attributes:
        inputs: weights in front of the mixing.
        output: weights behind it.
        keys: those of `inputs` and `expansion` that a ranking needs of every row.
        queries: those of them that a ranking needs of an asking row.
        expansion: weights that every row of the cache goes through again in each forward.
        query_width: numbers of a row's queries, over all heads; 0 where nothing attends.
        key_width: numbers of a row's keys, over all key heads.
        value_width: numbers of what attention gives a row, over all heads.
        source: the layer whose keys and values are attended to, where they are not its own.
        cached: numbers that the cache holds of a row.
        window: how far a row sees, itself included, and one more than the rows that the cache holds; 0 without limit.
        state: numbers that the cache holds however many rows there are, in the cache's dtype.
        float_state: the same in float32.
        scan: FLOPs of a row beside its weights, in a prefill, whose rows are filled up to a multiple of `chunk`.
        step: the same in a decode step.
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
        """Whether its attention can rank a prompt of any length."""
        return self.query_width > 0 and not self.window

    def held(self, rows: int) -> int:
        """Of `rows` rows, those that the cache holds."""
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
    """Attention with key heads that groups of query heads share.

    Args:
        window: how far a row sees, itself included; 0 without limit.
        gate: numbers of a row's gate of the output, which a matrix makes (Qwen3.5 and others).
        before: weights that a row goes through in its layer before the attention, also to be ranked (Gemma 3n).
        keys_are_values: whether values are the keys before their rotation, without a matrix (Gemma 4, full layers).
        fused: whether one matrix makes queries, keys and values, so that a ranking cannot do without the others.
        source: the earlier layer whose keys and values are attended to, where there are none of its own (Gemma 3n
            and 4, last layers).
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
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434) as Transformers computes it: the cache holds what
    keys and values are compressed to, and each forward expands all of it.

    Args:
        query_rank: width that queries are compressed to, or None where they are not.
        latent: width that keys and values are compressed to.
        rotated: numbers of a head's queries and keys with rotation; all heads share rotated keys.
        plain: numbers of a head's queries and keys without rotation.
        value: numbers of a head's values.
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
    """The gated delta rule (arXiv 2412.06464) in chunks of 64 rows, behind a short convolution of its inputs.

    Of a chunk's row it multiplies keys with keys, queries with keys and the weights with the values, 64 of each, and
    queries, keys and corrections with the state. Solving for the corrections is no matrix product and is not counted.

    Args:
        kernel: rows that the convolution sees.
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
