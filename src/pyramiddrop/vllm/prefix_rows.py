"""Store the rows of cached prompt blocks at the first drop, for further questions about the same pictures.

The layers before the first drop compute on every token, so that their keys and values are valid for any question, and
vLLM's prefix cache provides them through the blocks of stage 0. Later stages depend on the question and are computed
again from the rows at the first drop. This module stores these rows of cached tokens by the number of their block.

The scheduler (`RecordedBlocks`) and the workers (`PrefixRows`) both track the blocks recorded last, without messages
between them.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

#: Number of tokens whose rows are stored, in multiples of a step's budget (`max_num_batched_tokens`).
BUDGETS = 4


def kept_tokens(vllm_config: Any) -> int:
    """The number of tokens whose rows are stored, the same for the scheduler and the workers."""
    return int(BUDGETS * vllm_config.scheduler_config.max_num_batched_tokens)


@dataclass(frozen=True)
class Rows:
    """The rows of the first `n` tokens of a prompt at the first drop.

    Attributes:
        hidden: (n, D), the input of the first layer of stage 1.
        positions: (..., n), their positions.
        ranking: (n, D), the input of the ranking layer if that is a layer of stage 0; else None.
    """

    hidden: Tensor
    positions: Tensor
    ranking: Tensor | None

    def then(self, later: Rows) -> Rows:
        """Append the rows of the tokens after these."""
        return Rows(
            torch.cat([self.hidden, later.hidden]),
            torch.cat([self.positions, later.positions], -1),
            None if self.ranking is None or later.ranking is None else torch.cat([self.ranking, later.ranking]),
        )

    def copied(self) -> Rows:
        """A copy of the rows."""
        return Rows(self.hidden.clone(), self.positions.clone(), None if self.ranking is None else self.ranking.clone())


class PrefixRows:
    """The worker's rows of the blocks recorded last, in a ring buffer on its device.

    No value is read back from the device. A block of the scheduler may be several blocks of attention.
    """

    def __init__(self, vllm_config: Any, ranking: bool) -> None:
        """Allocate the ring while the model is built, so that vLLM's memory profiling counts it.

        Args:
            vllm_config: the engine's configuration.
            ranking: True to store the inputs of the ranking layer too.
        """
        self._cache_config = vllm_config.cache_config
        self._tokens = kept_tokens(vllm_config)
        width = vllm_config.model_config.hf_text_config.hidden_size
        options = {"dtype": vllm_config.model_config.dtype, "device": vllm_config.device_config.device}
        self._hidden = torch.empty(self._tokens, width, **options)
        self._ranking = torch.empty_like(self._hidden) if ranking else None
        self._positions: Tensor | None = None  # allocated with the first ones, which show the number of axes
        self._place = torch.empty(0)  # block of attention's table -> first row in the ring
        self._next = 0

    def record(self, table: Tensor, block: int, begin: int, end: int, rows: Rows) -> None:
        """Store the rows of the blocks that end among the tokens `begin` to `end` of a prompt.

        Args:
            table: (blocks,) attention's numbers of the prompt's blocks of stage 0.
            block: number of tokens in one of them.
            rows: the rows of the prompt's tokens, from the first one on.
        """
        size = self._cache_config.block_size  # vLLM sets it only after the model was built
        tokens = slice(begin // size * size, end // size * size)
        count, ring = (tokens.stop - tokens.start) // block, self._tokens // size * size
        if not count or not ring:
            return
        device = rows.hidden.device
        if self._positions is None:
            axes = rows.positions.shape[:-1]
            self._positions = torch.empty(self._tokens, *axes, dtype=rows.positions.dtype, device=device)
            blocks = self._cache_config.num_gpu_blocks * (size // block)
            self._place = torch.zeros(blocks, dtype=torch.long, device=device)
        places = (torch.arange(0, count * block, block, device=device) + self._next) % ring
        self._next = (self._next + count * block) % ring
        self._place[table[tokens.start // block : tokens.stop // block].long()] = places
        at = _tokens_of(places, block)
        self._hidden[at] = rows.hidden[tokens]
        self._positions[at] = rows.positions[..., tokens].movedim(-1, 0)
        if self._ranking is not None and rows.ranking is not None:
            self._ranking[at] = rows.ranking[tokens]

    def read(self, table: Tensor, block: int, tokens: int) -> Rows:
        """The rows of the first `tokens` tokens of a prompt, in whole blocks; other arguments as for `record`.

        Raises:
            RuntimeError: for a part of a block, and if no rows were stored because a step of this prompt is missing.
        """
        if self._positions is None or tokens % self._cache_config.block_size:
            raise RuntimeError(f"pyramiddrop: rows of the {tokens} earlier tokens of a prompt are missing")
        at = _tokens_of(self._place[table[: tokens // block].long()], block)
        ranking = None if self._ranking is None else self._ranking[at]
        return Rows(self._hidden[at], self._positions[at].movedim(0, -1), ranking)


def _tokens_of(places: Tensor, block: int) -> Tensor:
    """The indices of the ring rows of the blocks that begin at `places`."""
    return (places[:, None] + torch.arange(block, device=places.device)).flatten()


class RecordedBlocks:
    """The scheduler's record of the blocks whose rows the workers hold.

    A worker may record the blocks of a step in another order than they were scheduled; a block therefore counts as
    overwritten as soon as the first block of its step may be.
    """

    def __init__(self, limit: int) -> None:
        """Track the last `limit` blocks, as many as a worker's ring holds."""
        self._limit = limit
        self._known: OrderedDict[int, tuple[Any, int, int]] = OrderedDict()
        self._step = self._before = self._count = 0

    def add(self, blocks: Sequence[Any], step: int) -> set[int]:
        """Add `blocks` (vLLM's, with hashes) computed in `step`; returns the numbers of overwritten blocks."""
        self._before = self._recorded_before(step)
        self._step = step
        for block in blocks:
            self._known.pop(block.block_id, None)
            self._known[block.block_id] = block.block_hash, step, self._before
        self._count += len(blocks)
        gone = set()
        while self._known and self._before - self._oldest() > self._limit:
            gone.add(self._known.popitem(last=False)[0])
        return gone

    def usable(self, blocks: Sequence[Any], step: int) -> int:
        """The number of `blocks`, from the first on, whose rows a request scheduled in `step` can read."""
        recorded = self._recorded_before(step)
        for number, block in enumerate(blocks):
            known, computed, before = self._known.get(block.block_id, (None, step, 0))
            if known != block.block_hash or computed == step or recorded - before > self._limit:
                return number
        return len(blocks)

    def _oldest(self) -> int:
        _, _, before = next(iter(self._known.values()))
        return before

    def _recorded_before(self, step: int) -> int:
        """The blocks recorded before `step`: a worker reads the rows that a step needs before it records new ones."""
        return self._before if step == self._step else self._count
