"""The vision tower of LLaVA-like models: what its patches attend to, and how it sees a smaller picture."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextvars import ContextVar
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate
from torch.utils.hooks import RemovableHandle

from pyramiddrop.hf.anatomy import Anatomy, UnsupportedModelError
from pyramiddrop.hf.projections import Projector
from pyramiddrop.scoring.attention import attention_by_head

#: Families whose visual tokens are the patches of a tower of one fixed size, one for one.
FAMILIES = ("llava", "vipllava")


class Tower:
    """The tower of one model.

    Attributes:
        module: the tower.
        side: patches on a side of the square that it sees.
        class_token: whether a token stands before the patches.

    Raises:
        UnsupportedModelError: where visual tokens are not its patches, one for one.
    """

    def __init__(self, parts: Anatomy) -> None:
        config = parts.config
        named = parts.wrappers[0].named_modules()
        module = next((part for name, part in named if name.endswith("vision_tower")), None)
        if config.model_type not in FAMILIES or module is None or config.vision_feature_select_strategy != "default":
            raise UnsupportedModelError(
                f"{config.model_type!r}: which patch of the vision tower a visual token is, is known for "
                f"{', '.join(FAMILIES)} with vision_feature_select_strategy='default' alone"
            )
        self.module: nn.Module = module
        vision = config.vision_config
        self.side = int(vision.image_size // vision.patch_size)
        self.class_token = vision.model_type == "clip_vision_model"
        stacks = [getattr(part, "layers", None) for part in module.modules()]
        self.layers = next(stack for stack in stacks if isinstance(stack, nn.ModuleList))
        feature = config.vision_feature_layer
        feature = feature[-1] if isinstance(feature, list | tuple) else feature
        # Hidden state number k is what layer k - 1 gives.
        self.layer = int(feature) % (len(self.layers) + 1) - 1


class Watch:
    """Keeps what the patches of a call's pictures received in the tower, in the layer whose output is taken.

    It is kept with the thread (or task) that calls, for others may call the same model at the same time.
    """

    def __init__(self, tower: Tower) -> None:
        self._tower, self._projector = tower, Projector()

    @property
    def received(self) -> Tensor | None:
        """(pictures, patches) of the last pictures that this thread has shown to the tower, or None."""
        return _received.get().get(ref(self))

    def attach(self) -> list[RemovableHandle]:
        layer = self._tower.layers[self._tower.layer]
        return [layer.register_forward_pre_hook(self._look, with_kwargs=True)]

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    @torch.no_grad()
    def _look(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        first = int(self._tower.class_token)
        count = 1 if first else hidden.shape[1]
        asking = torch.arange(count, device=hidden.device).expand(len(hidden), -1)
        seen = self._projector.project(0, layer, hidden, asking, lambda rows: {"attention_mask": None})
        visible = seen.keys.new_ones(1, 1, 1, hidden.shape[1], dtype=torch.bool)
        weights = seen.keys.new_ones(len(hidden), count)
        received = attention_by_head(seen.queries, seen.keys, visible, weights, seen.scale).mean(1)[:, first:]
        others = {watch: table for watch, table in _received.get().items() if watch() is not None}
        _received.set({**others, ref(self): received})


# By watch, for a patched assistant model may look at the same pictures before the main model goes on.
_received: ContextVar[Mapping[ref[Watch], Tensor]] = ContextVar("pyramiddrop_received", default={})  # noqa: B039


class Shrunk:
    """Lets the tower see each picture smaller: `side` patches on a side; each of its patches stands for as many of the
    full grid as it covers, so that the model finds as many visual tokens as it expects.

    Attributes:
        side: patches on a side of the small picture.
    """

    def __init__(self, tower: Tower, side: int) -> None:
        self._tower, self.side = tower, side

    def attach(self) -> list[RemovableHandle]:
        module = self._tower.module
        return [
            module.register_forward_pre_hook(self._shrink, with_kwargs=True),
            module.register_forward_hook(self._spread),
        ]

    @property
    def share(self) -> float:
        """Of the full grid's patches; a little more, so that products with whole numbers of them have that floor."""
        return (self.side**2 + 1e-3) / self._tower.side**2

    def firsts(self) -> Tensor:
        """(side of the full grid squared,) bool: the first patch of the full grid in each patch of the small one."""
        number = torch.arange(self._tower.side) * self.side // self._tower.side
        first = torch.cat([torch.ones(1, dtype=torch.bool), number[1:] != number[:-1]])
        return (first[:, None] & first).flatten()

    def _shrink(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        pixels = args[0] if args else kwargs["pixel_values"]
        size = pixels.shape[-1] * self.side // self._tower.side
        small = interpolate(pixels.float(), (size, size), mode="bicubic", antialias=True, align_corners=False)
        others = {name: value for name, value in kwargs.items() if name != "pixel_values"}
        return (small.to(pixels.dtype),), {**others, "interpolate_pos_encoding": True}

    def _spread(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        output.last_hidden_state = self._spread_one(output.last_hidden_state)
        if getattr(output, "hidden_states", None) is not None:
            output.hidden_states = tuple(
                None if state is None else self._spread_one(state) for state in output.hidden_states
            )
        return output

    def _spread_one(self, state: Tensor) -> Tensor:
        """(n, rows, D) of the small grid as that of the full one, a class token before it as it is."""
        side, first = self._tower.side, int(self._tower.class_token)
        number = torch.arange(side, device=state.device) * self.side // side
        rows = (number[:, None] * self.side + number).flatten() + first
        return torch.cat([state[:, :first], state[:, rows]], 1)


def small_side(side: int, keep: float) -> int:
    """The side of the largest square grid that has no more than the share `keep` of `side` squared patches."""
    return max(1, math.isqrt(math.floor(side * side * keep)))
