"""lmms-eval's model `pyramiddrop`: a backend (our generic one, or lmms-eval's) whose model drops visual tokens."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from copy import copy
from functools import partial
from operator import itemgetter
from time import perf_counter
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import gather_object
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.models.model_utils.gen_metrics import log_metrics
from lmms_eval.protocol import ChatMessages
from lmms_eval.utils import Collator
from loguru import logger
from tqdm import tqdm
from transformers.video_utils import load_video

from pyramiddrop.evaluation.lmms.arguments import load_backend, pick_backend, read_arguments, where
from pyramiddrop.evaluation.lmms.meter import CostSums, Meter
from pyramiddrop.inference import InputError, user_input
from pyramiddrop.inference.answer import pad_token
from pyramiddrop.inference.checkpoint import load_checkpoint, read_config
from pyramiddrop.inference.prompt import build_batch, on_model

#: lmms-eval's mark on requests that only pad the work of processes.
PADDING = "__padding_only__"
#: The averages that the results have for each task too.
BY_TASK = ("flops_ratio", "kv_ratio", "retained_visual_tokens")


class DroppingChat(lmms):
    """`lmms-eval --model pyramiddrop`: answers chat messages under a method.

    Args:
        pretrained: a folder in Hugging Face's format, or a name on the hub.
        max_batch_size: passed by lmms-eval and not used, because there is no search for a batch size.
        given: `method` and its fields, `backend`, and the backend's arguments; InputError if one cannot be used.
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
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise InputError(f"batch_size must be a whole number of at least 1; got {batch_size!r}")
        batch, state = int(batch_size), PartialState()
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
        return self.inner.device  # type: ignore[no-any-return]

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


def _by_task(requests: list[Instance]) -> dict[str, list[int]]:
    """Indices in `requests` by task; padding requests come last, as PADDING."""
    places: dict[str, list[int]] = defaultdict(list)
    for place, request in enumerate(requests):
        places[PADDING if request.metadata.get(PADDING) else request.task_name].append(place)
    return dict(sorted(places.items(), key=lambda one: one[0] == PADDING))


def _own_copy(request: Instance) -> Instance:
    """A copy of the request with its own generation arguments, because some backends change them."""
    # lmms-eval makes a request without messages from a task that is given as a folder.
    if not callable(request.args[1]):
        raise InputError("a task of one's own is given by its name, and its folder by --include_path")
    own = copy(request)
    own.arguments = tuple(dict(part) if isinstance(part, dict) else part for part in request.arguments)
    return own


def _report(parts: list[dict[str, CostSums]]) -> None:
    """Add the averages over all requests, and those of each task, to lmms-eval's results."""
    by_task: dict[str, CostSums] = defaultdict(CostSums)
    for part in parts:
        for task, costs in part.items():
            by_task[task] += costs
    by_task.pop(PADDING, None)
    metrics = sum(by_task.values(), CostSums()).averages()
    for task, costs in by_task.items():
        metrics |= {f"{name}/{task}": value for name, value in costs.averages().items() if name in BY_TASK}
    if metrics:
        log_metrics(total_elapsed_time=0.0, total_gen_tokens=0, avg_speed=0.0, additional_metrics=metrics)


#: Arguments of `generate` that a task may set, with the defaults of lmms-eval's LLaVA class.
DEFAULTS: dict[str, Any] = {"max_new_tokens": 1024, "temperature": 0.0, "top_p": None, "num_beams": 1}
KNOWN = {*DEFAULTS, "do_sample", "top_k", "repetition_penalty", "length_penalty", "min_new_tokens"}


