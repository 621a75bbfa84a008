"""Prepare a user's request and run it; cheap checks come before weights are loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from pyramiddrop import Method
from pyramiddrop.assets import reader_checkpoint
from pyramiddrop.hf.model_info import UnsupportedModelError, inspect_model
from pyramiddrop.inference import InputError, user_input
from pyramiddrop.inference.answer import Comparison, ask, compare, usage_dict
from pyramiddrop.inference.checkpoint import Checkpoint, decoder_layers, load_checkpoint, read_config
from pyramiddrop.inference.prefill_stats import Usage, none_if_nan, usage, vanilla_usage
from pyramiddrop.inference.prompt import Video, build_inputs, check_prompt, open_picture
from pyramiddrop.inference.resolve import resolve_method
from pyramiddrop.inference.video import check_video, open_video
from pyramiddrop.trace import Trace

KNOWS = "the bundled model knows only its own kind of scenes, documents and charts"


@dataclass(frozen=True)
class Request:
    """A question about pictures and a video, with the model and method that answer it.

    Attributes:
        model: a folder or a name on the hub; None: the bundled model.
        method: a method specification; None: the saved method, or the paper's.
        frames: number of frames to read from the video.
    """

    prompt: str
    images: Sequence[Path]
    model: str | None = None
    method: str | None = None
    device: str | None = None
    dtype: str | None = None
    video: Path | None = None
    frames: int = 8


@dataclass(frozen=True)
class PreparedRequest:
    """A request that is ready to run. `method` is None for vanilla."""

    request: Request
    checkpoint: Checkpoint
    method: Method | None
    pictures: list[Image.Image]
    inputs: Any
    video: Video | None = None

    @property
    def remarks(self) -> list[str]:
        """Warnings about what the bundled model was not trained on; empty for a model that was named."""
        if self.request.model is not None:
            return []
        return bundled_remarks(self.checkpoint.processor, self.request.prompt, self.pictures)


def prepare(request: Request) -> PreparedRequest:
    """Check the request, load its checkpoint, and build the model's inputs. Raises InputError if any part of the
    request cannot be used."""
    source = request.model or str(reader_checkpoint())
    check_prompt(request.prompt, len(request.images), videos=request.video is not None)
    pictures, config = [open_picture(path) for path in request.images], read_config(source)
    video = None
    if request.video:
        check_video(config.model_type, source)
        video = open_video(request.video, request.frames)
    method = resolve_method(request.method, source, decoder_layers(config))
    checkpoint = load_checkpoint(source, request.device, request.dtype)
    inputs = build_inputs(checkpoint.processor, pictures, request.prompt, video)
    with user_input(caught=(UnsupportedModelError,)):
        inspect_model(checkpoint.model)
        if method is not None:
            with method(checkpoint.model):  # so that an unsupported combination fails before anything runs
                pass
    return PreparedRequest(request, checkpoint, method, pictures, inputs, video)


def bundled_remarks(processor: Any, prompt: str, pictures: Sequence[Image.Image]) -> list[str]:
    """Reasons why the bundled model's answer may be meaningless; empty if the request looks like its training data.

    Pictures are recognised by size alone, so a photograph of the training size is not noticed.
    """
    remarks = []
    tokens = processor.tokenizer(prompt, add_special_tokens=False, return_offsets_mapping=True)
    unknown = [
        prompt[start:end]
        for token, (start, end) in zip(tokens["input_ids"], tokens["offset_mapping"], strict=True)
        if token == processor.tokenizer.unk_token_id
    ]
    if unknown:
        words = ", ".join(map(repr, dict.fromkeys(unknown)))
        remarks.append(f"not in the bundled model's vocabulary: {words}; its answer may mean nothing")
    elif not tokens["input_ids"]:
        remarks.append(f"no word of {prompt!r} means anything to the bundled model; its answer means nothing")
    size = processor.image_processor.size
    own = size["width"], size["height"]
    foreign = [picture.size for picture in pictures if picture.size != own]
    if foreign:
        wide, high = foreign[0]
        remarks.append(f"a picture of {wide} x {high} is resized to {own[0]} x {own[1]}: {KNOWS}")
    return remarks


@dataclass(frozen=True)
class Run:
    """The result of a request. `trace` is None for vanilla, and `comparison` is None if none was requested."""

    ready: PreparedRequest
    answer: str
    usage: Usage
    vanilla: Usage
    trace: Trace | None
    comparison: Comparison | None = None

    @property
    def method(self) -> str:
        """The name of the method that answered."""
        return type(self.ready.method).__name__ if self.ready.method else "vanilla"

    def as_dict(self) -> dict[str, Any]:
        """FLOPs, bytes and seconds as plain numbers, with text."""
        request, model, video = self.ready.request, self.ready.checkpoint.model, self.ready.video
        return {
            "model": request.model or "bundled",
            "device": str(model.device),
            "dtype": str(model.dtype).removeprefix("torch."),
            "images": [str(path) for path in request.images],
            "video": {"path": str(request.video), "frames": video.metadata["frames_indices"]} if video else None,
            "prompt": request.prompt,
            "method": {**(self.ready.method.settings() if self.ready.method else {}), "name": self.method},
            "answer": self.answer,
            **usage_dict(self.usage),
            "vanilla_flops": none_if_nan(self.vanilla.flops),
            "vanilla_kv_bytes": none_if_nan(self.vanilla.kv_bytes),
            "flops_ratio": none_if_nan(self.usage.flops / self.vanilla.flops),
            "kv_ratio": none_if_nan(self.usage.kv_bytes / self.vanilla.kv_bytes),
            "comparison": self.comparison.as_dict() if self.comparison else None,
        }


def run(ready: PreparedRequest, max_new_tokens: int, streamer: Any = None) -> Run:
    """Answer the request; `streamer` is a Transformers streamer that receives the tokens as they are generated."""
    answer = ask(ready.checkpoint, ready.inputs, ready.method, max_new_tokens, streamer)
    plain = vanilla_usage(ready.checkpoint.model, ready.inputs)
    return Run(ready, answer.text, usage(answer.trace) if answer.trace else plain, plain, answer.trace)


def run_compared(ready: PreparedRequest, max_new_tokens: int) -> Run:
    """Answer the request without and with its method, and time both prefills. Raises InputError if the request is for
    vanilla itself."""
    if ready.method is None:
        raise InputError("there is nothing to compare vanilla with; name a method that drops tokens")
    found = compare(ready.checkpoint, ready.inputs, ready.method, max_new_tokens)
    return Run(ready, found.pruned.answer, found.pruned.usage, found.vanilla.usage, found.trace, found)
