"""Inspect a model: its text model, layers and visual token ids, and which drops it allows.

Everything that the structure shows is read from it; `families` has only what it does not show.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from pyramiddrop.cost import DecoderShape
from pyramiddrop.cost.model_sizes import TEXT_MODELS, decoder_shape
from pyramiddrop.families import FAMILIES, Family
from pyramiddrop.hf.cache_state import static_width
from pyramiddrop.hf.images import IMAGE_LENGTHS
from pyramiddrop.hf.masks import AttentionScope, UnknownLayerTypeError, scopes_of
from pyramiddrop.scoring import Scorer


class UnsupportedModelError(ValueError):
    """The method does not support the model, one of its settings or its prompt; the message says which and why.

    The command line shows it as one line.
    """


@dataclass(frozen=True)
class ModelInfo:
    """The parts and properties of a model that the adapter needs.

    Attributes:
        wrappers: the modules from the model down to the one that holds the text model, outermost first; the first one
            that receives input_ids also receives labels and pixel values.
        generator: the module whose `generate` runs, or None.
        visual_ids: ids of visual tokens in input_ids.
        video_ids: the visual ids of videos.
        sizes: the sizes for the cost model; None if it does not know the text model.
        scopes: the attention scope of each decoder layer.
        sources: for each decoder layer the layer whose keys it attends to: itself, or an earlier one that shares them.
        alike: for each decoder layer the first one with the same scope and the same kind of source.
    """

    wrappers: tuple[nn.Module, ...]
    generator: nn.Module | None
    text: PreTrainedModel
    visual_ids: tuple[int, ...]
    video_ids: tuple[int, ...]
    family: Family
    config: PretrainedConfig
    sizes: DecoderShape | None
    scopes: tuple[AttentionScope, ...]
    sources: tuple[int, ...]
    alike: tuple[int, ...]

    @property
    def layers(self) -> nn.ModuleList:
        """The decoder layers."""
        layers: nn.ModuleList = self.text.layers
        return layers

    @property
    def attention(self) -> str:
        """Name of the current attention implementation ("sdpa", "eager", "flash_attention_2", ...)."""
        return str(self.text.config._attn_implementation)

    @property
    def shape(self) -> DecoderShape:
        """The sizes for the cost model; raises UnsupportedModelError if it does not know the text model."""
        if self.sizes is None:
            raise UnsupportedModelError(f"the cost model does not know the text model {self.text.config.model_type!r}")
        return self.sizes

    @cached_property
    def longest(self) -> int | None:
        """The length up to which attention does not depend on row numbers; None: no limit."""
        # Llama 4 scales queries by their row number from `floor_scale` on.
        config = self.text.config
        return int(config.floor_scale) - 1 if getattr(config, "attn_temperature_tuning", False) else None

    @property
    def merged_frames(self) -> int:
        """The number of frames of a video's grid that the model merges into one."""
        return int(getattr(getattr(self.config, "vision_config", None), "temporal_merge_size", 1))

    @cached_property
    def caching(self) -> tuple[int, ...]:
        """The decoder layers with keys of their own."""
        own = (index for index, source in enumerate(self.sources) if index == source)
        return tuple(index for index in own if self.scopes[index].kind != "recurrent")

    @cached_property
    def windowed(self) -> bool:
        """True if some layer attends to a window or a chunk only."""
        return any(scope.windowed for scope in self.scopes)

    @cached_property
    def first_of_kind(self) -> dict[AttentionScope, int]:
        """The first layer of each scope, from whose cache the model reads the length of that scope's masks."""
        return {scope: self.scopes.index(scope) for scope in self.scopes}

    def image_lengths(self, call: Mapping[str, Any], image: Tensor) -> Sequence[int] | None:
        """Tokens of each image of a call with the tokens `image` (B, L) bool; None if each run of them is an image.

        Raises UnsupportedModelError, for `per_image=True`, if the call does not tell.
        """
        lengths = IMAGE_LENGTHS[self.family.image_lengths]
        found, visual_tokens = lengths(self.config, call, image), int(image.sum())
        if visual_tokens and self.family.split and (found is None or sum(found) != visual_tokens):
            raise UnsupportedModelError(
                f"per_image=True: this call does not tell which visual tokens are one image's, and {self.family.split} "
                f"stand between those of one image in {self.config.model_type!r}. Give the processor's arguments with "
                "input_ids, or leave per_image=False"
            )
        return found

    def rotary(self, hidden: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Position embeddings (cos, sin), (B, L, d) each, for `position_ids` (B, L)."""
        with torch.no_grad():
            cos, sin = self.text.rotary_emb(hidden, position_ids=position_ids)
        return cos, sin


def inspect_model(model: nn.Module) -> ModelInfo:
    """Inspect `model`; raises UnsupportedModelError if its family, its text model or a setting is not supported."""
    # `model` itself, or the one inside PEFT, DDP and other wrappers.
    core = next((module for module in model.modules() if isinstance(module, PreTrainedModel)), None)
    if core is None:
        raise UnsupportedModelError(f"{type(model).__name__} holds no Transformers model")
    config, family = core.config, FAMILIES.get(core.config.model_type, Family())
    if family.refused:
        raise _unsupported(core, family.refused)
    text = _text_model(core)
    wrappers = tuple(part for part in model.modules() if part is not text and text in part.modules())
    # A Transformers model with a `generate` of its own; wrappers call that one.
    generates = (part for part in wrappers if isinstance(part, PreTrainedModel) and hasattr(type(part), "generate"))
    vocabulary = next((part for part in core.modules() if hasattr(part, "image_token_id")), None)  # Chameleon, Emu3
    images = _ids(config, ("image_token_id", "image_token_index")) | _ids(vocabulary, ("image_token_id",))
    videos = _ids(config, ("video_token_id", "video_token_index"))
    try:
        scopes, sources = scopes_of(text), _sources(text)
    except UnknownLayerTypeError as error:
        raise _unsupported(core, f"{error} are not known") from error
    kinds = [(scopes[index], None if source == index else source) for index, source in enumerate(sources)]
    return ModelInfo(
        wrappers=wrappers,
        generator=next(generates, None),
        text=text,
        visual_ids=tuple(sorted(images | videos)),
        video_ids=tuple(sorted(videos - images)),
        family=family,
        config=config,
        sizes=decoder_shape(text.config, text.dtype.itemsize) if text.config.model_type in TEXT_MODELS else None,
        scopes=scopes,
        sources=sources,
        alike=tuple(kinds.index(kind) for kind in kinds),
    )


def _text_model(core: PreTrainedModel) -> PreTrainedModel:
    """The decoder, which has layers and token embeddings; refused if staged dropping cannot work on it."""
    if core.config.is_encoder_decoder:
        raise _unsupported(core, "it is an encoder-decoder: its visual tokens do not pass through the decoder")
    expected = core.config.get_text_config(decoder=True).model_type
    for text in core.modules():
        if not isinstance(text, PreTrainedModel) or text.config.model_type != expected:
            continue
        if isinstance(getattr(text, "layers", None), nn.ModuleList) and hasattr(text, "embed_tokens"):
            break
    else:
        raise _unsupported(core, "it has no decoder with `layers` and `embed_tokens`")
    crossing = any("cross_attn" in name or "crossattention" in name for name, _ in text.named_modules())
    if crossing or getattr(text.config, "cross_attention_layers", None):
        raise _unsupported(core, "its text model looks at the image by cross-attention; no visual token is in the text")
    parameters = inspect.signature(text.forward).parameters.values()
    takes_any = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters)
    if not takes_any or not hasattr(sys.modules[type(text.layers[0]).__module__], "ALL_ATTENTION_FUNCTIONS"):
        raise _unsupported(core, f"{type(text).__name__} does not use Transformers' common attention interface")
    if text.config._attn_implementation == "flex_attention":
        raise UnsupportedModelError("attention implementation 'flex_attention' is not supported; use 'sdpa' or 'eager'")
    return text


def _unsupported(core: PreTrainedModel, reason: str) -> UnsupportedModelError:
    return UnsupportedModelError(f"{core.config.model_type!r} ({type(core).__name__}) is not supported: {reason}")


def _ids(holder: Any, names: tuple[str, ...]) -> set[int]:
    found = (getattr(holder, name, None) for name in names)
    return {number for number in found if isinstance(number, int)}


def _sources(text: PreTrainedModel) -> tuple[int, ...]:
    """For each layer, the layer whose keys it attends to.

    In Gemma 3n and 4, the last layers attend to those of the last layer of their type that has keys.
    """
    count = len(text.layers)
    own = count - (getattr(text.config, "num_kv_shared_layers", None) or 0)
    types = getattr(text.config, "layer_types", None) or [""] * count
    last = {layer_type: index for index, layer_type in enumerate(types[:own])}
    return tuple(index if index < own else last[types[index]] for index in range(count))


def drop_layers(info: ModelInfo, rank_layer: str, scorer: Scorer) -> tuple[int, ...]:
    """The layers before which tokens are best dropped: those whose ranking layer attends to a prompt of any length.

    If the `scorer` does not need attention, any layer may rank that has keys of its own and an attention layer before.
    """
    shift, possible = int(rank_layer == "last"), _possible(info, rank_layer, scorer)
    far = [layer for layer in possible if not info.scopes[layer - shift].windowed]
    return tuple(far if far and scorer.needs_attention else possible)


def check_layers(info: ModelInfo, layers: tuple[int, ...], rank_layer: str, scorer: Scorer) -> None:
    """Raise UnsupportedModelError if the model does not allow drops before one of these layers."""
    possible = _possible(info, rank_layer, scorer)
    wrong = [layer for layer in layers if layer not in possible]
    if not wrong:
        return
    layer, ranking = wrong[0], wrong[0] - (rank_layer == "last")
    if info.sources[layer] != layer:
        why = "it reuses the keys of an earlier layer"
    elif scorer.needs_attention and info.scopes[ranking].kind == "recurrent":
        why = f"layer {ranking}, which would rank them, has no attention"
    elif ranking < scorer.needs_previous_hidden:
        why = f"its score compares layer {ranking} with the one before, and there is none"
    else:
        why = "the model reads the length of its cache from a layer behind it"
    raise UnsupportedModelError(
        f"{type(info.text).__name__} cannot drop visual tokens before layer {layer}: {why}. Allowed are layers "
        f"{list(possible)}"
    )


def _possible(info: ModelInfo, rank_layer: str, scorer: Scorer) -> list[int]:
    attention = [index for index, scope in enumerate(info.scopes) if scope.kind != "recurrent"]
    # The model reads the length of the sequence from its first attention layer; layers that share keys have no cache.
    first, own = attention[0] + 1, sum(source == index for index, source in enumerate(info.sources))
    ranking = attention if scorer.needs_attention else range(len(info.scopes))
    drops = [index + (rank_layer == "last") for index in ranking if index >= scorer.needs_previous_hidden]
    return [layer for layer in drops if first <= layer < own]


def check_attention(info: ModelInfo, first: int) -> None:
    """Raise UnsupportedModelError if a flash kernel would count windows in slots of a pruned cache."""
    windowed = [index for index, scope in enumerate(info.scopes) if scope.windowed and index >= first]
    if windowed and info.attention.startswith("flash"):
        raise UnsupportedModelError(
            f"{info.attention} counts the window of layer {windowed[0]} in remaining tokens, not in those that "
            'were there; use attn_implementation="sdpa"'
        )


def check_compact_positions(info: ModelInfo) -> None:
    """Raise UnsupportedModelError if renumbering tokens 0..n-1 is undefined for the model."""
    rope: dict[str, Any] = getattr(info.text.config, "rope_parameters", None) or {}
    if rope.get("rope_type", "default") in ("dynamic", "longrope"):
        why = f"for {rope['rope_type']!r} RoPE, whose frequencies depend on the length"
    elif "mrope_section" in rope:
        why = "for positions of several axes (M-RoPE)"
    elif not hasattr(info.text, "rotary_emb") or any(isinstance(value, dict) for value in rope.values()):
        why = f"for {type(info.text).__name__}, whose layers do not share one rotary embedding"
    else:
        return
    raise UnsupportedModelError(f'positions="compact" is undefined {why}; use positions="original"')


def check_grouping(info: ModelInfo, grouping: str) -> None:
    """Raise UnsupportedModelError for `per_frame=True` on a model that has no video tokens."""
    if grouping == "frame" and not info.video_ids:
        raise UnsupportedModelError(
            f"per_frame=True is not supported for {info.config.model_type!r}: it has no video tokens of its own; "
            "frames, if it takes any, are images there. Use per_image=True"
        )


def check_further_image(info: ModelInfo, first: int) -> None:
    """Raise ValueError for a further image on a pruned cache if the model has two-way masks.

    The model would measure the image's two-way mask by a pruned layer.
    """
    late = [index for index in info.first_of_kind.values() if index >= max(first, 1)]
    if late and info.family.two_way:
        raise ValueError(
            f"a further image on top of a pruned cache is not supported where tokens are dropped before layer {first}: "
            f"{type(info.text).__name__} makes its masks by layer {late[0]}. Drop first behind that layer, or give "
            "the whole conversation without a cache"
        )


def check_static_cache(info: ModelInfo, first: int, cache: Any) -> None:
    """Raise UnsupportedModelError if windowed layers follow the `first` drop on a static cache.

    The slots of such a layer are reused in turn, and would be counted without the dropped tokens.
    """
    windowed = [index for index, scope in enumerate(info.scopes) if scope.windowed and index >= first]
    if windowed and static_width(cache, info.sources[windowed[0]]) is not None:
        raise UnsupportedModelError(
            f"a StaticCache with layers that see a window (layer {windowed[0]}) is not supported where visual "
            f"tokens are dropped before one of them (before layer {first}); use a DynamicCache, or drop after them all"
        )
