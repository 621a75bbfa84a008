"""Pictures for training: drawn by worker processes, kept in a pool on the device that trains.

Drawing a picture takes a core some 5 ms, a training step of 32 pictures takes a GPU some 20 ms. So the steps draw at
random from a pool, which the workers renew all the time: a step never waits, and a picture is seen a few times at most.
"""

from __future__ import annotations

import mmap
import multiprocessing
import os
import threading
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from reader_text import FORMATS, SLOTS, WIDTH, question_rows
from torch import Tensor

from pyramiddrop.evaluation.digits import split_rng
from pyramiddrop.evaluation.reader import GROUPS, IMAGE, KINDS, spread_over_kinds
from pyramiddrop.evaluation.reader.canvas import CHANNELS, SIDE

BLOCK = 32  # pictures that a worker hands over at once
GUARD = 4 * BLOCK  # pictures of the pool next to be replaced, which are not drawn any more
KIND_NAMES = tuple(kind for kinds in KINDS.values() for kind in kinds)
Fields = dict[str, Any]
#: What a picture is to the training: the shape and the type of each of its arrays.
FIELDS: dict[str, tuple[tuple[int, ...], str]] = {
    "images": ((IMAGE, IMAGE, 3), "uint8"),
    "labels": ((SIDE * SIDE, len(CHANNELS)), "int8"),
    "ids": ((len(FORMATS), SLOTS, WIDTH), "int16"),
    "targets": ((len(FORMATS), SLOTS, WIDTH), "int16"),
    "kinds": ((SLOTS,), "int8"),
}


@dataclass(frozen=True)
class Batch:
    """Pictures with their patch labels and questions, on the device. `ids` and `targets` are (B, SLOTS, WIDTH)."""

    images: Tensor
    labels: Tensor
    ids: Tensor
    targets: Tensor
    kinds: Tensor


def draw_block(split: str, seed: int, number: int, into: Fields) -> None:
    """Fill the arrays of a block with pictures that depend on these arguments alone; the groups take turns."""
    for index in range(len(into["images"])):
        rng = split_rng(split, seed, number, index)
        picture = tuple(GROUPS.values())[(number + index) % len(GROUPS)](rng, split)
        asked = spread_over_kinds(rng, picture, SLOTS)
        questions = [asked[slot % len(asked)] for slot in range(SLOTS)]
        into["images"][index], into["labels"][index] = picture.pixels, picture.labels
        into["kinds"][index] = [KIND_NAMES.index(one.kind) for one in questions]
        for form, suffix in enumerate(FORMATS):
            into["ids"][index, form], into["targets"][index, form] = question_rows(questions, suffix)


def empty_block(size: int, allocate: Callable[[int], Any] = bytearray) -> Fields:
    """The arrays of a block; `allocate` gives memory of so many bytes."""
    fields = {}
    for name, (shape, kind) in FIELDS.items():
        memory = allocate(size * int(np.prod(shape)) * np.dtype(kind).itemsize)
        fields[name] = np.frombuffer(memory, kind).reshape(size, *shape)
    return fields


class Pool:
    """A ring of pictures on a device."""

    def __init__(self, size: int, device: torch.device, seed: int = 0) -> None:
        self.size, self.device = size, device
        self.tensors = {
            name: torch.zeros(size, *shape, dtype=getattr(torch, kind), device=device)
            for name, (shape, kind) in FIELDS.items()
        }
        self.generator = torch.Generator(device).manual_seed(seed)
        self.written = 0

    @property
    def filled(self) -> int:
        return min(self.written, self.size)

    def write(self, block: Fields) -> None:
        """Put a block in the place of the oldest pictures."""
        count = len(block["images"])
        start = self.written % self.size
        for name, tensor in self.tensors.items():
            tensor[start : start + count].copy_(torch.from_numpy(block[name]))
        self.written += count

    def sample(self, count: int, form: int) -> Batch:
        """Pictures drawn with replacement, their questions in one of `FORMATS`."""
        choice = torch.randint(self.filled - self._guard, (count,), generator=self.generator, device=self.device)
        return self.take((choice + self._oldest) % self.size, form)

    def take(self, index: Tensor | slice, form: int) -> Batch:
        """Chosen pictures."""
        part = {name: tensor[index] for name, tensor in self.tensors.items()}
        return Batch(part["images"], part["labels"], part["ids"][:, form], part["targets"][:, form], part["kinds"])

    @property
    def _guard(self) -> int:
        return GUARD if self.written >= self.size > 2 * GUARD else 0

    @property
    def _oldest(self) -> int:
        """The first place that is drawn from: those just behind the writer are replaced next."""
        return self.written % self.size + GUARD if self._guard else 0


def drawn_pool(split: str, seed: int, count: int, device: torch.device) -> Pool:
    """A pool of `count` pictures, drawn here and now."""
    pool = Pool(count, device)
    block = empty_block(count)
    draw_block(split, seed, 0, block)
    pool.write(block)
    return pool


class Workers:
    """Processes that draw blocks of training pictures. Make them before the device is first used: they are forked.

    Block `n` of a seed is always the same; which blocks a step draws from depends on the speed of the machine.
    """

    def __init__(self, count: int, seed: int) -> None:
        context = multiprocessing.get_context("fork")
        self.blocks = [empty_block(BLOCK, lambda size: mmap.mmap(-1, size)) for _ in range(3 * count)]
        self.free, self.full = context.SimpleQueue(), context.SimpleQueue()
        for index in range(len(self.blocks)):
            self.free.put(index)
        self.processes = [
            context.Process(target=self._work, args=(seed, worker, count), daemon=True) for worker in range(count)
        ]
        for process in self.processes:
            process.start()
        self.thread: threading.Thread | None = None
        self.error: str | None = None

    def feed(self, pool: Pool) -> None:
        """Put what is drawn into a pool from now on, in a thread."""
        self.thread = threading.Thread(target=self._drain, args=(pool,), daemon=True)
        self.thread.start()

    def stop(self) -> None:
        """End the processes."""
        for process in self.processes:
            process.terminate()

    def check(self) -> None:
        """Raise what a worker or the thread has failed with."""
        if self.error:
            raise RuntimeError(f"drawing pictures failed:\n{self.error}")

    def _work(self, seed: int, worker: int, count: int) -> None:
        os.nice(5)
        number = worker
        while True:
            index = self.free.get()
            try:
                draw_block("train", seed, number, self.blocks[index])
            except Exception:
                self.full.put(traceback.format_exc())
                return
            self.full.put(index)
            number += count

    def _drain(self, pool: Pool) -> None:
        stream = torch.cuda.Stream(pool.device) if pool.device.type == "cuda" else None
        try:
            while True:
                index = self.full.get()
                if isinstance(index, str):
                    raise RuntimeError(index)
                with torch.cuda.stream(stream):
                    pool.write(self.blocks[index])
                if stream:
                    stream.synchronize()
                self.free.put(index)
        except Exception as error:
            self.error = str(error)
