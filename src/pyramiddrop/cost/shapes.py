"""The inputs of the cost model: sizes of decoders and vision towers, those of well-known models, and prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from pyramiddrop.cost.mixers import Mixer, grouped_attention

#: Bytes of a value, by the dtype's name.
BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "float8": 1}


@dataclass(frozen=True)
class Experts:
    """The mixture-of-experts MLPs of a decoder.

    Attributes:
        count: number of experts in a layer; the router scores each of them.
        active: number of experts that compute one token.
        intermediate: width of an expert.
        shared: width of the shared experts, 0 if there are none.
        shared_gate: True if a gate of one column weighs the output of the shared experts.
        visual: width of an expert of visual tokens, if these have as many of their own; None if not.
        layers: 0-based layers with experts; the others have the dense MLP; None: all.
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
    """The sizes of a decoder on which its cost depends.

    Attributes:
        layers, heads, kv_heads: numbers of decoder layers, query heads, and key and value heads.
        hidden, intermediate, head_dim: widths of the hidden states, the MLP and a head.
        bytes_per_value: bytes of a value in the KV cache (2 for bf16 and fp16).
        vocabulary: rows of the language-model head; 0 leaves the head out.
        experts: the experts, if the MLPs are mixtures of experts.
        mixers: the token mixer of each layer; empty: grouped-query attention of the heads in all.
        widths: the width of each layer's dense MLP; empty: `intermediate` in all.
        further: the weights of each layer that multiply a row beside mixer and MLP; empty: none.
        matrices: number of matrices in an MLP: 3 with a gate, 2 without.

    Raises:
        ValueError: if `mixers`, `widths` or `further` do not have one entry for each layer.
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
        """The token mixer of the 0-based `layer`."""
        return self.mixers[layer] if self.mixers else self.plain_mixer

    def source(self, layer: int) -> int:
        """The layer whose keys the 0-based `layer` attends to: `layer` itself, or an earlier one."""
        source = self.mixer(layer).source
        return layer if source is None else source

    @property
    def sources(self) -> tuple[int, ...]:
        """`source` of each layer."""
        return tuple(map(self.source, range(self.layers)))

    @property
    def plain_mixer(self) -> Mixer:
        """Grouped-query attention of the shape's heads."""
        return grouped_attention(self.hidden, self.heads, self.kv_heads, self.head_dim)

    @property
    def ranking_mixer(self) -> Mixer:
        """The mixer that ranks tokens: one with full attention if there is any, else one with a window."""
        attends = [mixer for mixer in self.mixers if mixer.query_width]
        return next((mixer for mixer in attends if mixer.ranks), attends[0] if attends else self.plain_mixer)

    def drop_layers(
        self, rank_layer: str = "next", attends: bool = True, reads_previous: bool = False
    ) -> tuple[int, ...]:
        """The layers before which tokens are best dropped, as `pyramiddrop.hf.drop_layers` finds them in a model.

        They have keys of their own, and their ranking layer has full attention.

        Args:
            rank_layer: "next" or "last", the setting of the method.
            attends: True if the method ranks by attention.
            reads_previous: True if it reads the input of the layer before the ranking one.
        """
        possible = self._possible(rank_layer, attends, reads_previous)
        far = [layer for layer in possible if self.mixer(_ranking(layer, rank_layer)).ranks]
        return tuple(far if far and attends else possible)

    def check_layers(
        self, layers: Sequence[int], rank_layer: str, attends: bool, reads_previous: bool, prompt: Prompt
    ) -> None:
        """Raise ValueError if the model itself would refuse to drop before one of `layers`.

        Args:
            rank_layer: "next" or "last", the setting of the method.
            attends: True if the method ranks by attention.
            reads_previous: True if it reads the input of the layer before the ranking one.
            prompt: the prompt; from its end, the ranking layer must reach all visual tokens.
        """
        possible = self._possible(rank_layer, attends, reads_previous)
        for layer in layers:
            if not layer:  # a drop before the decoder does not depend on its layers
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

    def _possible(self, rank_layer: str, attends: bool, reads_previous: bool) -> list[int]:
        """The layers before which tokens can be dropped at all."""
        attention = [layer for layer in range(self.layers) if self.mixer(layer).query_width]
        own = sum(source == layer for layer, source in enumerate(self.sources))
        ranking = attention if attends else range(self.layers)
        return [
            layer
            for layer in range(attention[0] + 1, own)
            if _ranking(layer, rank_layer) in ranking and _ranking(layer, rank_layer) >= reads_previous
        ]

    def experts_of(self, layer: int) -> Experts | None:
        """The experts of the 0-based `layer`, or None if its MLP is dense."""
        experts = self.experts
        return experts if experts and (experts.layers is None or layer in experts.layers) else None

    def mlp_width(self, layer: int, visual: bool = False) -> int:
        """The total width of the MLPs that compute one token, `visual` or not, in `layer`: for a mixture, the active
        and the shared experts."""
        experts = self.experts_of(layer)
        if experts:
            own = experts.visual if visual and experts.visual is not None else experts.intermediate
            return experts.active * own + experts.shared
        return self.widths[layer] if self.widths else self.intermediate

    def mlp_values(self, layer: int, rows: int, visual: int) -> int:
        """The number of hidden values of the MLPs of `layer` for `rows` rows, of which `visual` are visual tokens."""
        return (rows - visual) * self.mlp_width(layer) + visual * self.mlp_width(layer, visual=True)


