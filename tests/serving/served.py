"""What the tests of serving share: tiny checkpoints that vLLM can load, mixed requests, the engine driven step by
step, and the answers of the `hf` adapter to the same requests."""

from __future__ import annotations

import faulthandler
import gc
import multiprocessing
import random
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText

from checkpoints import save_processor
from pyramiddrop import Method
from pyramiddrop.inference.checkpoint import load_processor
from pyramiddrop.vllm import hf_overrides
from tiny import tiny_model

#: Heads of 32, the least that vLLM's attention on a CPU takes.
WIDE_ENOUGH = {
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
}
ENGINE: dict[str, Any] = {
    "dtype": "float32",
    "enforce_eager": True,
    "max_model_len": 512,
    "max_num_seqs": 8,
    "block_size": 32,
    "limit_mm_per_prompt": {"image": 3},
    "num_gpu_blocks_override": 256,
    "seed": 0,
}
ABOUT_FILM = {
    "total_num_frames": 4,
    "fps": 2.0,
    "duration": 2.0,
    "frames_indices": [0, 1, 2, 3],
    "video_backend": "opencv",
}
#: Seconds that an engine in processes of its own may take from its start to its end; under load a start takes minutes.
LIMIT = 900
Watch = Callable[[Any], None]
Pixels = Callable[[list[Image.Image]], torch.Tensor]


@dataclass(frozen=True)
class Question:
    """A request: words with `<image>` among them, its pictures, and how many tokens to answer."""

    prompt: str
    images: tuple[Image.Image, ...]
    tokens: int

    @property
    def inputs(self) -> dict[str, Any]:
        """As vLLM takes it."""
        return {"prompt": self.prompt} | ({"multi_modal_data": {"image": list(self.images)}} if self.images else {})


@dataclass(frozen=True)
class Video(Question):
    """A question about a video, (frames, height, width, 3) of bytes, with its pictures before it."""

    frames: Any = None

    @property
    def inputs(self) -> dict[str, Any]:
        film = (self.frames, ABOUT_FILM | {"do_sample_frames": False})
        media = {"video": [film]} | ({"image": list(self.images)} if self.images else {})
        return {"prompt": self.prompt, "multi_modal_data": media}


def films(count: int, image: str, video: str) -> list[Video]:
    """Each one video and one picture, written as `video` and `image` in the prompt."""
    draw = np.random.default_rng(3)
    return [
        Video(
            f"w{number} {image} w9 {video} w{number + 7} w3",
            (picture(number),),
            6 + number,
            draw.integers(0, 255, (4, 56, 84, 3), dtype=np.uint8),
        )
        for number in range(count)
    ]


def questions(count: int = 16, seed: int = 0, tokens: tuple[int, int] = (8, 40)) -> list[Question]:
    """Mixed: of each four two have one picture, one has none, one has two; sizes, words and lengths are random."""
    draw = random.Random(seed)
    return [_question(draw, (1, 1, 0, 2)[number % 4], tokens) for number in range(count)]


def _question(draw: random.Random, pictures: int, tokens: tuple[int, int]) -> Question:
    parts = [_words(draw, 1, 30)]
    for _ in range(pictures):
        parts += ["<image>", _words(draw, 1, 25)]
    images = tuple(picture(draw.randrange(2**31), draw.randint(20, 90), draw.randint(20, 90)) for _ in range(pictures))
    return Question(" ".join(parts), images, draw.randint(*tokens))


def _words(draw: random.Random, least: int, most: int) -> str:
    return " ".join(f"w{draw.randrange(4, 190)}" for _ in range(draw.randint(least, most)))


def picture(seed: int, width: int = 60, height: int = 40) -> Image.Image:
    """A picture of noise."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8))


def save_served(folder: Path, family: str = "llava", layers: int = 8, **text_changes: Any) -> Path:
    """A tiny random checkpoint of `family`, as Transformers saves it."""
    model = tiny_model(family, layers=layers, **(WIDE_ENOUGH | text_changes))
    model.save_pretrained(folder)
    save_processor(folder, model, family)
    return folder


@torch.inference_mode()
def expected(
    folder: Path, asked: Sequence[Question], method: Method | None, pixels: Pixels | None = None
) -> list[list[int]]:
    """What Transformers answers, one request at a time, under `method` by the `hf` adapter; None drops nothing.

    Args:
        pixels: makes the pixel values of a question's pictures, where vLLM has another processor than Transformers.
    """
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    processor = load_processor(folder)

    def answers() -> list[list[int]]:
        return [_answer(model, processor, question, pixels) for question in asked]

    if method is None:
        return answers()
    with method(model):
        return answers()


def processed(processor: Any, question: Question) -> Any:
    """What Transformers' processor makes of a question."""
    film = {}
    if isinstance(question, Video):
        film = {"videos": [question.frames], "video_metadata": [ABOUT_FILM], "do_sample_frames": False}
    return processor(text=[question.prompt], images=list(question.images) or None, return_tensors="pt", **film)


