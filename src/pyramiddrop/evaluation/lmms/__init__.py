"""lmms-eval 0.7 under any method: `lmms-eval --model pyramiddrop`, or `run.run_tasks`. Needs the extra `eval`."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lmms_eval.models.registry_v2 import ModelManifest

MODEL = "pyramiddrop"


def manifest() -> ModelManifest:
    """The manifest of the chat model `pyramiddrop`, whose class lmms-eval imports on demand."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(MODEL, chat_class_path="pyramiddrop.evaluation.lmms.model.DroppingChat")