def _ranking(layer: int, rank_layer: str) -> int:
    """The layer that ranks for a drop before `layer`."""
    return layer if rank_layer == "next" else layer - 1


@dataclass(frozen=True)
class VisionShape:
    """The sizes of a vision transformer and of the projector behind it.

    Attributes:
        layers: number of layers that run (Transformers runs all of them, even if an inner one's output is used).
        hidden, intermediate: widths of the hidden states and the MLP.
        patch_values: values in a patch of the picture: channels x height x width (x frames).
        projector: (in, out) of the projector's matrices.
        crop_tokens: visual tokens of a crop of fixed size; None if a picture is one crop of any size.
        rows_per_token: number of patches that are merged into one visual token.
        extra_rows: rows of a crop beside its patches (CLIP's class token).
        gated: True if the MLP has a gate (three matrices instead of two).
        window: number of rows in a window, in layers with windows; 0: all rows of a crop attend to each other.
        full_layers: number of layers without windows; not used without a window.
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
    """The sizes of a vision-language model: its decoder, and its vision tower if known."""

    decoder: DecoderShape
    vision: VisionShape | None = None


@dataclass(frozen=True)
class Prompt:
    """Token counts of one sample.

    Attributes:
        text_tokens: number of all tokens that are not visual.
        crops: number of crops in the vision tower; None: as many as the visual tokens need.
        instruction_tokens: number of text tokens after the last visual one; None: all text tokens.

    Raises:
        ValueError: if a count is too small.
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
        given = self.instruction_tokens
        if given is not None and not 0 <= given <= self.text_tokens:
            raise ValueError(f"instruction_tokens must be from 0 to the {self.text_tokens} text tokens; got {given}")

    @property
    def reach(self) -> int:
        """The distance from the end of the prompt to its first visual token, at least."""
        return self.visual_tokens + (self.instruction_tokens or 0)

    @property
    def num_queries(self) -> int:
        """The number of query tokens if the whole instruction is used: at least one, the prompt's last token."""
        return max(1, self.text_tokens if self.instruction_tokens is None else self.instruction_tokens)


@dataclass(frozen=True)
class Preset:
    """A model's sizes, and the number of visual tokens in the paper (or of a usual picture)."""

    shape: ModelShape
    visual_tokens: int


# openai/clip-vit-large-patch14-336, config.json: 24 layers, width 1024, 336 pixels in patches of 14.
def _clip_large(hidden: int) -> VisionShape:
    """CLIP ViT-L/14-336 with LLaVA's two-layer projector to a decoder of width `hidden`."""
    projector = ((1024, hidden), (hidden, hidden))
    return VisionShape(24, 1024, 4096, 3 * 14 * 14, projector, crop_tokens=576, extra_rows=1)


