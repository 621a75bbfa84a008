"""Two make-believe GPUs on a CPU: a model spread over them by accelerate's own `dispatch_model`.

A tensor's device is a tag on it. In a block of `fake_devices`, `.device` tells the tag, `.to()` changes it, results
inherit it, and an operation that mixes tags raises, as CUDA does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from operator import attrgetter
from typing import Any
from unittest import mock

import torch
from accelerate import dispatch_model
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_iter, tree_map_only

_TAG = "fake_device"
_CPU = torch.device("cpu")


def tag(tensor: Tensor, device: torch.device | str | int) -> Tensor:
    """Say that `tensor` is on `device`."""
    tensor.__dict__[_TAG] = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    return tensor


def tag_of(tensor: Tensor) -> torch.device:
    device: torch.device = tensor.__dict__.get(_TAG, _CPU)
    return device


def on_device(values: Mapping[str, Any], device: torch.device | str | int) -> dict[str, Any]:
    """Copies of the tensors in `values`, on `device`."""
    return tree_map_only(Tensor, lambda tensor: tag(tensor.clone(), device), dict(values))  # type: ignore[no-any-return]


def spread(model: nn.Module, layers: nn.ModuleList, first: int) -> nn.Module:
    """Dispatch `model` over two devices: `layers` from number `first` on stand on the second one."""
    second = set(layers[first:])
    outer = {module for module in model.modules() if any(inner is layers for inner in module.modules())}
    inside = {module for module in model.modules() if module not in outer and module not in _children(outer)}
    devices = {
        name: torch.device("cuda", int(module in second))
        for name, module in model.named_modules()
        if module not in outer and module not in inside
    }
    for module in outer:
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            tag(tensor, 0)
    loose = {name for name, parameter in model.named_parameters() if tag_of(parameter) != _CPU}
    devices |= dict.fromkeys(loose, torch.device("cuda", 0))

    def place(module: nn.Module, name: str, device: Any, *args: Any, **kwargs: Any) -> None:
        tag(attrgetter(name)(module), device)

    skipped = getattr(model, "_skip_keys_device_placement", None)
    with mock.patch("accelerate.hooks.set_module_tensor_to_device", place):
        dispatch_model(model, devices, main_device=torch.device("cuda", 0), skip_keys=skipped)
    return model


def _children(modules: set[nn.Module]) -> set[nn.Module]:
    return {child for module in modules for child in module.children()}


@contextmanager
def fake_devices() -> Iterator[None]:
    """Let tags count as devices in the block."""
    with _Devices():
        yield


class _Devices(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        own = _OWN.get(func)
        if own is not None:
            return own(*args, **kwargs)
        target = None
        if kwargs.get("device") is not None:
            target, kwargs["device"] = _device(kwargs["device"]), _CPU
        given = [value for value in tree_iter((args, kwargs)) if isinstance(value, Tensor)]
        source = _common(func, given)
        output = func(*args, **kwargs)
        for made in tree_iter(output):
            if isinstance(made, Tensor) and (target is not None or not any(made is value for value in given)):
                tag(made, target or source)
        return output


def _common(func: Any, given: list[Tensor]) -> torch.device:
    """The device of an operation's tensors.

    Raises:
        RuntimeError: where there are two. Numbers, and indices on the CPU, may come from anywhere, as with CUDA.
    """
    if func in _BETWEEN_DEVICES:
        return tag_of(given[0])
    indexed = func in (Tensor.__getitem__, Tensor.__setitem__)
    placed = [tensor for tensor in given if tensor.dim()]
    if indexed:
        placed = [tensor for tensor in placed if tensor is given[0] or tag_of(tensor) != _CPU]
    devices = {tag_of(tensor) for tensor in placed}
    if len(devices) > 1 and func not in _ANYWHERE:
        found = ", ".join(sorted(map(str, devices)))
        raise RuntimeError(f"Expected all tensors to be on the same device, but found {found} in {func}")
    if devices:
        return tag_of(placed[0])
    return tag_of(given[0]) if given else _CPU


def _device(device: Any) -> torch.device:
    return torch.device("cuda", device) if isinstance(device, int) else torch.device(device)


def _moved(tensor: Tensor, device: torch.device | None) -> Tensor:
    if device is None or device == tag_of(tensor):
        return tensor
    with torch._C.DisableTorchFunction():
        return tag(tensor.view_as(tensor), device)


def _to(tensor: Tensor, *args: Any, device: Any = None, non_blocking: bool = False, **kwargs: Any) -> Tensor:
    """`Tensor.to` in all its forms."""
    others = []
    for number, value in enumerate(args):
        if isinstance(value, Tensor):
            device, others = tag_of(value), [*others, value.dtype]
        elif isinstance(value, torch.device | str) or (number == 0 and type(value) is int):
            device = value
        elif not isinstance(value, bool):
            others.append(value)
    with torch._C.DisableTorchFunction():
        converted = tensor.to(*others, **kwargs) if others or kwargs else tensor
    if converted is not tensor:
        tag(converted, tag_of(tensor))
    return _moved(converted, None if device is None else _device(device))


_OWN: dict[Any, Callable[..., Any]] = {
    Tensor.device.__get__: tag_of,  # type: ignore[attr-defined]
    Tensor.is_cuda.__get__: lambda tensor: tag_of(tensor).type == "cuda",  # type: ignore[attr-defined]
    Tensor.get_device: lambda tensor: -1 if tag_of(tensor) == _CPU else tag_of(tensor).index,
    Tensor.to: _to,
    Tensor.cpu: lambda tensor: _moved(tensor, _CPU),
    Tensor.cuda: lambda tensor, device=0: _moved(tensor, _device(device)),
}
_BETWEEN_DEVICES = (Tensor.copy_,)
_ANYWHERE = (torch._has_compatible_shallow_copy_type, Tensor.grad.__set__, Tensor.data.__set__)  # type: ignore[attr-defined]
