"""Training recipes: LLaVA's two phases and LoRA, with the trained weights and learning rates of each."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from torch import nn

from pyramiddrop.hf import inspect_model
from pyramiddrop.inference import InputError

#: Names of projectors and of vision towers in Transformers.
PROJECTORS = ("multi_modal_projector", "merger", "connector", "embed_vision")
VISION_TOWERS = ("vision_tower", "vision_model", "visual")


@dataclass(frozen=True)
class Recipe:
    """Which weights are trained, and with which settings."""

    language: str  # how the language model is trained: "frozen", "all" or "lora"
    learning_rate: float  # the peak, followed by a cosine decay
    batch: int  # samples in a step, over all devices
    warmup: float = 0.03  # the share of the steps before the peak


#: The settings of LLaVA-1.5's published scripts, all with a frozen vision tower.
RECIPES: dict[str, Recipe] = {
    "projector": Recipe("frozen", learning_rate=1e-3, batch=256),
    "all": Recipe("all", learning_rate=2e-5, batch=128),
    "lora": Recipe("lora", learning_rate=2e-4, batch=128),
}
LORA_RANK, LORA_DROPOUT = 128, 0.05


def prepare_weights(model: nn.Module, recipe: Recipe, lora_rank: int = LORA_RANK) -> Any:
    """Freeze the weights that `recipe` does not train, and cast the others to float32, because half precision loses
    small updates.

    Returns the model, wrapped by PEFT for the LoRA recipe, whose adapters have the rank `lora_rank` and α of twice as
    much, as in LLaVA. InputError if the model has no projector with a known name.
    """
    projector = [name for name, _ in model.named_parameters() if _within(name, PROJECTORS)]
    if not projector:
        raise InputError(f"{type(model).__name__} has no projector; expected a module named {', '.join(PROJECTORS)}")
    for name, parameter in model.named_parameters():
        vision = _within(name, VISION_TOWERS) and name not in projector
        parameter.requires_grad_(name in projector or (recipe.language == "all" and not vision))
    prepared = _with_lora(model, lora_rank) if recipe.language == "lora" else model
    for parameter in prepared.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return prepared


def _within(name: str, modules: Collection[str]) -> bool:
    return any(part in modules for part in name.split("."))


def _with_lora(model: nn.Module, rank: int) -> Any:
    """Add LoRA to every linear layer of the decoder; the projector is trained fully, as in LLaVA's script."""
    from peft import LoraConfig, get_peft_model

    linear = {id(module) for module in inspect_model(model).layers.modules() if isinstance(module, nn.Linear)}
    config = LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        lora_dropout=LORA_DROPOUT,
        target_modules=[name for name, module in model.named_modules() if id(module) in linear],
        modules_to_save=[name for name in PROJECTORS if any(_within(n, [name]) for n, _ in model.named_modules())],
    )
    return get_peft_model(model, config)
