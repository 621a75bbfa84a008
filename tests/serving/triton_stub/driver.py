"""The driver of the backend that is none: it says that there is one device, the CPU."""

from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase


class Driver(DriverBase):
    """Names the CPU where Triton asks for a device."""

    def __init__(self) -> None:
        pass

    @classmethod
    def is_active(cls) -> bool:
        return True

    def get_current_device(self) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_current_stream(self, *args: Any) -> int:
        return 0

    def get_device_interface(self) -> Any:
        return torch.cpu

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cpu", 0, 1)


Driver.__abstractmethods__ = frozenset()
