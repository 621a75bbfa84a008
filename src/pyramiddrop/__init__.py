"""PyramidDrop: make vision-language models cheaper by dropping visual tokens inside the language model, in stages.

>>> from pyramiddrop import PyramidDrop
>>> with PyramidDrop()(model) as trace:
...     model.generate(**inputs)
"""

from importlib.metadata import version

from pyramiddrop.hf import UnsupportedModelError
from pyramiddrop.methods import METHODS, FastV, Method, PyramidDrop, RandomDrop, UniformDrop, apply, remove
from pyramiddrop.trace import Trace

__version__ = version("pyramiddrop")

__all__ = [
    "METHODS",
    "FastV",
    "Method",
    "PyramidDrop",
    "RandomDrop",
    "Trace",
    "UniformDrop",
    "UnsupportedModelError",
    "apply",
    "remove",
]
