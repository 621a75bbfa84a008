"""What each of two processes does in the tests of ranks; a module of its own, for it is started anew there."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedType
from accelerate.utils import FullyShardedDataParallelPlugin
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from pyramiddrop import PyramidDrop, apply
from pyramiddrop.training.trainer import DummyImage, name_layers_to_shard
from tiny import CROP, Answer, collate, make_batch, make_rows, tiny_model

TURNS = [3, "image", 4, Answer(3), 5, Answer(2)]
#: What each rank trains on: images in both, in one of them, in none; always of different numbers and lengths.
CASES: dict[str, list[list[list[Any]]]] = {
    "images on both": [[TURNS, [2, "image", 1, "image", 2, Answer(4)]], [[6, "image", 3, Answer(1)], [4, Answer(2)]]],
    "images on one": [[TURNS, [2, "image", 1, "image", 2, Answer(4)]], [[7, Answer(3)], [4, Answer(2)]]],
    "images on none": [[[3, Answer(2)], [9, Answer(1)]], [[7, Answer(3)], [4, Answer(2)]]],
    "no answer on one": [[TURNS, [4, Answer(2)]], [[6, "image", 3], [5]]],
}
FOUND = "found.pt"
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


def gathered(model: nn.Module, value_of: Callable[[Tensor], Tensor | None]) -> dict[str, Tensor]:
    """Parameters, or what belongs to them, whole, by the names that an unwrapped model gives them."""
    found = {}
    for name, parameter in model.named_parameters():
        value = value_of(parameter)
        if value is not None:
            whole = value.full_tensor() if isinstance(value, DTensor) else value
            found[name.removeprefix("module.")] = whole.detach().clone()
    return found


def work(rank: int, folder: str, way: str, logits: str) -> None:
    """One rank's training; rank 0 writes what `_trained` returns."""
    os.environ |= {"GLOO_SOCKET_IFNAME": "lo", "LOCAL_RANK": str(rank), "RANK": str(rank), "WORLD_SIZE": "2"}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    try:
        model = new_model()
        batches = {case: (inputs_of(model, case, rank), supervised(model, case)) for case in CASES}
        apply(model, PyramidDrop(**METHOD, logits=logits))
        DummyImage(model, blank_image())
        result = _trained(*WRAPPERS[way](model), batches, shares=2)
        if rank == 0:
            torch.save(result, Path(folder) / FOUND)
        dist.barrier()
    finally:
        dist.destroy_process_group()


def alone(logits: str) -> dict[str, Any]:
    """The same training in one process, on global batches."""
    model = new_model()
    batches = {
        case: (make_batch(model, first + second, "right", labels=True), supervised(model, case))
        for case, (first, second) in CASES.items()
    }
    apply(model, PyramidDrop(**METHOD, logits=logits))
    return _trained(model, _optimizer(model), batches, shares=1)


def _trained(model: Any, optimizer: Any, batches: dict[str, tuple[dict[str, Tensor], int]], shares: int) -> Any:
    """Loss and gradients of each case, a step of training each, by case; and under "weights" those after the last.

    Ranks average their gradients, and the parts of a mean add up: each rank's part counts `shares` times.
    """
    found: dict[str, Any] = {}
    for case, (inputs, count) in batches.items():
        loss = part_of_loss(model, inputs, count)
        (loss * shares).backward()
        total = loss.detach().clone()
        if shares > 1:
            dist.all_reduce(total)
        found[case] = {"loss": total, "gradients": gathered(model, lambda parameter: parameter.grad)}
        optimizer.step()
        optimizer.zero_grad()
    return found | {"weights": gathered(model, lambda parameter: parameter)}


def _optimizer(model: nn.Module) -> torch.optim.Optimizer:
    """Plain steps: AdamW's make much of a gradient that is nothing but rounding."""
    return torch.optim.SGD(model.parameters(), lr=0.05)


def _ddp(model: Any) -> Any:
    return DistributedDataParallel(model, find_unused_parameters=True), _optimizer(model)


def _fsdp(model: Any) -> Any:
    mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
    for layer in (*model.model.vision_tower.encoder.layers, *model.model.language_model.layers):
        fully_shard(layer, mesh=mesh)
    fully_shard(model.model.multi_modal_projector, mesh=mesh)
    return fully_shard(model, mesh=mesh), _optimizer(model)


def _fsdp_checkpointed(model: Any) -> Any:
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return _fsdp(model)


def _fsdp_by_accelerate(model: Any) -> Any:
    """accelerate's own preparation, as `examples/training/fsdp2.yaml` sets it.

    It knows FSDP on GPUs alone, and takes DDP in its place on a CPU without a word: so it is told what it has.
    """
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        cpu_ram_efficient_loading=True,
        state_dict_type="FULL_STATE_DICT",
    )
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "0"}  # asked for, though the ranks have met
    accelerator = Accelerator(cpu=True)
    accelerator.state.distributed_type = DistributedType.FSDP
    accelerator.state.fsdp_plugin = plugin
    name_layers_to_shard(model)
    return accelerator.prepare(model, _optimizer(model))


WRAPPERS: dict[str, Callable[[Any], Any]] = {
    "ddp": _ddp,
    "fsdp": _fsdp,
    "fsdp with checkpointing": _fsdp_checkpointed,
    "fsdp by accelerate": _fsdp_by_accelerate,
}
