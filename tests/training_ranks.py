"""What each of two processes does in the tests of ranks; a module of its own, for it is started anew there."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from pyramiddrop import PyramidDrop, apply
from pyramiddrop.training.trainer import DummyImage
from tiny import CROP, Answer, collate, make_batch, make_rows, tiny_model

TURNS = [3, "image", 4, Answer(3), 5, Answer(2)]
#: What each rank trains on: images in both, in one of them, in none; always of different numbers and lengths.
CASES: dict[str, list[list[list[Any]]]] = {
    "images on both": [[TURNS, [2, "image", 1, "image", 2, Answer(4)]], [[6, "image", 3, Answer(1)], [4, Answer(2)]]],
    "images on one": [[TURNS, [2, "image", 1, "image", 2, Answer(4)]], [[7, Answer(3)], [4, Answer(2)]]],
    "images on none": [[[3, Answer(2)], [9, Answer(1)]], [[7, Answer(3)], [4, Answer(2)]]],
    "no answer on one": [[TURNS, [4, Answer(2)]], [[6, "image", 3], [5]]],
}
METHOD = {"layers": [2, 4, 6], "keep": [0.5, 0.25, 0.125]}


def new_model() -> nn.Module:
    """The same on every rank."""
    return tiny_model("llava-gqa").train()


def inputs_of(model: nn.Module, case: str, rank: int) -> dict[str, Tensor]:
    """Rank `rank`'s batch. Rows are numbered on over the ranks, so that both together are one global batch."""
    first, second = CASES[case]
    rows = make_rows(model, first + second)
    return collate(rows[: len(first)] if rank == 0 else rows[len(first) :], "right", labels=True)


def supervised(model: nn.Module, case: str) -> int:
    """Supervised tokens of the global batch."""
    return sum(int((inputs_of(model, case, rank)["labels"][:, 1:] != -100).sum()) for rank in range(2))


def blank_image() -> dict[str, Tensor]:
    return {"pixel_values": torch.zeros(1, 3, CROP, CROP)}


def part_of_loss(model: Any, inputs: dict[str, Tensor], count: int) -> Tensor:
    """The rank's part of the global mean."""
    return model(**inputs, num_items_in_batch=torch.tensor(count)).loss


def gathered(model: nn.Module) -> dict[str, Tensor]:
    """Whole gradients, by the names that an unwrapped model gives them."""
    found = {}
    for name, parameter in model.named_parameters():
        gradient = parameter.grad
        if gradient is not None:
            whole = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
            found[name.removeprefix("module.")] = whole.detach().clone()
    return found


def work(rank: int, folder: str, way: str, logits: str) -> None:
    """One rank's step of every case; writes the loss that both ranks agreed on, and the gradients."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    try:
        for case in CASES:
            result = _step(rank, way, case, logits)
            if rank == 0:
                torch.save(result, Path(folder) / f"{case}.pt")
        dist.barrier()
    finally:
        dist.destroy_process_group()


def _step(rank: int, way: str, case: str, logits: str) -> dict[str, Any]:
    model = new_model()
    inputs, count = inputs_of(model, case, rank), supervised(model, case)
    apply(model, PyramidDrop(**METHOD, logits=logits))
    DummyImage(model, blank_image())
    wrapped = WRAPPERS[way](model)
    loss = part_of_loss(wrapped, inputs, count)
    (loss * 2).backward()  # ranks average their gradients; the parts of a mean add up
    total = loss.detach().clone()
    dist.all_reduce(total)
    return {"loss": total, "gradients": gathered(wrapped)}


def _ddp(model: Any) -> Any:
    return DistributedDataParallel(model, find_unused_parameters=True)


def _fsdp(model: Any) -> Any:
    mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
    for layer in (*model.model.vision_tower.encoder.layers, *model.model.language_model.layers):
        fully_shard(layer, mesh=mesh)
    fully_shard(model.model.multi_modal_projector, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def _fsdp_checkpointed(model: Any) -> Any:
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return _fsdp(model)


WRAPPERS: dict[str, Callable[[Any], Any]] = {
    "ddp": _ddp,
    "fsdp": _fsdp,
    "fsdp with checkpointing": _fsdp_checkpointed,
}


def alone(case: str, logits: str) -> dict[str, Any]:
    """The same global batch in one process."""
    model = new_model()
    first, second = CASES[case]
    inputs = make_batch(model, first + second, "right", labels=True)
    apply(model, PyramidDrop(**METHOD, logits=logits))
    loss = part_of_loss(model, inputs, supervised(model, case))
    loss.backward()
    return {"loss": loss.detach(), "gradients": gathered(model)}
