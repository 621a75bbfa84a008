"""Choose the methods that an evaluation compares, and check that they fit the model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pyramiddrop.hf import attachment_of
from pyramiddrop.inference.choice import VANILLA, method_label, parse_method, saved_method
from pyramiddrop.inference.errors import InputError
from pyramiddrop.methods import Method
from pyramiddrop.speed.predicted import PUBLISHED


def choose_methods(words: Sequence[str], source: str) -> list[Method]:
    """The methods that `words` name; vanilla, which always runs, is not among them.

    Without any word: the method saved beside the checkpoint `source`, or else those published.

    Raises:
        InputError: for an unknown method, option or value, or a method that is named twice.
    """
    saved = None if words else saved_method(source)
    if saved is not None:
        return [saved]
    methods = [method for method in map(parse_method, words or PUBLISHED) if method is not None]
    if len(methods) < len(words) - 1:
        raise InputError(f"{VANILLA} is named twice; it always runs, once")
    labels = [method_label(method) for method in methods]
    for label in labels:
        if labels.count(label) > 1:
            raise InputError(f"{label} is named twice")
    return methods


def drop_layers(model: Any, method: Method) -> tuple[int, ...]:
    """The layers before which `method` drops in `model`, where it also sees whether it can work there.

    Raises:
        UnsupportedModelError, ValueError: where it cannot.
    """
    with method(model):
        attachment = attachment_of(model)
        assert attachment is not None
        return attachment.rules.schedule.layers
