"""Owns the way from a run to its overlay on disk: the pictures as the model saw them, and what it kept of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from pyramiddrop.inference.checkpoint import Checkpoint
from pyramiddrop.report.layout import Seen, look
from pyramiddrop.report.overlay import draw_overlay, save_overlay
from pyramiddrop.report.spans import Span, spans
from pyramiddrop.trace import Trace


def kept_views(
    checkpoint: Checkpoint, pictures: Sequence[Image.Image], trace: Trace, grids: Any = None
) -> tuple[list[Seen], list[Span]]:
    """The views of the pictures, and the spans of layers with the tokens alive in each.

    `grids` is the processor's `image_grid_thw`, which families of dynamic resolution need.

    Raises:
        ValueError: for a model family whose visual tokens cannot be placed in the picture.
    """
    seen = look(checkpoint.model.config, checkpoint.processor.image_processor, pictures, grids)
    return seen, spans(trace, [one.view for one in seen])


def write_overlay(
    path: Path,
    checkpoint: Checkpoint,
    pictures: Sequence[Image.Image],
    trace: Trace,
    title: str,
    subtitle: str,
    grids: Any = None,
) -> None:
    """Draw what `trace` kept of `pictures` into the file `path`; see :func:`kept_views` for errors."""
    seen, layers = kept_views(checkpoint, pictures, trace, grids)
    save_overlay(draw_overlay(seen, layers, title, subtitle), path)
