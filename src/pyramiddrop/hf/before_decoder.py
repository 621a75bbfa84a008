"""The vision encoder's part in dropping before the decoder: what its patches receive, and a smaller picture.

The drop itself is a drop before layer 0, on the hooks of staged dropping, and scorers that do not read the vision
encoder need nothing of this module but its attachment.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import replace
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate
from torch.utils.hooks import RemovableHandle

from pyramiddrop.families import FAMILIES
from pyramiddrop.hf.attachment import Attachment
from pyramiddrop.hf.model_info import ModelInfo, UnsupportedModelError
from pyramiddrop.hf.plan import Rules
from pyramiddrop.hf.prompt_masks import GivenMasks
from pyramiddrop.hf.query_key import extract
from pyramiddrop.schedule import PreLLMSchedule
from pyramiddrop.scoring.attention import attention_received


class PreLLMAttachment(Attachment):
    """Attaches a method that drops before the decoder, and possibly inside it too.

    If it `shrinks`, the vision tower encodes a smaller picture, whose tokens are the kept ones.
    """

    def __init__(self, info: ModelInfo, rules: Rules, given: GivenMasks, shrinks: bool) -> None:
        limited = [index for index, scope in enumerate(info.scopes) if scope.kind != "full"]
        if limited:
            raise UnsupportedModelError(
                f"{type(info.text).__name__} cannot drop before its first layer: layer {limited[0]} does not see "
                "everything, and would count what is left"
            )
        self.vision: ClsAttentionRecorder | DownsampledEncoder | None = None
        if shrinks:
            assert isinstance(rules.schedule, PreLLMSchedule)
            tower = Tower(info)
            side = max(1, math.isqrt(math.floor(tower.side**2 * rules.schedule.keep[0])))  # of the largest square grid
            self.vision = DownsampledEncoder(tower, side)
            rules = replace(rules, schedule=rules.schedule.starting_with(self.vision.share))
        elif rules.scorer.needs_vision_attention:
            self.vision = ClsAttentionRecorder(Tower(info))
        self.tower = None if self.vision is None else self._scores
        super().__init__(info, rules, given)

    def _scores(self) -> Tensor | None:
        return None if self.vision is None else self.vision.received

    def _attach(self, names: list[tuple[str, ...]]) -> None:
        super()._attach(names)
        self._handles += self.vision.attach() if self.vision else []


class Tower:
    """The vision tower of a model; UnsupportedModelError if the visual tokens are not its patches, one for one.

    Attributes:
        side: number of patches on a side of its square input.
        class_token: True if a class token precedes the patches.
        layer: the number of the layer whose output the decoder receives.
    """

    def __init__(self, info: ModelInfo) -> None:
        config = info.config
        parts = info.wrappers[0].named_modules()
        module = next((part for name, part in parts if name.endswith("vision_tower")), None)
        if not info.family.fixed_patches or module is None or config.vision_feature_select_strategy != "default":
            fixed = [name for name, family in FAMILIES.items() if family.fixed_patches]
            raise UnsupportedModelError(
                f"{config.model_type!r}: which patch of the vision tower a visual token is, is known for "
                f"{', '.join(fixed)} with vision_feature_select_strategy='default' alone. For smaller pictures of any "
                "size give the processor fewer pixels, as `pyramiddrop eval --method downsample` does"
            )
        self.module: nn.Module = module
        vision = config.vision_config
        self.side = int(vision.image_size // vision.patch_size)
        self.class_token = vision.model_type == "clip_vision_model"
        stacks = [getattr(part, "layers", None) for part in module.modules()]
        self.layers = next(stack for stack in stacks if isinstance(stack, nn.ModuleList))
        feature = config.vision_feature_layer  # hidden state k is the output of layer k - 1
        feature = feature[-1] if isinstance(feature, list | tuple) else feature
        self.layer = int(feature) % (len(self.layers) + 1) - 1


class ClsAttentionRecorder:
    """Records the attention that patches receive in the tower layer whose output the decoder uses.

    The record belongs to the calling thread (or task), because others may call the same model at the same time.
    """

    def __init__(self, tower: Tower) -> None:
        self._tower = tower

    @property
    def received(self) -> Tensor | None:
        """(pictures, patches) attention received in the last call of the tower in this thread; None before any."""
        return _received.get().get(ref(self))

    def attach(self) -> list[RemovableHandle]:
        """Install the hooks."""
        layer = self._tower.layers[self._tower.layer]
        return [layer.register_forward_pre_hook(self._look, with_kwargs=True)]

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    @torch.no_grad()
    def _look(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        first = int(self._tower.class_token)
        count = 1 if first else hidden.shape[1]
        query_rows = torch.arange(count, device=hidden.device).expand(len(hidden), -1)
        seen = extract(layer, hidden, query_rows, lambda rows: {"attention_mask": None})
        weights = seen.keys.new_ones(len(hidden), count)
        received = attention_received(seen.queries, seen.keys, None, weights, seen.scale)[:, first:]
        others = {watch: table for watch, table in _received.get().items() if watch() is not None}
        _received.set({**others, ref(self): received})


# By recorder, because a patched assistant model may encode the same pictures before the main model continues.
_received: ContextVar[Mapping[ref[ClsAttentionRecorder], Tensor]] = ContextVar("pyramiddrop_received", default={})  # noqa: B039


class DownsampledEncoder:
    """Encodes each picture at a lower resolution, with `side` patches on a side.

    Each patch is repeated over the part of the full grid that it covers, so that the model finds as many visual tokens
    as it expects.
    """

    def __init__(self, tower: Tower, side: int) -> None:
        self._tower, self.side = tower, side

    def attach(self) -> list[RemovableHandle]:
        """Install the hooks."""
        module = self._tower.module
        return [
            module.register_forward_pre_hook(self._shrink, with_kwargs=True),
            module.register_forward_hook(self._spread),
        ]

    @property
    def share(self) -> float:
        """The share of the full grid's patches, rounded up slightly so that products with it have the right floor."""
        return (self.side**2 + 1e-3) / self._tower.side**2

    @property
    def received(self) -> Tensor:
        """(1, patches of the full grid) float: 1 at the first full-grid patch in each patch of the small grid."""
        number = torch.arange(self._tower.side) * self.side // self._tower.side
        first = torch.cat([torch.ones(1, dtype=torch.bool), number[1:] != number[:-1]])
        return (first[:, None] & first).float().view(1, -1)

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
        """Repeat the patches of the small grid (n, rows, D) over the full one; a class token is unchanged."""
        side, first = self._tower.side, int(self._tower.class_token)
        number = torch.arange(side, device=state.device) * self.side // side
        rows = (number[:, None] * self.side + number).flatten() + first
        return torch.cat([state[:, :first], state[:, rows]], 1)
