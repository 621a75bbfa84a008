"""The model to measure: a checkpoint with the user's pictures, or random weights of a real model's sizes."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

from pyramiddrop import Method
from pyramiddrop.cost import PRESETS, DecoderShape, Prompt
from pyramiddrop.hf.model_info import ModelInfo, inspect_model
from pyramiddrop.inference import InputError
from pyramiddrop.inference.checkpoint import DTYPES, pick_dtype
from pyramiddrop.inference.prompt import on_model
from pyramiddrop.inference.request import PreparedRequest
from pyramiddrop.inference.timing import text_config
from pyramiddrop.speed.memory import total_memory

#: Sizes of a decoder, and the visual tokens of its usual picture: real models and five small shapes.
SHAPES: dict[str, tuple[DecoderShape, int]] = {
    "tiny": (DecoderShape(8, 64, 176, 4, 4, 16, vocabulary=1000), 64),
    "small": (DecoderShape(12, 384, 1024, 6, 6, 64, vocabulary=1000), 576),
    "small-16k": (DecoderShape(12, 384, 1024, 6, 6, 64, vocabulary=16_000), 2880),  # logits as heavy as a real head's
    "mid": (DecoderShape(24, 1024, 2816, 16, 16, 64, vocabulary=1000), 2880),
    "deep": (DecoderShape(32, 64, 176, 4, 4, 16, vocabulary=1000), 64),
    **{
        name: (preset.shape.decoder, preset.visual_tokens)
        for name, preset in PRESETS.items()
        if preset.shape.decoder.experts is None
    },
}


@dataclass(frozen=True)
class Subject:
    """A model with one sample to run.

    Attributes:
        about: a description of what runs.
        inputs: the arguments of the model's forward, batch size 1, on its device.
        visual: (1, L) bool on the CPU, the visual tokens.
        labels: (1, L) long on the model's device, an artificial answer at the end; -100 elsewhere.
        masked: True if a method needs `visual`, because the model is called with embeddings.
        padded: True if the samples of a batch differ in length; see :meth:`batch`.
    """

    name: str
    about: str
    model: Any
    inputs: dict[str, Tensor]
    visual: Tensor
    labels: Tensor
    masked: bool
    padded: bool = False

    @property
    def info(self) -> ModelInfo:
        """The parts and properties of the model."""
        return inspect_model(self.model)

    @property
    def pictures(self) -> int:
        """The number of runs of visual tokens in the prompt."""
        return int((self.visual[0, 1:] & ~self.visual[0, :-1]).sum()) + int(self.visual[0, 0])

    @property
    def prompt(self) -> Prompt:
        """The token counts of one sample."""
        visual, length = int(self.visual.sum()), self.visual.shape[1]
        behind = length - 1 - int(self.visual[0].nonzero().max())
        return Prompt(visual, length - visual, instruction_tokens=behind)

    def batch(self, count: int) -> dict[str, Tensor]:
        """The inputs of `count` equal samples; padded ones have ever less text before their first picture."""
        inputs = {name: torch.cat([value] * count) for name, value in self.inputs.items()}
        if self.padded:
            before = int(self.visual[0].nonzero().min())
            for sample, mask in enumerate(inputs["attention_mask"]):
                mask[: sample * before // count] = 0
        return inputs

    def under(self, method: Method | None) -> AbstractContextManager[Any]:
        """Context manager that applies `method` to the model; None: vanilla."""
        if method is None:
            return nullcontext()
        return method(self.model, visual_mask=self.visual if self.masked else None)


def checkpoint_subject(ready: PreparedRequest) -> Subject:
    """A checkpoint with the pictures and the question of `ready`; its vision tower runs too."""
    model = ready.checkpoint.model
    inputs = on_model(model, ready.inputs)
    ids = inputs["input_ids"].cpu()
    visual = torch.isin(ids, torch.tensor(inspect_model(model).visual_ids))
    name = ready.request.model or "bundled"
    about = "the whole model, vision tower included, with weights of a checkpoint"
    return Subject(name, about, model, inputs, visual, _labels(ids, visual).to(model.device), masked=False)


def shape_subject(
    name: str,
    device: torch.device,
    dtype: str | None = None,
    depth: int | None = None,
    visual: int | None = None,
    text: int = 64,
    pictures: int = 1,
    padded: bool = False,
) -> Subject:
    """A decoder of a named shape with random weights, called with random embeddings. Raises InputError for an unknown
    shape, a depth that it does not have or that does not fit into memory, and for more pictures than visual tokens or
    half of the text tokens.

    Args:
        dtype: float32, float16 or bfloat16; None: one that suits the device.
        depth: number of layers; None: all of the shape's.
        visual: number of visual tokens; None: those of the shape's usual picture.
        text: number of text tokens, half of them before the last picture.
        pictures: number of pictures among which the visual tokens are divided, with a text token between two.
        padded: True for samples of different lengths in a batch.
    """
    shape, usual = sizes_of(name, depth)
    if dtype == "auto":
        raise InputError("dtype 'auto' means a checkpoint's own, and random weights have none")
    number = pick_dtype(device, dtype)
    assert isinstance(number, torch.dtype)
    visual = visual or usual
    if pictures > min(visual, text // 2):
        raise InputError(
            f"--pictures must be at most {min(visual, text // 2)} with {visual} visual and {text} text tokens: one "
            f"stands between two pictures, and half of them behind the last one; got {pictures}"
        )
    _check_fits(name, shape, number, device)
    kind = Qwen2Config if name.startswith(("qwen", "internvl")) else LlamaConfig
    config = text_config(kind, shape, max_position_embeddings=32768, pad_token_id=0)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), device:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=number).eval()
    return replace(_fed_with_embeddings(name, model, visual, text, pictures), padded=padded)


def resized(subject: Subject, visual: int) -> Subject:
    """The same random weights with another number of visual tokens in the prompt."""
    return _fed_with_embeddings(subject.name, subject.model, visual, subject.prompt.text_tokens)


def sizes_of(name: str, depth: int | None) -> tuple[DecoderShape, int]:
    """The sizes of a shape, cut to `depth` layers, and the visual tokens of its usual picture. Raises InputError for an
    unknown shape, or a depth that it does not have."""
    if name not in SHAPES:
        raise InputError(f"shape {name!r} is not one of {', '.join(SHAPES)}")
    shape, visual = SHAPES[name]
    if depth is not None and not 1 <= depth <= shape.layers:
        raise InputError(f"--num-layers must be in 1..{shape.layers} for the shape {name}; got {depth}")
    return replace(shape, layers=depth or shape.layers), visual


def _check_fits(name: str, shape: DecoderShape, dtype: torch.dtype, device: torch.device) -> None:
    query_width, key_width = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    layer = shape.hidden * (2 * query_width + 2 * key_width + 3 * shape.intermediate)
    needed = (shape.layers * layer + 2 * shape.vocabulary * shape.hidden) * dtype.itemsize
    there = total_memory(device)
    if needed > there:
        kind = next(key for key, value in DTYPES.items() if value is dtype)
        raise InputError(
            f"{shape.layers} layers of {name} take {needed / 2**30:.1f} GiB in {kind}, and the memory has "
            f"{there / 2**30:.1f}; run fewer layers (--num-layers N) or a smaller dtype"
        )


def _fed_with_embeddings(name: str, model: Any, visual_tokens: int, text: int, pictures: int = 1) -> Subject:
    before, length = text // 2 - (pictures - 1), visual_tokens + text
    ends = [visual_tokens * number // pictures for number in range(pictures + 1)]
    visual = torch.zeros(1, length, dtype=torch.bool)
    for number, (begin, end) in enumerate(pairwise(ends)):
        visual[:, before + begin + number : before + end + number] = True
    generator = torch.Generator().manual_seed(0)
    embeddings = torch.randn(1, length, model.config.hidden_size, generator=generator) * 0.02
    ids = torch.randint(model.config.vocab_size, (1, length), generator=generator)
    return Subject(
        name=name,
        about=f"the decoder alone ({type(model).__name__}), random weights, fed with random embeddings",
        model=model,
        inputs={
            "inputs_embeds": embeddings.to(model.device, model.dtype),
            "attention_mask": torch.ones_like(ids).to(model.device),
        },
        visual=visual,
        labels=_labels(ids, visual).to(model.device),
        masked=True,
    )


def _labels(ids: Tensor, visual: Tensor) -> Tensor:
    """An artificial answer: the second half of the tokens after the last visual one, at least one token."""
    length = ids.shape[1]
    behind = length - 1 - int(visual[0].nonzero().max())
    answer = torch.arange(length) >= length - max(1, behind // 2)
    return ids.masked_fill(~answer, -100)
