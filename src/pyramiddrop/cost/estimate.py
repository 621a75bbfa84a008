"""FLOPs and bytes of one prompt under one schedule, by every convention, and the formulas of their parts.

A multiply-add counts as 2 FLOPs. Attention counts all pairs of rows, as `torch.utils.flop_counter` does and as kernels
with a mask compute; a causal kernel may skip up to half of them. Only matrix products are counted: no norms, softmax,
activations or embeddings. What a scorer costs is its `flops`, in `scoring/`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from pyramiddrop.cost.mixers import Mixer
from pyramiddrop.cost.shapes import BYTES, DecoderShape, ModelShape, Prompt, VisionShape
from pyramiddrop.schedule import Schedule

CONVENTIONS = ("full", "paper", "fastv")


@dataclass(frozen=True)
class Cost:
    """FLOPs of the decoder's layers over one prefill and bytes of the KV cache after it, with and without dropping.

    A multiply-add counts as 2 FLOPs. Text and visual rows, ranking and the padding of a batch are counted. The vision
    tower, the embeddings and the language-model head are not, because dropping does not change them.
    """

    flops: int
    vanilla_flops: int
    kv_bytes: int
    vanilla_kv_bytes: int

    @property
    def flops_ratio(self) -> float:
        """FLOPs of the prefill as a share of vanilla's."""
        return self.flops / self.vanilla_flops if self.vanilla_flops else 1.0

    @property
    def kv_ratio(self) -> float:
        """Bytes of KV cache as a share of vanilla's."""
        return self.kv_bytes / self.vanilla_kv_bytes if self.vanilla_kv_bytes else 1.0


@dataclass(frozen=True)
class Parts:
    """True FLOPs of the parts of a model in one prefill: the decoder's layers, the ranking at the drops, the
    language-model head over the last row, the vision tower and the projector behind it (0 if their sizes are unknown).
    """

    decoder: int
    ranking: int
    head: int
    vision: int
    projector: int

    @property
    def pruned(self) -> int:
        """The parts that dropping inside the decoder changes: its layers and the ranking."""
        return self.decoder + self.ranking

    @property
    def total(self) -> int:
        """The sum of all parts."""
        return self.decoder + self.ranking + self.head + self.vision + self.projector


@dataclass(frozen=True)
class CostBreakdown:
    """The cost of one prompt under one schedule.

    Attributes:
        full: true FLOPs of the prefill.
        paper, fastv: FLOPs by the published conventions (multiply-adds, visual tokens alone).
        step_flops: true FLOPs of the first decode step, head included.
        kv_by_layer: bytes of each layer's KV cache after the prefill.
        activation_bytes: estimated peak of an inference prefill, in bytes.
    """

    visual_by_layer: tuple[int, ...]
    full: Parts
    paper: int
    fastv: int
    step_flops: int
    kv_by_layer: tuple[int, ...]
    activation_bytes: int

    @property
    def average_tokens(self) -> float:
        """Visual tokens in a layer, averaged over the layers."""
        return sum(self.visual_by_layer) / len(self.visual_by_layer)

    @property
    def kv_bytes(self) -> int:
        """Bytes of the KV cache of all layers."""
        return sum(self.kv_by_layer)

    def flops(self, convention: str) -> int:
        """FLOPs of the prefill by `convention`: "full", "paper" or "fastv"."""
        return {"full": self.full.total, "paper": self.paper, "fastv": self.fastv}[convention]

    def as_dict(self) -> dict[str, Any]:
        """All FLOPs and bytes as plain numbers."""
        return {
            "average_visual_tokens": self.average_tokens,
            "visual_tokens_by_layer": list(self.visual_by_layer),
            "flops": {name: self.flops(name) for name in CONVENTIONS},
            "full_parts": asdict(self.full),
            "decode_step_flops": self.step_flops,
            "kv_bytes": self.kv_bytes,
            "kv_bytes_by_layer": list(self.kv_by_layer),
            "activation_bytes": self.activation_bytes,
        }


@dataclass(frozen=True)
class DropCounts:
    """Token counts at one drop of one sample, on which the cost of its ranking depends.

    Attributes:
        layer: the 0-based layer before which tokens are dropped.
        rows, visual: numbers of rows before the drop, text included, and of visual tokens among them.
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
    filled = -(-rows // mixer.chunk) * mixer.chunk
    return _rows_flops(shape, layer, rows, visual) + attention + filled * mixer.scan


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
        ranked: number of rows at each ranking by attention.
        visual: number of visual tokens among the rows of each layer; empty: none.
    """
    layers = sum(
        layer_flops(shape, rows, layer, lengths[shape.source(layer)], visual[layer] if visual else 0)
        for layer, rows in enumerate(lengths)
    )
    return layers + sum(ranking_flops(shape, rows) for rows in ranked)


def head_flops(shape: DecoderShape, rows: int = 1) -> int:
    """FLOPs of the language-model head over `rows` rows; `generate` computes it for the prompt's last row alone."""
    return 2 * rows * shape.hidden * shape.vocabulary


def step_flops(shape: DecoderShape, cached: Sequence[int]) -> int:
    """FLOPs of one decode step, head included, after `cached` rows in each layer, of which a layer with a window holds
    the last ones alone."""
    flops = head_flops(shape)
    for layer in range(len(cached)):
        mixer, held = shape.mixer(layer), shape.mixer(layer).held(cached[shape.source(layer)])
        flops += _rows_flops(shape, layer, 1) + _attention_flops(mixer, 1, held + 1) + mixer.step
    return flops


