"""Write `pyramiddrop.json` whenever a patched model is saved."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

    from pyramiddrop.methods import Method


class SaveWithMethod:
    """Replacement of a patched model's `save_pretrained`.

    Every caller of that function keeps the method without knowing of it: the checkpoints of all trainers, LoRA merged
    into its base, `push_to_hub`. A deep copy of the model saves itself, not its original.
    """

    def __init__(self, model: nn.Module, method: Method) -> None:
        self.model, self.method = model, method
        kind: Any = type(model)
        self.__wrapped__ = kind.save_pretrained

    def __call__(self, save_directory: str | Path, *args: Any, push_to_hub: bool = False, **kwargs: Any) -> Any:
        model: Any = self.model
        result = self.__wrapped__(model, save_directory, *args, **kwargs)
        if kwargs.get("is_main_process", True):
            self.method.save_pretrained(save_directory)
        if push_to_hub:  # now that the file exists; `push_to_hub` calls this function again
            own = {name: kwargs[name] for name in kwargs.keys() & {"commit_message", "private", "token", "revision"}}
            model.push_to_hub(kwargs.get("repo_id", Path(save_directory).name), **own)
        return result


def install_save_hook(modules: Iterable[nn.Module], method: Method) -> None:
    """Make the `save_pretrained` of each module, if it has one, write `method` beside the weights."""
    for module in modules:
        if hasattr(type(module), "save_pretrained"):
            module.__dict__["save_pretrained"] = SaveWithMethod(module, method)


def remove_save_hook(modules: Iterable[nn.Module]) -> None:
    """Undo `install_save_hook`."""
    for module in modules:
        module.__dict__.pop("save_pretrained", None)
