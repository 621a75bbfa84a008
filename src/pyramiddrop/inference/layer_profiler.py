"""Time one layer of a decoder on this machine, so that the time of any schedule is a sum."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

from pyramiddrop.cost import DecoderShape
from pyramiddrop.hf.query_key import extract
from pyramiddrop.hf.rows import take_embeddings
from pyramiddrop.inference.checkpoint import pick_device, pick_dtype
from pyramiddrop.inference.errors import InputError
from pyramiddrop.inference.timing import synchronize
from pyramiddrop.scoring import attention_received

RUNS = 3


class LayerProfiler:
    """Measures milliseconds of a decoder layer with random weights on the best device of this machine.

    Each number of rows is measured once: a warm-up, then the median of 3 runs. Only decoder layers are measured, not
    the vision tower, the embeddings or the head.

    Raises:
        InputError: for a mixture of experts, whose time depends on its router, and for layers that do not all have full
            attention with the same heads.
    """

    def __init__(self, shape: DecoderShape) -> None:
        if shape.experts is not None:
            raise InputError("--measure cannot time a mixture of experts from its sizes; give another kind of budget")
        if shape.mixers or shape.widths or shape.further or shape.matrices != 3:
            raise InputError("--measure cannot time layers that differ from Llama's; give another kind of budget")
        self.device = pick_device(None)
        dtype = pick_dtype(self.device, None)
        assert isinstance(dtype, torch.dtype)
        config: Any = _config(shape)
        with torch.random.fork_rng(devices=[]), torch.device(self.device):
            self._layer: Any = LlamaDecoderLayer(config, 0).to(dtype).eval()
            self._rotary: Any = LlamaRotaryEmbedding(config)
        self._shape, self._dtype = shape, dtype
        self._seen: dict[tuple[str, int], float] = {}

    def layer(self, rows: int) -> float:
        """Milliseconds of a layer over `rows` rows."""
        return self._measured("layer", rows, self._run_layer)

    def ranking(self, rows: int) -> float:
        """Milliseconds of ranking `rows` rows by the last row's attention."""
        return self._measured("ranking", rows, self._run_ranking)

    def _measured(self, kind: str, rows: int, prepare: Callable[[int], Callable[[], Any]]) -> float:
        if (kind, rows) not in self._seen:
            with torch.inference_mode():
                work = prepare(rows)
                times = [self._timed(work) for _ in range(RUNS + 1)]
            self._seen[kind, rows] = 1000 * statistics.median(times[1:])
        return self._seen[kind, rows]

    def _timed(self, work: Callable[[], Any]) -> float:
        synchronize(self.device)
        start = time.perf_counter()
        work()
        synchronize(self.device)
        return time.perf_counter() - start

    def _run_layer(self, rows: int) -> Callable[[], Any]:
        hidden, positions = self._inputs(rows)
        return lambda: self._layer(hidden, attention_mask=None, position_embeddings=positions)

    def _run_ranking(self, rows: int) -> Callable[[], Any]:
        hidden, positions = self._inputs(rows)
        asking = torch.tensor([[rows - 1]], device=self.device)
        visible = torch.ones(1, 1, 1, rows, dtype=torch.bool, device=self.device)
        weights = torch.ones(1, 1, device=self.device)

        def arguments(some: torch.Tensor | None) -> dict[str, Any]:
            own = positions if some is None else tuple(take_embeddings(table, some) for table in positions)
            return {"position_embeddings": own}

        def rank() -> torch.Tensor:
            seen = extract(self._layer, hidden, asking, arguments)
            return attention_received(seen.queries, seen.keys, visible, weights, seen.scale).sort().indices

        return rank

    def _inputs(self, rows: int) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
        hidden = torch.zeros(1, rows, self._shape.hidden, dtype=self._dtype, device=self.device)
        hidden += torch.linspace(-1, 1, self._shape.hidden, device=self.device)
        ids = torch.arange(rows, device=self.device)[None]
        return hidden, self._rotary(hidden, position_ids=ids)


def _config(shape: DecoderShape) -> LlamaConfig:
    config = LlamaConfig(
        vocab_size=1,
        bos_token_id=None,
        eos_token_id=None,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=1,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
    )
    config._attn_implementation = "sdpa"
    return config
