"""Where a member of the zoo needs another rule than the rest, and what the library refuses on it, by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from reference import Rule
from zoo import Member


@dataclass(frozen=True)
class Setup:
    """How the checks run on a member.

    Attributes:
        layers: before which tokens are dropped.
        last: the same with rank_layer="last", where the layer before ranks.
        fastv: the layer of the check with one early drop; the layer before it ranks.
        impossible: check -> why the untouched model cannot do it, where the zoo does not say so.
        refused: check -> words of the error by which the library refuses it; "*" stands for every check
            but "keep 1", in which nothing is dropped.
        removed: whether masking is no oracle, because a later layer is not of attention alone: then rows are taken out.
    """

    layers: tuple[int, ...] = (2, 4, 6)
    last: tuple[int, ...] = (2, 4, 6)
    fastv: int = 2
    impossible: Mapping[str, str] = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)
    removed: bool = False

    def rule(self, rank_layer: str = "next", per_image: bool = False) -> Rule:
        """The staged rule: each stage halves what is left."""
        layers = self.last if rank_layer == "last" else self.layers
        keep = [0.5**stage for stage in range(1, len(layers) + 1)]
        return Rule(layers, keep, rank_layer=rank_layer, per_image=per_image)

    @property
    def fastv_rule(self) -> Rule:
        """FastV as a rule."""
        return Rule([self.fastv], [0.5], rank_layer="last")

    @property
    def hopeless(self) -> bool:
        """Whether the library refuses the member whatever is asked."""
        return "keep 1" in self.refused

    def refusal(self, check: str) -> str | None:
        """Words of the refusal that a check must meet, or None where it must pass."""
        return self.refused.get(check, self.refused.get("*") if check != "keep 1" else None)


def unknown(layer_type: str) -> dict[str, str]:
    """The refusal of a text model with layers of a kind of its own, whatever is asked of it."""
    return whatever(f"layers of type {layer_type!r} are not known")


def whatever(words: str) -> dict[str, str]:
    """The refusal of a member in these words, whatever is asked of it."""
    return {"*": words, "keep 1": words}


NO_GRID = {"new image": "`generate` needs the grids of earlier images too, and takes only those of new tokens"}
WINDOW = {"static cache": "a StaticCache with layers that see a window"}
# Three layers with a window, then one that sees all and can rank.
WINDOWED = Setup(layers=(3, 7), last=(4,), fastv=4, refused=WINDOW)
TWO_WAY = replace(WINDOWED, refused=WINDOW | {"new image": "a further image on top of a pruned cache"})
GRIDS = Setup(impossible=NO_GRID)
# Frames of a video are images to the model.
FRAMES = Setup(refused={"per frame": "per_frame=True is not supported for"})
# The layer before ranks.
NARROW = dict.fromkeys(("last layer", "FastV"), "layer 1, which ranks the visual tokens, sees 16 tokens")
DELTA = Setup(layers=(7,), last=(4,), fastv=4, impossible=NO_GRID, removed=True)  # every fourth layer has attention

# Members that are not here run with the rule above, are refused nothing, and can do all but what the zoo says.
SETUPS: dict[str, Setup] = {
    "aya_vision": WINDOWED,
    "cohere2_vision": WINDOWED,
    "cohere_compass": replace(WINDOWED, impossible=NO_GRID),
    "cosmos3_omni": GRIDS,
    "ernie4_5_vl_moe": GRIDS,
    "exaone4_5": WINDOWED,
    "gemma3": TWO_WAY,
    "gemma3n": WINDOWED,
    "gemma4": TWO_WAY,
    "gemma4-edge": TWO_WAY,
    "gemma4-moe": TWO_WAY,
    "gemma4_unified": TWO_WAY,
    "glm46v": GRIDS,
    "glm4v": GRIDS,
    "glm4v_moe": GRIDS,
    "glm_ocr": GRIDS,
    "glmga": GRIDS,
    "idefics2-sliding": Setup(
        refused={"*": "layer 2, which ranks the visual tokens, sees 16 tokens"} | NARROW | WINDOW
    ),
    "internvl": FRAMES,
    "lfm2_vl": Setup(layers=(5, 7), last=(3, 6), fastv=3, removed=True),  # convolutions between
    "lfm3_vl": Setup(layers=(2, 6), last=(3, 7), fastv=3, removed=True, refused=WINDOW),
    "llama4": WINDOWED,  # chunks instead of windows
    "llama4-long": Setup(refused={"*": "by row numbers, which dropping changes"}),
    "mistral_large4": Setup(refused=unknown("indexed_attention")),
    "minimax_m3_vl": Setup(refused=unknown("minimax_m3_sparse")),
    "molmo2": FRAMES,
    "molmo2-olmo": FRAMES,
    "muse_glimmer": WINDOWED,
    "nemotron_h_omni": Setup(refused=whatever("it has no decoder with `layers` and `embed_tokens`")),
    "paddleocr_vl": GRIDS,
    "paligemma-2": Setup(layers=(1, 3, 5), refused=WINDOW),  # every other layer sees all
    "qwen2_5_vl": GRIDS,
    "qwen2_vl": GRIDS,
    "qwen3_5": DELTA,
    "qwen4_exp": Setup(refused=unknown("indexed_attention")),
    "qwen3_5_moe": DELTA,
    "qwen3_vl": GRIDS,
    "qwen3_vl_moe": GRIDS,
    "shieldgemma2": TWO_WAY,
    "smolvlm": FRAMES,
    "step3p7": WINDOWED,
    "unlimited_ocr": Setup(refused=unknown("reference_sliding_attention")),
}

# One member for every kind of text model: what the fast tests run on.
FAST = (
    "llava",  # plain
    "llava_next",  # images of several sizes
    "qwen2_vl",  # positions of three axes
    "qwen3_vl",  # features added behind the first layers
    "kimi_k25",  # latent attention
    "cohere2_vision",  # windows, parallel blocks, layers without RoPE
    "paligemma",  # a prompt that sees itself both ways
    "lfm2_vl",  # convolutions
)


def setup_of(member: Member) -> Setup:
    """The member's entry, or the common one."""
    return SETUPS.get(member.name, Setup())
