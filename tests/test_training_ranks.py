"""Two processes are one: DDP and FSDP2 give the loss and gradients of the global batch, whatever each rank holds."""

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

import training_ranks
from training_ranks import CASES

SECONDS = 240  # a step takes one; what takes longer hangs


@pytest.fixture(scope="module", autouse=True)
def one_import() -> Iterator[None]:
    """The processes are forked from one that has imported everything; it has no threads yet."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # a fork server knows no other
        multiprocessing.set_forkserver_preload(["training_ranks"])
        yield


def on_two_ranks(folder: Path, way: str, logits: str) -> dict[str, dict[str, Any]]:
    """Each case's loss and gradients; fails where the ranks wait for each other."""
    context = processes.start_processes(
        training_ranks.work, (str(folder), way, logits), nprocs=2, join=False, start_method="forkserver"
    )
    started = time.monotonic()
    while not context.join(timeout=1):
        if time.monotonic() - started > SECONDS:
            for process in context.processes:
                process.kill()
            pytest.fail(f"the ranks hang; finished were {[path.stem for path in folder.glob('*.pt')]}")
    return {case: torch.load(folder / f"{case}.pt") for case in CASES}


@pytest.mark.fast_cases(1)
@pytest.mark.parametrize(
    ("way", "logits"),
    [
        ("ddp", "full"),
        ("fsdp", "kept"),
        ("fsdp with checkpointing", "full"),
        pytest.param("ddp", "kept", marks=pytest.mark.slow),
        pytest.param("fsdp", "full", marks=pytest.mark.slow),
    ],
)
def test_two_ranks_are_one_process(way: str, logits: str, tmp_path: Path) -> None:
    found = on_two_ranks(tmp_path, way, logits)
    for case in CASES:
        expected = training_ranks.alone(case, logits)
        torch.testing.assert_close(found[case]["loss"], expected["loss"], atol=1e-5, rtol=1e-5)
        assert expected["gradients"].keys() <= found[case]["gradients"].keys()
        for name, gradient in found[case]["gradients"].items():
            wanted = expected["gradients"].get(name, torch.zeros_like(gradient))  # none: no rank had an image
            largest = float(wanted.abs().max())
            torch.testing.assert_close(
                gradient, wanted, atol=1e-4 * largest + 1e-7, rtol=0, msg=lambda m, n=f"{case}, {name}": f"{n}: {m}"
            )
