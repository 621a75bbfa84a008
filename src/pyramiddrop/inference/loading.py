"""Load a model with the method that it was trained with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoModelForImageTextToText

from pyramiddrop.inference.choice import saved_method
from pyramiddrop.methods import Method, apply

SAVED = "saved"


def load(source: str | Path, method: Method | str | None = SAVED, **options: Any) -> Any:
    """Load a model, and apply the method that was saved beside it.

    >>> model = pyramiddrop.load("runs/my-llava")          # as it was trained; as it is where nothing was saved
    >>> model = pyramiddrop.load("runs/my-llava", None)    # without dropping

    Args:
        source: a folder or a name on the hub, of a whole model or of a LoRA adapter.
        method: another one, or None for none.
        options: of `AutoModelForImageTextToText.from_pretrained`.

    Raises:
        ValueError: for a `pyramiddrop.json` that cannot be read, or a method that does not fit the model.
    """
    if isinstance(method, str) and method != SAVED:
        raise ValueError(f"method must be a Method, {SAVED!r} or None; got {method!r}")
    chosen = saved_method(source) if isinstance(method, str) else method
    model = AutoModelForImageTextToText.from_pretrained(source, **options)
    if chosen is not None:
        apply(model, chosen)
    return model