def _answer(model: Any, processor: Any, question: Question, pixels: Pixels | None) -> list[int]:
    inputs = processed(processor, question)
    if pixels is not None and question.images:
        inputs["pixel_values"] = pixels(list(question.images))
    ids = model.generate(
        **inputs, do_sample=False, max_new_tokens=question.tokens, min_new_tokens=question.tokens, pad_token_id=0
    )
    return ids[0, inputs["input_ids"].shape[1] :].tolist()


@contextmanager
def engine(folder: Path, method: Method | None, **options: Any) -> Iterator[Any]:
    """vLLM's `LLM` in this process, dropping under `method`; None is plain vLLM, without the plugin's architecture."""
    from vllm import LLM

    overrides = {} if method is None else {"hf_overrides": hf_overrides(str(folder), method)}
    plain = {"enable_prefix_caching": False} if method is None else {}
    gc.freeze()  # vLLM collects garbage many times as it starts, and all that is imported is walked each time
    with nullcontext() if method else _names_of_transformers_5():
        llm = LLM(str(folder), **(ENGINE | plain | overrides | options))
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()


@contextmanager
def engine_processes(folder: Path, method: Method | None, **options: Any) -> Iterator[Any]:
    """`engine`, in processes of its own; AssertionError if it takes longer than `LIMIT`."""
    with pytest.MonkeyPatch.context() as patch, no_longer_than(LIMIT):
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
        with engine(folder, method, **options) as llm:
            yield llm


@contextmanager
def no_longer_than(seconds: float) -> Iterator[None]:
    """AssertionError if the body takes longer: vLLM's `LLM` waits for ever for an engine that was killed.

    The stacks of all threads then go to stderr, which pytest shows with what the engine wrote there, and all processes
    of this one are killed, lest its end waits for them. For the main thread, one at a time or one inside another.
    """

    def stop(*_: Any) -> None:
        assert sys.__stderr__ is not None
        faulthandler.dump_traceback(sys.__stderr__)
        children = multiprocessing.active_children()
        for child in children:
            child.kill()
        raise AssertionError(f"took longer than {seconds} seconds; processes still alive: {children}")

    handler = signal.signal(signal.SIGALRM, stop)
    left, _ = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.signal(signal.SIGALRM, handler)
        signal.setitimer(signal.ITIMER_REAL, left)


@contextmanager
def _names_of_transformers_5() -> Iterator[None]:
    """Plain vLLM reads LLaVA's weights by the names that Transformers 5 saves; the plugin needs no help for it."""
    from vllm.model_executor.models.llava import LlavaForConditionalGeneration
    from vllm.model_executor.models.utils import WeightsMapper

    published = LlavaForConditionalGeneration.hf_to_vllm_mapper
    saved = WeightsMapper(orig_to_new_prefix={"vision_tower.": "vision_tower.vision_model."})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LlavaForConditionalGeneration, "hf_to_vllm_mapper", published | saved)
        yield


def sampling(tokens: int, **options: Any) -> Any:
    """Greedy, exactly `tokens` of them."""
    from vllm import SamplingParams

    return SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False, **options)


def answers(
    llm: Any, asked: Sequence[Question], every: int = 0, watch: Watch | None = None, adapters: Sequence[Any] = ()
) -> list[list[int]]:
    """Ask all of `asked`: at once, or one more after `every` steps.

    Args:
        watch: sees the scheduler after each step.
        adapters: vLLM's LoRA request of each of `asked`, or None.
    """
    core = llm.llm_engine
    done: dict[str, list[int]] = {}
    waiting = list(enumerate(asked))
    step = 0
    while waiting or core.has_unfinished_requests():
        while waiting and (every == 0 or step % every == 0):
            number, question = waiting.pop(0)
            adapter = adapters[number] if adapters else None
            core.add_request(str(number), question.inputs, sampling(question.tokens), lora_request=adapter)
            if every:
                break
        for output in core.step():
            if output.finished:
                done[output.request_id] = list(output.outputs[0].token_ids)
        if watch is not None:
            watch(scheduler(llm))
        step += 1
        assert step < 5000, "nothing goes on any more"
    return [done[str(number)] for number in range(len(asked))]


def scheduler(llm: Any) -> Any:
    """The scheduler of an engine in this process."""
    return llm.llm_engine.engine_core.engine_core.scheduler


def blocks_in_use(of: Any) -> int:
    """KV blocks that requests hold, over all groups."""
    pool = of.kv_cache_manager.block_pool
    return int(pool.num_gpu_blocks - pool.get_num_free_blocks() - 1)  # the null block is never free
