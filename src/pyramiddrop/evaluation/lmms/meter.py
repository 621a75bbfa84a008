"""Measure what the requests of a run cost, from what each prefill kept."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from functools import wraps
from typing import Any

from torch import Tensor

from pyramiddrop import Method, apply, remove
from pyramiddrop.inference.checkpoint import decoder_layers
from pyramiddrop.inference.prefill_stats import Usage, batch_usage

#: What a run says of its requests, on average over them.
COSTS = (
    "requests_measured",
    "visual_tokens",
    "retained_visual_tokens",
    "prefill_flops",
    "flops_ratio",
    "kv_bytes",
    "kv_ratio",
)


class GenerationError(BaseException):
    """Carries an error out of `generate`, past backends that would catch it and go on with an empty answer."""

    def __init__(self, carried: Exception) -> None:
        self.carried = carried


@dataclass(frozen=True)
class Spent:
    """Sums over requests.

    Attributes:
        visual_tokens: what the pictures brought.
        retained_tokens: visual tokens of a layer, on average over the layers.
        flops, kv_bytes: of the prefill, as in Usage; NaN where the cost model does not know the text model.
        vanilla_flops, vanilla_kv_bytes: the same without dropping.
    """

    requests: int = 0
    visual_tokens: float = 0
    retained_tokens: float = 0
    flops: float = 0
    vanilla_flops: float = 0
    kv_bytes: float = 0
    vanilla_kv_bytes: float = 0

    def __add__(self, other: Spent) -> Spent:
        return Spent(*(mine + yours for mine, yours in zip(astuple(self), astuple(other), strict=True)))

    def averages(self) -> dict[str, float]:
        """Of a request, and the ratios to no dropping; what is not known is not there."""
        if not self.requests:
            return {}
        values = (
            float(self.requests),
            self.visual_tokens / self.requests,
            self.retained_tokens / self.requests,
            self.flops / self.requests,
            self.flops / self.vanilla_flops,
            self.kv_bytes / self.requests,
            self.kv_bytes / self.vanilla_kv_bytes,
        )
        return {name: value for name, value in zip(COSTS, values, strict=True) if not math.isnan(value)}


class Meter:
    """A method on a model, and an account of each call of its `generate`.

    Args:
        model: a Transformers model; `detach` gives it back as it was.
        method: None for vanilla.
    """

    def __init__(self, model: Any, method: Method | None) -> None:
        self.by_task: dict[str, Spent] = {}
        self._model, self._method, self._task = model, method, ""
        self._trace = apply(model, method) if method else None
        self._before = model.__dict__.get("generate")
        model.__dict__["generate"] = self._measured(model.generate)

    @contextmanager
    def task(self, name: str, requests: int) -> Iterator[None]:
        """Put what is generated inside to this task's account.

        Raises:
            RuntimeError: where not all `requests` went through the model under the method.
        """
        self._task, before = name, self.by_task.get(name, Spent())
        try:
            yield
        except GenerationError as error:
            raise error.carried from None
        done = self.by_task.get(name, before).requests - before.requests
        if done != requests:
            raise RuntimeError(f"{done} of {requests} requests of {name} went through the model under the method")

    def detach(self) -> None:
        """Take the meter and the method off the model."""
        del self._model.__dict__["generate"]
        if self._before is not None:
            self._model.__dict__["generate"] = self._before
        if self._method is not None:
            remove(self._model)

    def _measured(self, generate: Any) -> Any:
        @wraps(generate)
        def measured(*args: Any, **kwargs: Any) -> Any:
            before = self._trace.visual_columns if self._trace else None
            try:
                output = generate(*args, **kwargs)
                if self._trace and self._trace.visual_columns is before:
                    raise RuntimeError("the method took no part in this prefill")
                spent = self._account(kwargs)
            except Exception as error:
                raise GenerationError(error) from error
            self.by_task[self._task] = self.by_task.get(self._task, Spent()) + spent
            return output

        return measured

    def _account(self, inputs: Mapping[str, Any]) -> Spent:
        samples, layers = len(inputs["input_ids"]), decoder_layers(self._model.config)
        beams = len(self._trace.visual_columns) // samples if self._trace else 1
        tokens = {
            name: inputs[name].repeat_interleave(beams, 0)
            for name in ("input_ids", "attention_mask")
            if isinstance(inputs.get(name), Tensor)
        }
        plain = batch_usage(self._model, tokens)[::beams]
        used = batch_usage(self._model, tokens, self._method, self._trace)[::beams] if self._trace else plain
        pairs = zip(used, plain, strict=True)
        return sum((_spent(one, vanilla, layers) for one, vanilla in pairs), Spent())


def _spent(used: Usage, vanilla: Usage, layers: int) -> Spent:
    retained = sum(used.by_layer(layers)) / layers
    return Spent(1, used.visual_tokens, retained, used.flops, vanilla.flops, used.kv_bytes, vanilla.kv_bytes)
