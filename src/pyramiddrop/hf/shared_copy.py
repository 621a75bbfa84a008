"""Copy a model object without its weights: parameters, buffers and all other tensors are shared."""

from __future__ import annotations

import copy
from collections.abc import Collection
from types import FunctionType
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

Model = TypeVar("Model", bound=nn.Module)


def shared_copy(model: Model) -> Model:
    """A deep copy of `model` on the same tensors, with its own modules, hooks and configuration.

    accelerate's hooks, PEFT's adapters, tied and quantised weights come along; `model.compile()` does not.

    Raises:
        ValueError: if a module's `forward` was replaced by a function that would run the original.
    """
    originals = {id(module) for module in model.modules()}
    with _SharedTensors():
        copied: Model = copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})
    for module in copied.modules():
        _forget_wrappers(module, originals)
    return copied


class _SharedTensors(TorchFunctionMode):
    """Let deep copies share tensors; parameters do not ask, and are shared by the copy's memo."""

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        return args[0] if func is Tensor.__deepcopy__ else func(*args, **(kwargs or {}))


def _forget_wrappers(module: nn.Module, originals: Collection[int]) -> None:
    """Take off functions that stand in for methods of this one object, which a deep copy leaves with the original:
    accelerate puts such around `to` and `cuda`, to warn."""
    replaced = {name: value for name, value in module.__dict__.items() if isinstance(value, FunctionType)}
    for name, function in replaced.items():
        if not hasattr(type(module), name) or not _runs(function, originals):
            continue
        if name == "forward":
            raise ValueError(
                f"cannot copy this model: the forward of its {type(module).__name__} was replaced by a function, which "
                "would run the original model (torch.compile(model.forward)?). Make views first, then wrap or compile"
            )
        del module.__dict__[name]


def _runs(function: FunctionType, modules: Collection[int]) -> bool:
    """Whether a function holds one of `modules` (by id), a method of one, or another function that does."""
    seen, waiting = set[FunctionType](), [function]
    while waiting:
        seen.add(function := waiting.pop())
        held = [cell.cell_contents for cell in function.__closure__ or ()]
        if any(id(getattr(value, "__self__", value)) in modules for value in held):
            return True
        waiting += [value for value in held if isinstance(value, FunctionType) and value not in seen]
    return False
