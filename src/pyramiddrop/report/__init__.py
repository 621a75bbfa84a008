"""Pictures, tables and pages that show which tokens were kept and what they cost.

>>> from pyramiddrop.report import visualize
>>> visualize(trace, model.config, processor, images, inputs).save("kept.html")
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pyramiddrop.report.pictures.visual import Visual as Visual
    from pyramiddrop.report.pictures.visual import visualize as visualize

__all__ = ["Visual", "visualize"]


def __getattr__(name: str) -> Any:  # lazy, because the command line's tables need no matplotlib
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module("pyramiddrop.report.pictures.visual"), name)
