"""Training recipes: LLaVA's two steps, the weights that each trains, and their learning rates."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from torch import nn

from pyramiddrop.hf import inspect_model
from pyramiddrop.inference.errors import InputError

#: Names of the modules between a vision tower and a language model, and of vision towers, in Transformers.
PROJECTORS = ("multi_modal_projector", "merger", "connector", "embed_vision")
VISION_TOWERS = ("vision_tower", "vision_model", "visual")


@dataclass(frozen=True)
class Recipe:
    """Which weights are trained, and how.

    Attributes:
        language: whether the language model is trained: "frozen", "all" or "lora".
        learning_rate: the peak; it rises over `warmup` of the steps and falls as a cosine.
        batch: samples a step, over all devices.
    """

    language: str
    learning_rate: float
    batch: int
    warmup: float = 0.03


#: The settings of LLaVA-1.5's published scripts; the vision tower is frozen in all of them.
RECIPES: dict[str, Recipe] = {
    "projector": Recipe("frozen", learning_rate=1e-3, batch=256),
    "all": Recipe("all", learning_rate=2e-5, batch=128),
    "lora": Recipe("lora", learning_rate=2e-4, batch=128),
}
LORA_RANK, LORA_DROPOUT = 128, 0.05


def find_recipe(name: str) -> Recipe:
    """The recipe of this name; InputError where there is none."""
    if name not in RECIPES:
        raise InputError(f"recipe {name!r} is not one of {', '.join(RECIPES)}")
    return RECIPES[name]


def prepare_weights(model: nn.Module, recipe: Recipe, lora_rank: int = LORA_RANK) -> Any:
    """Freeze what `recipe` does not train, and hold what it trains in float32: steps get lost in half precision.

    Args:
        lora_rank: the width of the adapters where the recipe is LoRA; their α is twice as much, as LLaVA's is.

    Returns the model, wrapped by PEFT where the recipe is LoRA.

    Raises:
        InputError: where the model has no projector that is known by its name.
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
    """LoRA on every linear layer of the decoder; the projector is trained whole, as LLaVA's script does."""
    from peft import LoraConfig, get_peft_model

    layers = inspect_model(model).layers
    linear = {id(module) for module in layers.modules() if isinstance(module, nn.Linear)}
    config = LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        lora_dropout=LORA_DROPOUT,
        target_modules=[name for name, module in model.named_modules() if id(module) in linear],
        modules_to_save=[name for name in PROJECTORS if any(_within(n, [name]) for n, _ in model.named_modules())],
    )
    return get_peft_model(model, config)