def _qwen_tower(hidden: int, gated: bool) -> VisionShape:
    """Qwen2-VL's vision tower, or (gated) Qwen2.5-VL's, with windows of 8 x 8 patches in all but 4 layers.

    Qwen/Qwen2-VL-7B-Instruct and Qwen/Qwen2.5-VL-7B-Instruct, config.json, vision_config.
    """
    shape = VisionShape(32, 1280, 5120, 3 * 2 * 14 * 14, ((5120, 5120), (5120, hidden)), rows_per_token=4)
    return replace(shape, intermediate=3420, gated=True, window=64, full_layers=4) if gated else shape


def _intern_vit(hidden: int) -> VisionShape:
    """InternViT-300M on tiles of 448 x 448 pixels, 2 x 2 patches merged, with InternVL3's two-layer projector.

    OpenGVLab/InternVL3-8B-hf, config.json, vision_config.
    """
    projector = ((4096, hidden), (hidden, hidden))
    return VisionShape(24, 1024, 4096, 3 * 14 * 14, projector, crop_tokens=256, rows_per_token=4, extra_rows=1)


# lmsys/vicuna-7b-v1.5 and -13b-v1.5, config.json, with the 64 padded rows of the llava-hf checkpoints' head.
_VICUNA_7B = DecoderShape(32, 4096, 11008, 32, 32, 128, vocabulary=32064)
_VICUNA_13B = DecoderShape(40, 5120, 13824, 40, 40, 128, vocabulary=32064)
# mistralai/Mistral-7B-Instruct-v0.2, config.json: 8 key and value heads.
_MISTRAL_7B = DecoderShape(32, 4096, 14336, 32, 8, 128, vocabulary=32064)
# Qwen/Qwen2.5-VL-3B-Instruct and Qwen/Qwen2(.5)-VL-7B-Instruct, config.json.
_QWEN_3B = DecoderShape(36, 2048, 11008, 16, 2, 128, vocabulary=151936)
_QWEN_7B = DecoderShape(28, 3584, 18944, 28, 4, 128, vocabulary=152064)
# OpenGVLab/InternVL3-8B-hf, config.json: Qwen2.5-7B with a vocabulary of its own.
_INTERNVL3_8B = DecoderShape(28, 3584, 18944, 28, 4, 128, vocabulary=151674)

PRESETS: dict[str, Preset] = {
    # 24 x 24 patches of one picture; the paper's Table 1.
    "llava-1.5-7b": Preset(ModelShape(_VICUNA_7B, _clip_large(4096)), 576),
    "llava-1.5-13b": Preset(ModelShape(_VICUNA_13B, _clip_large(5120)), 576),
    # 5 crops; the paper's Table 1.
    "llava-next-7b": Preset(ModelShape(_VICUNA_7B, _clip_large(4096)), 2880),
    "llava-next-13b": Preset(ModelShape(_VICUNA_13B, _clip_large(5120)), 2880),
    "llava-next-mistral-7b": Preset(ModelShape(_MISTRAL_7B, _clip_large(4096)), 2880),
    # 8 frames of 16 x 16 patches, LanguageBind/Video-LLaVA-7B; its tower attends over time too and is not counted.
    "video-llava-7b": Preset(ModelShape(_VICUNA_7B), 2048),
    # A picture of about 1000 x 1000 pixels: 36 x 36 tokens of 28 x 28 pixels.
    "qwen2-vl-7b": Preset(ModelShape(_QWEN_7B, _qwen_tower(3584, gated=False)), 1296),
    "qwen2.5-vl-3b": Preset(ModelShape(_QWEN_3B, _qwen_tower(2048, gated=True)), 1296),
    "qwen2.5-vl-7b": Preset(ModelShape(_QWEN_7B, _qwen_tower(3584, gated=True)), 1296),
    # The same picture: 3 x 3 tiles and a thumbnail, of 256 tokens each.
    "internvl3-8b": Preset(ModelShape(_INTERNVL3_8B, _intern_vit(3584)), 2560),
}
