"""PyramidDrop: make vision-language models cheaper by dropping visual tokens inside the language model, in stages.

>>> from pyramiddrop import PyramidDrop
>>> with PyramidDrop()(model) as trace:
...     model.generate(**inputs)
"""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pyramiddrop.hf import UnsupportedModelError as UnsupportedModelError
    from pyramiddrop.inference.checkpoint import load as load
    from pyramiddrop.methods import METHODS as METHODS
    from pyramiddrop.methods import Compose as Compose
    from pyramiddrop.methods import Downsample as Downsample
    from pyramiddrop.methods import FastV as FastV
    from pyramiddrop.methods import Method as Method
    from pyramiddrop.methods import PyramidDrop as PyramidDrop
    from pyramiddrop.methods import RandomDrop as RandomDrop
    from pyramiddrop.methods import UniformDrop as UniformDrop
    from pyramiddrop.methods import VisionDrop as VisionDrop
    from pyramiddrop.methods import apply as apply
    from pyramiddrop.methods import current_method as current_method
    from pyramiddrop.methods import remove as remove
    from pyramiddrop.methods import trace_of as trace_of
    from pyramiddrop.trace import Trace as Trace

__version__ = version("pyramiddrop")

# Loaded when first asked for: Transformers takes seconds to import, and `pyramiddrop --help` needs none of it.
_HOMES = {
    "Trace": "pyramiddrop.trace",
    "UnsupportedModelError": "pyramiddrop.hf",
    "load": "pyramiddrop.inference.checkpoint",
    **dict.fromkeys(("METHODS", "Compose", "Downsample", "FastV", "Method", "PyramidDrop"), "pyramiddrop.methods"),
    **dict.fromkeys(("RandomDrop", "UniformDrop", "VisionDrop"), "pyramiddrop.methods"),
    **dict.fromkeys(("apply", "current_method", "remove", "trace_of"), "pyramiddrop.methods"),
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