def _attention_flops(mixer: Mixer, queries: int, keys: int) -> int:
    """FLOPs of attention: expanding the cached keys and values, and the products with them."""
    return 2 * keys * (mixer.expansion + queries * (mixer.query_width + mixer.value_width))


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
    further = shape.further[layer] if shape.further else 0
    mlp = shape.matrices * shape.hidden * shape.mlp_values(layer, rows, visual)
    return 2 * (rows * (mixer.inputs + mixer.output + routing + further) + mlp)


def paper_layer_flops(shape: DecoderShape, visual: int, layer: int = 0) -> int:
    """FLOPs of a layer with n = `visual` tokens by PyramidDrop's formula, 4nd² + 2n²d + 3ndm."""
    return _published(shape, visual, layer, matrices=3)


def fastv_layer_flops(shape: DecoderShape, visual: int, layer: int = 0) -> int:
    """FLOPs of a layer with n = `visual` tokens by FastV's formula, 4nd² + 2n²d + 2ndm."""
    return _published(shape, visual, layer, matrices=2)


def _published(shape: DecoderShape, visual: int, layer: int, matrices: int) -> int:
    hidden = shape.hidden
    return visual * hidden * (4 * hidden + 2 * visual + matrices * shape.mlp_width(layer, visual=True))


def layer_kv_bytes(shape: DecoderShape, rows: int, layer: int = 0) -> int:
    """Bytes in the cache of the 0-based `layer` after `rows` rows.

    A recurrent layer caches its state alone, and a layer with a window the last rows alone.
    """
    mixer = shape.mixer(layer)
    values = mixer.cached * mixer.held(rows) + mixer.state
    return shape.bytes_per_value * values + BYTES["float32"] * mixer.float_state


def kv_bytes(shape: DecoderShape, lengths: Sequence[int]) -> int:
    """Bytes of one sample's KV cache with `lengths` rows in the layers."""
    return sum(layer_kv_bytes(shape, rows, layer) for layer, rows in enumerate(lengths))


def activation_bytes(shape: DecoderShape, lengths: Sequence[int]) -> int:
    """Estimated peak bytes of hidden states in an inference prefill, without weights and cache.

    Each row holds its residual and its normed state, and either queries, keys and values before and after rotation with
    the attention output, or the MLP's gate, up and product. Attention without an S x S matrix is assumed. The first
    stage computes on every token, so dropping does not lower this peak; it lowers what training stores for the backward
    pass.
    """
    widest = 0
    for layer, rows in enumerate(lengths):
        mixer = shape.mixer(layer)
        mixing = mixer.inputs // shape.hidden + mixer.query_width + mixer.key_width + mixer.value_width
        widest = max(widest, rows * (2 * shape.hidden + max(mixing, shape.matrices * shape.mlp_width(layer))))
    return widest * shape.bytes_per_value


def estimate_cost(
    model: ModelShape,
    prompt: Prompt,
    schedule: Schedule | None = None,
    ranking_cost: RankingCost = attention_ranking_flops,
) -> CostBreakdown:
    """Estimate the cost of a prefill of `prompt`.

    Args:
        schedule: the drops; None for vanilla.
        ranking_cost: gives the FLOPs of the ranking at one drop, as `Method.ranking_flops` does.

    Raises:
        ValueError: if the schedule lies beyond the decoder's layers.
    """
    shape = model.decoder
    if schedule is not None:
        schedule.check_depth(shape.layers)
    visual = visual_by_layer(schedule, prompt.visual_tokens, shape.layers)
    rows = [tokens + prompt.text_tokens for tokens in visual]
    return CostBreakdown(
        visual_by_layer=tuple(visual),
        full=Parts(
            decoder=prefill_flops(shape, rows, visual=visual),
            ranking=sum(ranking_cost(shape, drop) for drop in drop_counts(schedule, prompt)),
            head=head_flops(shape),
            vision=vision_flops(model.vision, prompt) if model.vision else 0,
            projector=projector_flops(model.vision, prompt) if model.vision else 0,
        ),
        paper=sum(paper_layer_flops(shape, count, layer) for layer, count in enumerate(visual)),
        fastv=sum(fastv_layer_flops(shape, count, layer) for layer, count in enumerate(visual)),
        step_flops=step_flops(shape, rows),
        kv_by_layer=tuple(layer_kv_bytes(shape, count, layer) for layer, count in enumerate(rows)),
        activation_bytes=activation_bytes(shape, rows),
    )


def visual_by_layer(schedule: Schedule | None, tokens: int, layers: int) -> list[int]:
    """The number of visual tokens, of `tokens` at first, in each of `layers` layers."""
    if schedule is None:
        return [tokens] * layers
    counts = [tokens, *schedule.counts(tokens)]
    return [counts[schedule.stage_of(layer)] for layer in range(layers)]


def drop_counts(schedule: Schedule | None, prompt: Prompt) -> list[DropCounts]:
    """The drops of one sample that rank: those that drop some, but not all, of the visual tokens."""
    found, before = [], prompt.visual_tokens
    for stage in schedule.stages if schedule else ():
        kept = stage.count(prompt.visual_tokens)
        if 0 < kept < before:
            rows = before + prompt.text_tokens
            found.append(DropCounts(stage.layer, rows, before, kept, instruction=prompt.num_queries))
        before = kept
    return found
