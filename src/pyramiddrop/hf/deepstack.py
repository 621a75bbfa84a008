"""Visual features that a model adds to the hidden states between early layers (DeepStack: Qwen3-VL, Granite)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pyramiddrop.hf.rows import Kept, take_rows

_BETWEEN = ("deepstack_visual_embeds", "visual_pos_masks")  # a list: entry i is added behind layer i
_BEFORE = ("deepstack_features", "vision_mask")  # a dict: entry i is added before layer i


class DeepStack:
    """The features that come in after tokens were dropped; the model's own loop adds those before.

    Args:
        features: layer -> (M, D), what is added to what the layer receives.
        visual: (B, L) bool, the M rows of the full sequence to which it is added.
    """

    def __init__(self, features: Mapping[int, Tensor], visual: Tensor) -> None:
        self.features, self.visual = features, visual

    @classmethod
    def taken(cls, kwargs: dict[str, Any], first: int) -> tuple[DeepStack | None, dict[str, Any]]:
        """Take over what the text model would add behind layer `first`, before which tokens are dropped first.

        Returns:
            it, or None where there is nothing, and the `kwargs` for the model's own loop.
        """
        name, mask = next((pair for pair in (_BETWEEN, _BEFORE) if kwargs.get(pair[0]) is not None), _BETWEEN)
        given = kwargs.get(name)
        if given is None:
            return None, kwargs
        if name == "deepstack_features":
            own = {layer: features for layer, features in given.items() if layer <= first}
            taken = {layer: features for layer, features in given.items() if layer > first}
        else:
            own = given[:first]
            taken = {index + 1: features for index, features in enumerate(given) if index >= first}
        if not taken:
            return None, kwargs
        visual = kwargs[mask]
        return cls(taken, visual.squeeze(-1) if visual.dim() == 3 else visual), {**kwargs, name: own}

    def add(self, index: int, hidden: Tensor, kept: Kept | None) -> Tensor:
        """`hidden` (B, N, D), the rows in `kept` that layer `index` receives, with what is added there."""
        features = self.features.get(index)
        if features is None:
            return hidden
        visual = self.visual.to(hidden.device)
        # Numbered through the batch, so that dropped rows' features are left out without a look at who was dropped.
        number = (visual.flatten().cumsum(0) - 1).clamp(min=0).view(visual.shape)
        if kept is not None:
            number, visual = take_rows(number, kept.rows), take_rows(visual, kept.rows)
        rows = features.to(hidden)[number.flatten()].view(*number.shape, -1)
        return torch.where(visual[..., None], hidden + rows, hidden)
