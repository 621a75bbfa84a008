"""Two processes are one: DDP and FSDP2 give the losses, gradients and weights that one process has on global batches,
whatever each rank holds."""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as processes
from torch import Tensor

import training_ranks
from training_ranks import CASES, FOUND

SECONDS = 240  # a step takes one; what takes longer hangs


@pytest.fixture(scope="module", autouse=True)
def one_import() -> Iterator[None]:
    """The processes are forked from one that has imported everything; it has no threads yet."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # a fork server knows no other
        multiprocessing.set_forkserver_preload(["training_ranks"])
        yield


def on_two_ranks(folder: Path, way: str, logits: str) -> dict[str, Any]:
    """What the ranks found; fails where they wait for each other."""
    context = processes.start_processes(
        training_ranks.work, (str(folder), way, logits), nprocs=2, join=False, start_method="forkserver"
    )
    started = time.monotonic()
    while not context.join(timeout=1):
        if time.monotonic() - started > SECONDS:
            for process in context.processes:
                process.kill()
            pytest.fail("the ranks hang")
    return dict(torch.load(folder / FOUND))


@pytest.mark.fast_cases(1)
@pytest.mark.parametrize(
    ("way", "logits"),
    [
        ("ddp", "full"),
        ("fsdp", "kept"),
        ("fsdp with checkpointing", "full"),
        ("fsdp by accelerate", "full"),
        pytest.param("ddp", "kept", marks=pytest.mark.slow),
        pytest.param("fsdp", "full", marks=pytest.mark.slow),
    ],
)
def test_two_ranks_are_one_process(way: str, logits: str, tmp_path: Path) -> None:
    found, expected = on_two_ranks(tmp_path, way, logits), training_ranks.alone(logits)
    for case in CASES:
        torch.testing.assert_close(found[case]["loss"], expected[case]["loss"], atol=1e-5, rtol=1e-5)
        gradients, wanted = found[case]["gradients"], expected[case]["gradients"]
        assert wanted.keys() <= gradients.keys()
        nothing = {name: torch.zeros_like(one) for name, one in gradients.items()}  # no rank had an image
        check_close(gradients, nothing | wanted, case)
    check_close(found["weights"], expected["weights"], "weights")


def check_close(found: dict[str, Tensor], expected: dict[str, Tensor], what: str) -> None:
    """By parameter, against the largest value of it."""
    assert found.keys() == expected.keys()
    for name, value in found.items():
        tolerance = 1e-4 * float(expected[name].abs().max()) + 1e-7
        torch.testing.assert_close(
            value, expected[name], atol=tolerance, rtol=0, msg=lambda m, n=f"{what}, {name}": f"{n}: {m}"
        )
