"""lmms-eval's model `pyramiddrop`: a backend whose model drops visual tokens, with the measured savings."""

from __future__ import annotations

from collections import defaultdict
from copy import copy
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from lmms_eval.models.model_utils.gen_metrics import log_metrics
from loguru import logger

from pyramiddrop.evaluation.lmms.arguments import load_backend, pick_backend, read_arguments, where
from pyramiddrop.evaluation.lmms.meter import CostSums, Meter
from pyramiddrop.inference import InputError, user_input
from pyramiddrop.inference.checkpoint import read_config

#: lmms-eval's mark on requests that only pad the work of processes.
PADDING = "__padding_only__"
#: The averages that the results have for each task too.
BY_TASK = ("flops_ratio", "kv_ratio", "retained_visual_tokens")


class DroppingChat(lmms):
    """`lmms-eval --model pyramiddrop`: answers chat messages under a method.

    Args:
        pretrained: a folder in Hugging Face's format, or a name on the hub.
        batch_size, device: lmms-eval's own options.
        max_batch_size: passed by lmms-eval and not used, because there is no search for a batch size.
        given: `method` and its fields, `backend`, and the backend's arguments.

    Raises:
        InputError: if an argument cannot be used.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str,
        batch_size: int | str = 1,
        device: str | None = None,
        max_batch_size: int | None = None,
        **given: Any,
    ) -> None:
        super().__init__()
        arguments, family = read_arguments(pretrained, given), read_config(pretrained).model_type
        batch, state = _whole(batch_size), PartialState()
        place = where(device, state.num_processes, str(state.device))
        backend = pick_backend(arguments.backend, family, batch, state.num_processes, place)
        self.inner = load_backend(backend, pretrained, batch, state.num_processes, place, arguments.passed)
        self.accelerator = self.inner.accelerator
        self._rank, self._world_size = self.inner.rank, self.inner.world_size
        with user_input():
            self.meter = Meter(self.inner.model, arguments.method)
        logger.info(f"pyramiddrop: {arguments.method or 'vanilla'} on backend {backend.name}")

    @property
    def device(self) -> torch.device:
        """The device of the model."""
        place: torch.device = self.inner.device
        return place

    def generate_until(self, requests: list[Instance]) -> list[Any]:
        """Answers in the order of `requests`, task by task."""
        self.inner.task_dict, self.inner.cache_hook = self.task_dict, self.cache_hook
        answers: dict[int, Any] = {}
        for task, places in _by_task(requests).items():
            with self.meter.task(task, len(places)):
                part = self.inner.generate_until([_own_copy(requests[place]) for place in places])
            answers |= dict(zip(places, part, strict=True))
        return [answers[place] for place in range(len(requests))]

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        raise NotImplementedError(
            "pyramiddrop is a chat model, and lmms-eval asks chat models for answers only: take a task whose "
            "output_type is generate_until"
        )

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        raise NotImplementedError(
            "pyramiddrop answers single rounds only: a further round would ask with the visual tokens that the first "
            "question kept"
        )

    def clean(self) -> None:
        """Add the costs to the results and free the model; called once by each process at the end."""
        self.meter.detach()
        parts = gather_object([self.meter.by_task])
        if self.rank == 0:
            _report(parts)
        del self.meter
        self.inner.clean()


def _whole(batch: int | str) -> int:
    if not str(batch).isdecimal() or int(batch) < 1:
        raise InputError(f"batch_size must be a whole number of at least 1; got {batch!r}")
    return int(batch)


def _by_task(requests: list[Instance]) -> dict[str, list[int]]:
    """Indices in `requests` by task; padding requests come last, as PADDING."""
    places: dict[str, list[int]] = defaultdict(list)
    for padding in (False, True):
        for place, request in enumerate(requests):
            if bool(request.metadata.get(PADDING)) == padding:
                places[PADDING if padding else request.task_name].append(place)
    return dict(places)


def _own_copy(request: Instance) -> Instance:
    """A copy of the request with its own generation arguments, because some backends change them.

    Raises:
        InputError: for a request without messages, as lmms-eval makes from a task that is given as a folder.
    """
    if not callable(request.args[1]):
        raise InputError("a task of one's own is given by its name, and its folder by --include_path")
    own = copy(request)
    own.arguments = tuple(dict(part) if isinstance(part, dict) else part for part in request.arguments)
    return own


def _report(parts: list[dict[str, CostSums]]) -> None:
    """Add the averages over all requests, and those of each task, to lmms-eval's results."""
    by_task: dict[str, CostSums] = {}
    for part in parts:
        for task, costs in part.items():
            if task != PADDING:
                by_task[task] = by_task.get(task, CostSums()) + costs
    metrics = sum(by_task.values(), CostSums()).averages()
    for task, costs in by_task.items():
        metrics |= {f"{name}/{task}": value for name, value in costs.averages().items() if name in BY_TASK}
    if metrics:
        log_metrics(total_elapsed_time=0.0, total_gen_tokens=0, avg_speed=0.0, additional_metrics=metrics)
