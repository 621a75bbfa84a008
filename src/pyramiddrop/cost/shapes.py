"""The numbers that a cost depends on: sizes of a decoder and of a vision tower, and the tokens of a prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pyramiddrop.cost.mixers import Mixer, grouped_attention

#: Bytes of one value, by the dtype's name.
BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "float8": 1}


@dataclass(frozen=True)
class Experts:
    """The mixture-of-experts MLPs of a decoder.

    Attributes:
        count: experts in a layer; the router scores each of them.
        active: experts that are computed for one token.
        intermediate: width of one expert.
        shared: width of the MLPs that every token goes through besides, 0 where there are none.
        shared_gate: whether a gate, a single column, weighs what those give.
        visual: width of an expert of visual tokens, where they have experts of their own, as many; None where not.
        layers: 0-based layers that have experts, the others have the dense MLP; None for all.
    """

    count: int
    active: int
    intermediate: int
    shared: int = 0
    layers: tuple[int, ...] | None = None
    shared_gate: bool = True
    visual: int | None = None


@dataclass(frozen=True)
class DecoderShape:
    """The sizes of a decoder that its cost depends on.

    Attributes:
        layers: number of decoder layers.
        hidden: width of the hidden states.
        intermediate: width of the MLP.
        heads: query heads.
        kv_heads: key and value heads.
        head_dim: width of one head.
        bytes_per_value: of a value in the KV cache (2 for bf16 and fp16).
        vocabulary: rows of the language-model head; 0 leaves the head out.
        experts: where the MLPs are mixtures of experts.
        mixers: of each layer, what mixes its rows; empty: grouped-query attention of the heads above in all.
        widths: of each layer, the width of its dense MLP; empty: `intermediate` in all.
        further: of each layer, the weights that a row goes through beside mixer and MLP; empty: none.
        matrices: of an MLP: 3 with a gate, 2 without.

    Raises:
        ValueError: where `mixers`, `widths` or `further` are not one for each layer.
    """

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    bytes_per_value: int = 2
    vocabulary: int = 0
    experts: Experts | None = None
    mixers: tuple[Mixer, ...] = ()
    widths: tuple[int, ...] = ()
    further: tuple[int, ...] = ()
    matrices: int = 3

    def __post_init__(self) -> None:
        for name in ("mixers", "widths", "further"):
            given = len(getattr(self, name))
            if given not in (0, self.layers):
                raise ValueError(f"{name} must be one for each of the {self.layers} layers; got {given}")

    def mixer(self, layer: int) -> Mixer:
        """What mixes the rows of the 0-based `layer`."""
        return self.mixers[layer] if self.mixers else self.plain_mixer

    def source(self, layer: int) -> int:
        """The layer whose keys the 0-based `layer` attends to: itself, or an earlier one."""
        source = self.mixer(layer).source
        return layer if source is None else source

    @property
    def sources(self) -> tuple[int, ...]:
        """Of each layer the one whose keys it attends to."""
        return tuple(map(self.source, range(self.layers)))

    @property
    def plain_mixer(self) -> Mixer:
        """Grouped-query attention of the shape's heads."""
        return grouped_attention(self.hidden, self.heads, self.kv_heads, self.head_dim)

    @property
    def ranking_mixer(self) -> Mixer:
        """What ranks tokens: attention that sees everything, where there is any; a window that reaches every visual
        token else."""
        attends = [mixer for mixer in self.mixers if mixer.query_width]
        return next((mixer for mixer in attends if mixer.ranks), attends[0] if attends else self.plain_mixer)

    def drop_layers(self, rank_layer: str = "next", attends: bool = True) -> tuple[int, ...]:
        """The layers before which tokens are best dropped, as `pyramiddrop.hf` has it for the model itself: their
        ranking layer attends to everything, and they have keys of their own.

        Args:
            rank_layer: "next" or "last", of the method.
            attends: whether the method ranks by attention.
        """
        possible = self._possible(rank_layer, attends)
        far = [layer for layer in possible if self.mixer(_ranking(layer, rank_layer)).ranks]
        return tuple(far if far and attends else possible)

    def check_layers(self, layers: Sequence[int], rank_layer: str, attends: bool, prompt: Prompt) -> None:
        """Raise ValueError where the model itself would refuse to drop before one of `layers`.

        Args:
            rank_layer: "next" or "last", of the method.
            attends: whether the method ranks by attention.
            prompt: the layer that ranks must see all visual tokens from its end.
        """
        possible = self._possible(rank_layer, attends)
        for layer in layers:
            if not layer:  # before the decoder, whatever its layers
                continue
            if layer not in possible:
                raise ValueError(f"this model cannot drop before layer {layer}; allowed are layers {possible}")
            ranking = _ranking(layer, rank_layer)
            window = self.mixer(ranking).window if attends else 0
            if window and prompt.reach > window:
                raise ValueError(
                    f"layer {ranking}, which would rank, sees {window} tokens, and the visual ones begin "
                    f"{prompt.reach} tokens before the end of the prompt; best are layers "
                    f"{list(self.drop_layers(rank_layer))}"
                )

    def _possible(self, rank_layer: str, attends: bool) -> list[int]:
        """The layers before which the model lets tokens be dropped at all."""
        attention = [layer for layer in range(self.layers) if self.mixer(layer).query_width]
        own = sum(source == layer for layer, source in enumerate(self.sources))
        return [
            layer for layer in range(attention[0] + 1, own) if not attends or _ranking(layer, rank_layer) in attention
        ]

    def experts_of(self, layer: int) -> Experts | None:
        """The experts of the 0-based `layer`, or None where its MLP is dense."""
        experts = self.experts
        return experts if experts and (experts.layers is None or layer in experts.layers) else None

    def mlp_width(self, layer: int, visual: bool = False) -> int:
        """The width of the MLPs that one token, a `visual` one or not, goes through in `layer`: of a mixture the active
        and shared experts."""
        experts = self.experts_of(layer)
        if experts:
            own = experts.visual if visual and experts.visual is not None else experts.intermediate
            return experts.active * own + experts.shared
        return self.widths[layer] if self.widths else self.intermediate

    def mlp_values(self, layer: int, rows: int, visual: int) -> int:
        """Numbers between the matrices of the MLPs that `rows` rows go through in `layer`, `visual` tokens of them."""
        return (rows - visual) * self.mlp_width(layer) + visual * self.mlp_width(layer, visual=True)

    def further_weights(self, layer: int) -> int:
        """The weights that a row goes through in `layer` beside mixer and MLP."""
        return self.further[layer] if self.further else 0


