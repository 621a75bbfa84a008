"""Run the vision tower on every rank in every forward, also if a rank's own batch has no image."""

from __future__ import annotations

from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from pyramiddrop.hf import anatomy
from pyramiddrop.hf.versions import cache_of


def blank_pixels(processor: Any) -> dict[str, Tensor]:
    """A model's arguments for one blank image."""
    any_size = (64, 64)  # the processor makes of it what the model takes
    return dict(processor.image_processor(images=[Image.new("RGB", any_size)], return_tensors="pt"))


class BlankImage:
    """Lets a batch without images run the vision tower on a blank one, whose features are multiplied by zero.

    Where weights are sharded over ranks (FSDP, ZeRO-3), a module that one rank calls and another does not waits for
    ever; and DDP's ranks must all have a gradient for what any of them trains. LLaVA's own code does likewise.

    Args:
        model: a vision-language model of Transformers, or what has wrapped one; to be given before it is sharded. The
            hooks stay on it.
        pixels: what `blank_pixels` makes.
    """

    def __init__(self, model: nn.Module, pixels: dict[str, Tensor]) -> None:
        parts = anatomy(model)
        self.pixels = pixels
        self.core: Any = next(module for module in reversed(parts.wrappers) if hasattr(module, "get_image_features"))
        self._blank = False
        embeddings: Any = parts.text.get_input_embeddings()
        self.core.register_forward_pre_hook(self._look, with_kwargs=True)
        embeddings.register_forward_hook(self._add_nothing)

    def _look(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # With a cache it is a step of `generate`, or its prefill, where ranks go their own ways anyway.
        self._blank = kwargs.get("pixel_values") is None and cache_of(kwargs) is None

    def _add_nothing(self, module: nn.Module, args: tuple[Any, ...], embedded: Tensor) -> Tensor:
        if not self._blank:
            return embedded
        self._blank = False
        inputs = {name: value.to(embedded.device) for name, value in self.pixels.items()}
        inputs["pixel_values"] = inputs["pixel_values"].to(embedded.dtype)
        features = self.core.get_image_features(**inputs, return_dict=True).pooler_output
        nothing: Tensor = torch.stack([part.sum() for part in features]).sum() * 0
        return embedded + nothing.to(embedded.dtype)
