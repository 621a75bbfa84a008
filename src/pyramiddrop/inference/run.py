"""Run one prepared request: the answer with its cost, and the comparison with vanilla if asked for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pyramiddrop.inference.answer import ask
from pyramiddrop.inference.comparison import Comparison, compare, usage_dict
from pyramiddrop.inference.errors import InputError
from pyramiddrop.inference.request import Ready
from pyramiddrop.inference.usage import Usage, known, usage, vanilla_usage
from pyramiddrop.trace import Trace


@dataclass(frozen=True)
class Run:
    """What came of a request. `trace` is None for vanilla, `comparison` where none was asked for."""

    ready: Ready
    answer: str
    usage: Usage
    vanilla: Usage
    trace: Trace | None
    comparison: Comparison | None = None

    @property
    def method(self) -> str:
        """The name of what answered."""
        return type(self.ready.method).__name__ if self.ready.method else "vanilla"

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers and text: FLOPs, bytes and seconds."""
        request, model = self.ready.request, self.ready.checkpoint.model
        return {
            "model": request.model or "bundled",
            "device": str(model.device),
            "dtype": str(model.dtype).removeprefix("torch."),
            "images": [str(path) for path in request.images],
            "video": self._video(),
            "prompt": request.prompt,
            "method": {**(self.ready.method.settings() if self.ready.method else {}), "name": self.method},
            "answer": self.answer,
            **usage_dict(self.usage),
            "vanilla_flops": known(self.vanilla.flops),
            "vanilla_kv_bytes": known(self.vanilla.kv_bytes),
            "flops_ratio": known(self.usage.flops / self.vanilla.flops),
            "kv_ratio": known(self.usage.kv_bytes / self.vanilla.kv_bytes),
            "comparison": self.comparison.as_dict() if self.comparison else None,
        }

    def _video(self) -> dict[str, Any] | None:
        """The video, and the numbers of the frames that were taken of it."""
        film = self.ready.film
        return {"path": str(self.ready.request.video), "frames": film.about["frames_indices"]} if film else None


def run(ready: Ready, max_new_tokens: int, streamer: Any = None) -> Run:
    """Answer the request; `streamer` is a Transformers streamer that gets the tokens as they come."""
    answer = ask(ready.checkpoint, ready.inputs, ready.method, max_new_tokens, streamer)
    plain = vanilla_usage(ready.checkpoint.model, ready.inputs)
    return Run(ready, answer.text, usage(answer.trace) if answer.trace else plain, plain, answer.trace)


def run_compared(ready: Ready, max_new_tokens: int) -> Run:
    """Answer the request without and with its method, and time both prefills.

    Raises:
        InputError: where the request is for vanilla itself.
    """
    if ready.method is None:
        raise InputError("there is nothing to compare vanilla with; name a method that drops tokens")
    found = compare(ready.checkpoint, ready.inputs, ready.method, max_new_tokens)
    return Run(ready, found.pruned.answer, found.pruned.usage, found.vanilla.usage, found.trace, found)