class Chat(lmms):
    """A chat model of lmms-eval for any checkpoint that the library supports, with left-padded prompts.

    Arguments are those of `pyramiddrop generate`; `num_frames` are taken of each video, evenly spaced.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str,
        device: str | None = None,
        dtype: str | None = None,
        batch_size: int = 1,
        num_frames: int = 32,
    ) -> None:
        super().__init__()
        self.accelerator = Accelerator()
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        self.checkpoint = load_checkpoint(pretrained, device, dtype)
        tokenizer = self.checkpoint.processor.tokenizer
        tokenizer.padding_side = "left"
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        self.batch_size, self.num_frames = batch_size, num_frames
        self._warned: set[str] = set()

    @property
    def model(self) -> Any:
        """The Transformers model."""
        return self.checkpoint.model

    @property
    def device(self) -> torch.device:
        """The device of the model."""
        return self.model.device  # type: ignore[no-any-return]

    def clean(self) -> None:
        """Free the checkpoint."""
        del self.checkpoint
        super().clean()

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        raise NotImplementedError("generic chat models answer generate_until requests only")

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        raise NotImplementedError("generic chat models answer generate_until requests only")

    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        """Answers in the order of `requests`; those with the same generation arguments share batches."""
        asked = [request.args for request in requests]
        order = Collator(asked, itemgetter(3, 0), group_fn=itemgetter(2), grouping=True)  # in the order of documents
        answers: list[GenerationResult] = []
        started = perf_counter()
        with tqdm(total=len(requests), disable=self.rank != 0, desc="Model Responding") as bar:
            for chunk in order.get_batched(n=self.batch_size):
                answers += self._answer(chunk)
                bar.update(len(chunk))
        seconds = perf_counter() - started
        tokens = sum(answer.token_counts.output_tokens for answer in answers)
        log_metrics(total_elapsed_time=seconds, total_gen_tokens=tokens, avg_speed=tokens / seconds)
        return list(order.get_original(answers))

    def _answer(self, chunk: Sequence[tuple[Any, ...]]) -> list[GenerationResult]:
        asked = chunk[0][2]
        inputs = self._inputs([self._messages(args) for args in chunk])
        with torch.inference_mode():
            output = self.model.generate(**inputs, **self._generation(asked))
        new = output[:, inputs["input_ids"].shape[1] :]
        texts = self.checkpoint.processor.tokenizer.batch_decode(new, skip_special_tokens=True)
        lengths = (new != pad_token(self.model, self.checkpoint.processor.tokenizer)).sum(1).tolist()
        return [
            GenerationResult(_cut(text, asked.get("until")), TokenCounts(output_tokens=length))
            for text, length in zip(texts, lengths, strict=True)
        ]

    def _messages(self, args: tuple[Any, ...]) -> list[dict[str, Any]]:
        _, doc_to_messages, _, document, task, split = args
        messages = ChatMessages(messages=doc_to_messages(self.task_dict[task][split][document]))
        if messages.extract_media()[2]:
            raise InputError(f"task {task} asks about sound, which is not supported")
        return messages.to_hf_messages()  # type: ignore[no-any-return]

    def _inputs(self, conversations: list[list[dict[str, Any]]]) -> dict[str, Any]:
        processor = self.checkpoint.processor
        if getattr(processor, "chat_template", None) is None:
            return on_model(self.model, build_batch(processor, list(map(_plain_question, conversations))))
        inputs = processor.apply_chat_template(
            conversations,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True, **self._films(conversations)},
        )
        return on_model(self.model, inputs)

    def _films(self, conversations: list[list[dict[str, Any]]]) -> dict[str, Any]:
        """Replace each video file by its frames; returns the processor's metadata for them."""
        known = []
        parts = (part for turns in conversations for turn in turns for part in turn["content"])
        for part in parts:
            if part["type"] != "video":
                continue
            if not isinstance(part["video"], str):
                raise InputError(f"a video must be a file; a task gave {type(part['video']).__name__}")
            frames = partial(self._frames, part.pop("video_start", None), part.pop("video_end", None))
            part["video"], about = load_video(part["video"], backend="decord", sample_indices_fn=frames)
            known.append(about)
        return {"video_metadata": known, "do_sample_frames": False} if known else {}

    def _frames(self, start: float | None, end: float | None, metadata: Any, **_: Any) -> np.ndarray[Any, Any]:
        """The numbers of evenly spaced frames from `start` to `end` (in seconds; None: of the whole video)."""
        final = metadata.total_num_frames - 1
        first = 0 if start is None else min(int(start * metadata.fps), final)
        last = final if end is None else max(first, min(int(end * metadata.fps), final))
        return np.linspace(first, last, min(self.num_frames, last - first + 1), dtype=int)

    def _generation(self, asked: dict[str, Any]) -> dict[str, Any]:
        """The arguments of `generate`; as in lmms-eval, a temperature above 0 means sampling, and 0 means greedy."""
        for name in sorted(set(asked) - KNOWN - {"until"} - self._warned):
            logger.warning(f"the generation argument {name!r} of a task is not used")
            self._warned.add(name)
        given = DEFAULTS | {name: value for name, value in asked.items() if name in KNOWN}
        given["do_sample"] = bool(given["temperature"])
        if not given["do_sample"]:
            given |= {"temperature": None, "top_p": None, "top_k": None}
        return given | {"pad_token_id": pad_token(self.model, self.checkpoint.processor.tokenizer)}


def _cut(text: str, until: str | list[str] | None) -> str:
    """The text before the first of the task's end strings."""
    for mark in [until] if isinstance(until, str) else until or []:
        if mark:
            text = text.split(mark)[0]
    return text


def _plain_question(turns: list[dict[str, Any]]) -> tuple[list[Any], str]:
    """The pictures and the text of a single question, for checkpoints without a chat template."""
    parts = [part for turn in turns for part in turn["content"]]
    if len(turns) != 1 or any(part["type"] == "video" for part in parts):
        raise InputError("this checkpoint has no chat template: it takes one question about pictures, no more")
    pictures = [part["image"] for part in parts if part["type"] == "image"]
    return pictures, "\n".join(part["text"] for part in parts if part["type"] == "text")
