"""Requests as lmms-eval's evaluator makes them for a chat model, without a task."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from typing import Any

from lmms_eval.api.instance import Instance, unwrap_generation_output

from pyramiddrop.evaluation.lmms.model import DroppingChat

TASK = "made up"
Turns = list[dict[str, Any]]


def user(*parts: Any) -> Turns:
    """One turn of pictures and words."""
    content = [
        {"type": "text", "text": part} if isinstance(part, str) else {"type": "image", "url": part} for part in parts
    ]
    return [{"role": "user", "content": content}]


def requests(model: DroppingChat, asked: Sequence[Turns], **generation: Any) -> list[Instance]:
    """A request for each conversation; `model` is told the documents, as the evaluator tells it."""
    model.task_dict = {TASK: {"test": list(asked)}}
    settings = {"max_new_tokens": 6} | generation
    return [
        Instance(
            "generate_until",
            ("", deepcopy, dict(settings), number, TASK, "test"),
            idx=0,
            metadata={"task": TASK, "doc_id": number, "repeats": 1},
        )
        for number in range(len(asked))
    ]


def answers(model: DroppingChat, asked: Sequence[Turns], **generation: Any) -> list[str]:
    """What the model answers."""
    return [unwrap_generation_output(one)[0] for one in model.generate_until(requests(model, asked, **generation))]
