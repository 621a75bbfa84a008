"""Show what vLLM's matrix products on a CPU keep for each number of rows, without a model; print MiB in use.

python benchmarks/matmul_memory.py

It needs the environment that `.ci/vllm` makes. oneDNN keeps a kernel for each weight and each number of rows until its
cache is full. This is why the resident memory of a server grows for as long as steps bring new numbers of rows, and
sooner where each stage of a step has its own.
"""

from __future__ import annotations

import ctypes

import torch
from vllm import _custom_ops as ops

WEIGHTS, OUT, INTO, CACHED = 4, 384, 128, 32  # the last is what vLLM asks for
SHOWN = (1, 100, 200, 400, 700, 1000, 1200)  # numbers of rows
MALLINFO = (
    *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
    *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
)


class _Mallinfo(ctypes.Structure):
    """What the C library's `mallinfo2` returns."""

    _fields_ = [(name, ctypes.c_size_t) for name in MALLINFO]


def in_use() -> int:
    """Bytes that are allocated, without what is free again."""
    library = ctypes.CDLL(None)
    library.mallinfo2.restype = _Mallinfo
    return int(library.mallinfo2().uordblks)


def main() -> None:
    """Multiply more and more rows, and print what stays in use."""
    torch.set_num_threads(1)
    handlers = [ops.create_onednn_mm(torch.randn(OUT, INTO).t(), CACHED) for _ in range(WEIGHTS)]
    start = in_use()
    for rows in range(1, max(SHOWN) + 1):
        states = torch.randn(rows, INTO)
        for handler in handlers:
            ops.onednn_mm(handler, states, None)
        if rows in SHOWN:
            print(f"{rows} numbers of rows: {(in_use() - start) / 2**20:.0f} MiB")


if __name__ == "__main__":
    main()
