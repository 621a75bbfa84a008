"""Count host waits: how often a prefill blocks Python until a CUDA device has finished."""

from __future__ import annotations

import warnings

import torch

from pyramiddrop.inference.side_by_side import Column
from pyramiddrop.speed.subject import Subject

_WAITED = "synchronizing CUDA operation"


def count_waits(subject: Subject, way: Column) -> int | None:
    """Waits in one prefill of one sample, once the method is settled; None where there is no CUDA device.

    PyTorch's own watch counts them; it does not know of every way to wait.
    """
    if subject.model.device.type != "cuda":
        return None
    with torch.no_grad(), subject.under(way.method):
        subject.model(**subject.inputs, logits_to_keep=1)
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                subject.model(**subject.inputs, logits_to_keep=1)
            finally:
                torch.cuda.set_sync_debug_mode("default")
    return sum(_WAITED in str(one.message) for one in seen)
