"""Owns a model for VLMEvalKit: any checkpoint that pyramiddrop supports, answering under a method.

from pyramiddrop_vlm import register
register("llava-1.5-7b-pyramiddrop", "llava-hf/llava-1.5-7b-hf", "pyramiddrop:lam=0.5")
"""

from __future__ import annotations

import atexit
from functools import partial
from pathlib import Path
from typing import Any

from vlmeval.config import supported_VLM
from vlmeval.vlm.base import BaseModel

from pyramiddrop.inference.answer import ask
from pyramiddrop.inference.checkpoint import load_checkpoint
from pyramiddrop.inference.prefill_stats import batch_usage, usage
from pyramiddrop.inference.prompt import build_inputs, open_picture
from pyramiddrop.inference.resolve import parse_method


def register(name: str, checkpoint: str, method: str = "pyramiddrop", **options: Any) -> None:
    """Make `name` a model of VLMEvalKit's, for `run.py --model NAME`; it is loaded when it is asked for.

    Args:
        checkpoint: a folder in Hugging Face's format, or a name on the hub.
        method: in one word, as `pyramiddrop eval` takes it: "fastv:layer=3,keep=0.25", "vanilla".
        options: of DroppingVLM.
    """
    supported_VLM[name] = partial(DroppingVLM, checkpoint, method, **options)


class DroppingVLM(BaseModel):  # type: ignore[misc]
    """Pictures and words in any order -> an answer. At the end of the run it says what the prefills have cost."""

    INTERLEAVE = True
    allowed_types = ("text", "image")

    def __init__(
        self, checkpoint: str, method: str = "pyramiddrop", max_new_tokens: int = 512, device: str | None = None
    ) -> None:
        super().__init__()
        self.checkpoint, self.method = load_checkpoint(checkpoint, device), parse_method(method)
        self.max_new_tokens = max_new_tokens
        self.flops, self.vanilla_flops, self.questions = 0.0, 0.0, 0
        atexit.register(self.report)

    def generate_inner(self, message: list[dict[str, str]], dataset: str | None = None) -> str:
        """The answer to one message: parts with a `type` ("image" or "text") and a `value` (a file, or words)."""
        inputs = self._inputs(message)
        answer = ask(self.checkpoint, inputs, self.method, self.max_new_tokens)
        [vanilla] = batch_usage(self.checkpoint.model, inputs)
        self.questions += 1
        self.flops += usage(answer.trace).flops if answer.trace else vanilla.flops
        self.vanilla_flops += vanilla.flops
        return answer.text

    def _inputs(self, message: list[dict[str, str]]) -> Any:
        parts = [(part["type"], part["value"]) for part in message]
        if getattr(self.checkpoint.processor, "chat_template", None) is None:
            pictures = [open_picture(Path(value)) for kind, value in parts if kind == "image"]
            return build_inputs(
                self.checkpoint.processor, pictures, "\n".join(value for kind, value in parts if kind == "text")
            )
        content = [
            {"type": kind, kind: open_picture(Path(value)) if kind == "image" else value} for kind, value in parts
        ]
        return self.checkpoint.processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )

    def report(self) -> None:
        """Say what the prefills have cost."""
        if self.questions:
            share = self.flops / self.vanilla_flops
            print(f"pyramiddrop: {self.questions} questions, {share:.1%} of the prefill FLOPs without dropping")