def _ranking(layer: int, rank_layer: str) -> int:
    """The layer that ranks for a drop before `layer`."""
    return layer if rank_layer == "next" else layer - 1


@dataclass(frozen=True)
class VisionShape:
    """The sizes of a vision transformer and of the projector behind it.

    Attributes:
        layers: number of layers that run (Transformers runs all of them, also where an inner one's output is used).
        hidden: width of the hidden states.
        intermediate: width of the MLP.
        patch_values: numbers in one patch of the picture: channels x height x width (x frames).
        projector: (in, out) of the matrices that each visual token goes through on its way to the decoder.
        crop_tokens: visual tokens of one crop of fixed size; None where a picture is one crop of any size.
        rows_per_token: patches that are merged into one visual token.
        extra_rows: rows of a crop beside its patches (CLIP's class token).
        gated: whether the MLP has a gate (three matrices in place of two).
        window: rows that see each other in a layer with windows; 0 where all rows of a crop do.
        full_layers: how many layers have no windows; not used without a window.
    """

    layers: int
    hidden: int
    intermediate: int
    patch_values: int
    projector: tuple[tuple[int, int], ...]
    crop_tokens: int | None = None
    rows_per_token: int = 1
    extra_rows: int = 0
    gated: bool = False
    window: int = 0
    full_layers: int = 0


@dataclass(frozen=True)
class ModelShape:
    """A vision-language model: its decoder, and its vision tower where that is known."""

    decoder: DecoderShape
    vision: VisionShape | None = None


@dataclass(frozen=True)
class Prompt:
    """One sample.

    Attributes:
        visual_tokens: what the pictures bring.
        text_tokens: all others.
        crops: how many crops the vision tower sees; None takes as many as the visual tokens need.
        instruction_tokens: those of the text tokens that stand behind the last visual one; None takes all of them.

    Raises:
        ValueError: for a count below what makes sense.
    """

    visual_tokens: int
    text_tokens: int = 0
    crops: int | None = None
    instruction_tokens: int | None = None

    def __post_init__(self) -> None:
        if self.visual_tokens < 1:
            raise ValueError(f"visual_tokens must be at least 1; got {self.visual_tokens}")
        if self.text_tokens < 0:
            raise ValueError(f"text_tokens must not be negative; got {self.text_tokens}")
        if self.crops is not None and self.crops < 1:
            raise ValueError(f"crops must be at least 1; got {self.crops}")
        if self.instruction_tokens is not None and not 0 <= self.instruction_tokens <= self.text_tokens:
            given = self.instruction_tokens
            raise ValueError(f"instruction_tokens must be from 0 to the {self.text_tokens} text tokens; got {given}")

    @property
    def reach(self) -> int:
        """How far before the end of the prompt the visual tokens begin, as far as that is known."""
        return self.visual_tokens + (self.instruction_tokens or 0)

    @property
    def asking(self) -> int:
        """The tokens that ask where the whole instruction does: where there is none, the prompt's last token."""
        return max(1, self.text_tokens if self.instruction_tokens is None else self.instruction_tokens)
