"""Owns what lmms-eval finds at the entry point `lmms_eval.models`: the name of the model and where its class is."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lmms_eval.models.registry_v2 import ModelManifest

MODEL = "pyramiddrop"


def manifest() -> ModelManifest:
    """The manifest of the chat model `pyramiddrop`; lmms-eval imports the class when it is asked for."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(MODEL, chat_class_path="pyramiddrop.evaluation.lmms.model.DroppingChat")
