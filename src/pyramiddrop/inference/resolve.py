"""Find the method to run: the specified one, the one saved beside a checkpoint, or the paper's."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from pyramiddrop.inference import user_input
from pyramiddrop.method_spec import parse_method_spec
from pyramiddrop.methods import FILE_NAME, Compose, Method, PyramidDrop


def resolve_method(spec: str | None, source: str | Path, num_layers: int) -> Method | None:
    """Parse the method in `spec` and check it against a model of `num_layers` layers; None for vanilla. Raises
    InputError for an unknown method, an option that the method does not have, or a bad value.

    Args:
        spec: as for `parse_method_spec`; None: the method saved beside the checkpoint `source`, or else the paper's
            PyramidDrop.
    """
    method = (saved_method(source) or PyramidDrop()) if spec is None else parse_method(spec)
    if method is not None:
        with user_input():
            method.schedule(num_layers)
    return method


def parse_method(spec: str) -> Method | None:
    """`parse_method_spec` whose errors are InputErrors."""
    with user_input():
        return parse_method_spec(spec)


def with_logits(method: Method, logits: str) -> Method:
    """The same method with other `logits` ("auto", "full" or "kept"), in a composition in both of its methods."""
    changes: dict[str, Any] = {"logits": logits}
    if isinstance(method, Compose):
        changes = {
            name: replace(part, **changes) for name, part in zip(("before", "inside"), method.parts, strict=True)
        }
    return replace(method, **changes)


def saved_method(source: str | Path) -> Method | None:
    """The method saved beside the checkpoint `source` (a folder or a name on the hub), or None. Raises InputError if
    its file cannot be read as a method."""
    from transformers.utils import cached_file

    try:
        found = cached_file(source, FILE_NAME)
    except OSError:  # the file does not exist, or the hub is out of reach and it was never downloaded
        return None
    with user_input(f"cannot use the {FILE_NAME} of {source}"):
        return Method.from_pretrained(Path(str(found)).parent)
