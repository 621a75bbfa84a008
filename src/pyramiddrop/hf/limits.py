"""Where a model lets tokens be dropped, and which settings of a method it refuses: checked before a hook is put on."""

from __future__ import annotations

from typing import Any

from pyramiddrop.hf.anatomy import Anatomy, UnsupportedModelError
from pyramiddrop.hf.memory import static_width
from pyramiddrop.scoring import Scorer

#: Families whose image tokens see each other from both sides.
TWO_WAY = ("gemma3", "gemma4", "gemma4_unified", "molmo2", "paligemma", "shieldgemma2")


def drop_layers(anatomy: Anatomy, rank_layer: str, scorer: Scorer) -> tuple[int, ...]:
    """The layers before which tokens are best dropped: those whose ranking layer sees the whole prompt, however long.

    Args:
        rank_layer: "next" or "last", of the method.
        scorer: of the method; where it does not attend, any layer will do that has room before it.
    """
    shift, possible = _shift(rank_layer), _possible(anatomy, rank_layer, scorer)
    far = [layer for layer in possible if not anatomy.spans[layer - shift].windowed]
    return tuple(far if far and scorer.attends else possible)


def check_layers(anatomy: Anatomy, layers: tuple[int, ...], rank_layer: str, scorer: Scorer) -> None:
    """Raise UnsupportedModelError where a method drops before a layer at which this model does not allow it."""
    possible = _possible(anatomy, rank_layer, scorer)
    wrong = [layer for layer in layers if layer not in possible]
    if not wrong:
        return
    layer, ranking = wrong[0], wrong[0] - _shift(rank_layer)
    if anatomy.sources[layer] != layer:
        why = "it reuses the keys of an earlier layer"
    elif scorer.attends and anatomy.spans[ranking].kind == "recurrent":
        why = f"layer {ranking}, which would rank them, has no attention"
    elif ranking < scorer.compares:
        why = f"its score compares layer {ranking} with the one before, and there is none"
    else:
        why = "the model reads the length of its cache from a layer behind it"
    raise UnsupportedModelError(
        f"{type(anatomy.text).__name__} cannot drop visual tokens before layer {layer}: {why}. Allowed are layers "
        f"{list(possible)}"
    )


def _possible(anatomy: Anatomy, rank_layer: str, scorer: Scorer) -> list[int]:
    attention = [index for index, span in enumerate(anatomy.spans) if span.kind != "recurrent"]
    # The model asks its first attention layer how long the sequence is; layers that share keys have none of their own.
    first, own = attention[0] + 1, sum(source == index for index, source in enumerate(anatomy.sources))
    ranking = attention if scorer.attends else range(len(anatomy.spans))
    drops = [index + _shift(rank_layer) for index in ranking if index >= scorer.compares]
    return [layer for layer in drops if first <= layer < own]


def _shift(rank_layer: str) -> int:
    return 0 if rank_layer == "next" else 1


def check_attention(anatomy: Anatomy, first: int) -> None:
    """Raise UnsupportedModelError where a flash kernel would count windows by slots, from which tokens were dropped."""
    windowed = [index for index, span in enumerate(anatomy.spans) if span.windowed and index >= first]
    if windowed and anatomy.attention.startswith("flash"):
        raise UnsupportedModelError(
            f"{anatomy.attention} counts the window of layer {windowed[0]} in tokens that are left, not in those that "
            'were there; use attn_implementation="sdpa"'
        )


def check_compact_positions(anatomy: Anatomy) -> None:
    """Raise UnsupportedModelError where renumbering tokens 0..n-1 is not defined."""
    rope: dict[str, Any] = getattr(anatomy.text.config, "rope_parameters", None) or {}
    if rope.get("rope_type", "default") in ("dynamic", "longrope"):
        why = f"for {rope['rope_type']!r} RoPE, whose frequencies depend on the length"
    elif "mrope_section" in rope:
        why = "for positions of several axes (M-RoPE)"
    elif not hasattr(anatomy.text, "rotary_emb") or any(isinstance(value, dict) for value in rope.values()):
        why = f"for {type(anatomy.text).__name__}, whose layers do not share one rotary embedding"
    else:
        return
    raise UnsupportedModelError(f'positions="compact" is undefined {why}; use positions="original"')


def check_grouping(anatomy: Anatomy, grouping: str) -> None:
    """Raise UnsupportedModelError where the tokens of one frame cannot be told from those of others.

    Args:
        grouping: "sample", "image" or "frame", of the method.
    """
    if grouping == "frame" and not anatomy.video_ids:
        raise UnsupportedModelError(
            f"per_frame=True is not supported for {anatomy.config.model_type!r}: it has no video tokens of its own; "
            "frames, if it takes any, are images there. Use per_image=True"
        )


def check_further_image(anatomy: Anatomy, first: int) -> None:
    """Raise ValueError where a further image comes on top of a cache by whose pruned layer the model counts the columns
    of the image's two-way mask."""
    late = [index for index in anatomy.first_of_kind.values() if index >= first]
    if late and anatomy.config.model_type in TWO_WAY:
        raise ValueError(
            f"a further image on top of a pruned cache is not supported where tokens are dropped before layer {first}: "
            f"{type(anatomy.text).__name__} makes its masks by layer {late[0]}. Drop first behind that layer, or give "
            "the whole conversation without a cache"
        )


def check_static_cache(anatomy: Anatomy, first: int, cache: Any) -> None:
    """Raise UnsupportedModelError where layers with a window follow the `first` drop on a static cache: its slots go
    round within the window, and would be counted without the tokens that were dropped."""
    windowed = [index for index, span in enumerate(anatomy.spans) if span.windowed and index >= first]
    if windowed and static_width(cache, anatomy.sources[windowed[0]]) is not None:
        raise UnsupportedModelError(
            f"a StaticCache with layers that see a window (layer {windowed[0]}) is not supported where visual "
            f"tokens are dropped before one of them (before layer {first}); use a DynamicCache, or drop after them all"
        )
