"""Measure the cost of a run's requests, from the tokens that each prefill kept."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from functools import wraps
from typing import Any

from torch import Tensor

from pyramiddrop import Method, apply, remove
from pyramiddrop.inference.checkpoint import decoder_layers
from pyramiddrop.inference.prefill_stats import batch_usage


class GenerationError(BaseException):
    """Carries an error of `generate` through backends that would otherwise catch it and give an empty answer."""

    def __init__(self, carried: Exception) -> None:
        self.carried = carried


@dataclass(frozen=True)
class CostSums:
    """Sums over requests: visual tokens, those in a layer on average, and FLOPs and bytes of the prefill as in `Usage`.

    FLOPs and bytes are NaN if the cost model does not know the text model.
    """

    requests: int = 0
    visual_tokens: float = 0
    retained_tokens: float = 0
    flops: float = 0
    vanilla_flops: float = 0
    kv_bytes: float = 0
    vanilla_kv_bytes: float = 0

    def __add__(self, other: CostSums) -> CostSums:
        return CostSums(*(mine + yours for mine, yours in zip(astuple(self), astuple(other), strict=True)))

    def averages(self) -> dict[str, float]:
        """The averages over requests, and their ratios to vanilla's, without unknown values."""
        if not self.requests:
            return {}
        found = {
            "requests_measured": float(self.requests),
            "visual_tokens": self.visual_tokens / self.requests,
            "retained_visual_tokens": self.retained_tokens / self.requests,
            "prefill_flops": self.flops / self.requests,
            "flops_ratio": self.flops / self.vanilla_flops,
            "kv_bytes": self.kv_bytes / self.requests,
            "kv_ratio": self.kv_bytes / self.vanilla_kv_bytes,
        }
        return {name: value for name, value in found.items() if not math.isnan(value)}


#: The names of the averages.
COSTS = tuple(CostSums(1, 1, 1, 1, 1, 1, 1).averages())


class Meter:
    """Applies a method (None: vanilla) to a Transformers model and measures each call of its `generate`."""

    def __init__(self, model: Any, method: Method | None) -> None:
        self.by_task: dict[str, CostSums] = defaultdict(CostSums)
        self._model, self._method, self._task = model, method, ""
        self._trace = apply(model, method) if method else None
        self._before = model.__dict__.get("generate")
        model.__dict__["generate"] = self._measured(model.generate)

    @contextmanager
    def task(self, name: str, requests: int) -> Iterator[None]:
        """Count the calls within the block for this task; RuntimeError if they are not as many as its `requests`."""
        self._task, before = name, self.by_task[name].requests
        try:
            yield
        except GenerationError as error:
            raise error.carried from None
        if (done := self.by_task[name].requests - before) != requests:
            raise RuntimeError(f"{done} of {requests} requests of {name} went through the model under the method")

    def detach(self) -> None:
        """Remove the meter and the method from the model."""
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
                costs = self._account(kwargs)
            except Exception as error:
                raise GenerationError(error) from error
            self.by_task[self._task] += costs
            return output

        return measured

    def _account(self, inputs: Mapping[str, Any]) -> CostSums:
        samples, layers = len(inputs["input_ids"]), decoder_layers(self._model.config)
        beams = len(self._trace.visual_columns) // samples if self._trace else 1
        tokens = {
            name: inputs[name].repeat_interleave(beams, 0)
            for name in ("input_ids", "attention_mask")
            if isinstance(inputs.get(name), Tensor)
        }
        plain = batch_usage(self._model, tokens)[::beams]
        used = batch_usage(self._model, tokens, self._method, self._trace)[::beams] if self._trace else plain
        costs = CostSums()
        for own, full in zip(used, plain, strict=True):
            retained = sum(own.by_layer(layers)) / layers
            costs += CostSums(1, own.visual_tokens, retained, own.flops, full.flops, own.kv_bytes, full.kv_bytes)
        return costs
