"""lmms-eval 0.7 under any method: `lmms-eval --model pyramiddrop`, or `run.run_tasks`. Needs the extra `eval`."""

from typing import Any

MODEL = "pyramiddrop"


def manifest() -> Any:
    """The manifest of the chat model `pyramiddrop`, whose class lmms-eval imports on demand."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(MODEL, chat_class_path="pyramiddrop.evaluation.lmms.model.DroppingChat")
