"""Keep what cached blocks of a prompt hand to the first drop, for the next question about the same pictures.

The layers before the first drop see every token, so their keys and values hold for any question, and vLLM's prefix
cache serves them by the blocks of stage 0. What the later stages keep depends on the question, so they are computed
anew, from the rows that arrive at the first drop. Of cached tokens these rows are kept here, by their block's number.

The scheduler (`RecordedBlocks`) and the workers (`PrefixRows`) both hold the blocks recorded last; nothing is sent
between them.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

#: Tokens whose rows are kept, in budgets of a step (`max_num_batched_tokens`).
BUDGETS = 4


def kept_tokens(vllm_config: Any) -> int:
    """How many tokens have their rows kept; the scheduler and the workers work it out alike."""
    return int(BUDGETS * vllm_config.scheduler_config.max_num_batched_tokens)


@dataclass(frozen=True)
class Rows:
    """What the layers before the first drop make of the first `n` tokens of a prompt.

    Attributes:
        hidden: (n, D), what they hand to the first layer of stage 1.
        positions: (..., n) of them.
        ranking: (n, D), what the ranking layer received, if that is a layer of stage 0; else None.
    """

    hidden: Tensor
    positions: Tensor
    ranking: Tensor | None

    def then(self, later: Rows) -> Rows:
        """These rows, and those of the tokens after them."""
        return Rows(
            torch.cat([self.hidden, later.hidden]),
            torch.cat([self.positions, later.positions], -1),
            None if self.ranking is None or later.ranking is None else torch.cat([self.ranking, later.ranking]),
        )

    def copied(self) -> Rows:
        """The same rows in memory of their own."""
        return Rows(self.hidden.clone(), self.positions.clone(), None if self.ranking is None else self.ranking.clone())


class PrefixRows:
    """The worker's rows of the blocks recorded last, in a ring on its device.

    No value is read back from the device. A block here is one of the scheduler's, which attention may know as several.
    """

    def __init__(self, vllm_config: Any, ranking: bool) -> None:
        """Allocate the ring while the model is built, so that vLLM's memory profile counts it.

        Args:
            vllm_config: of the engine.
            ranking: whether the rows that the ranking layer receives are kept, too.
        """
        self._cache_config = vllm_config.cache_config
        self._tokens = kept_tokens(vllm_config)
        width = vllm_config.model_config.hf_text_config.hidden_size
        options = {"dtype": vllm_config.model_config.dtype, "device": vllm_config.device_config.device}
        self._hidden = torch.empty(self._tokens, width, **options)
        self._ranking = torch.empty_like(self._hidden) if ranking else None
        self._positions: Tensor | None = None  # how many axes they have is seen with the first
        self._place = torch.empty(0)  # block of attention's table -> first row in the ring
        self._next = 0

    def record(self, table: Tensor, block: int, begin: int, end: int, rows: Rows) -> None:
        """Keep the rows of the blocks that end among the tokens `begin` to `end` of a prompt.

        Args:
            table: (blocks,) the numbers of the prompt's blocks of stage 0, as attention knows them.
            block: tokens of one of those.
            rows: of the prompt's tokens from its first one on.
        """
        size = self._cache_config.block_size  # what vLLM settles only after the model was built
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
        """The rows of the first `tokens` tokens of a prompt, whole blocks; the others are those of `record`.

        Raises:
            RuntimeError: for a part of a block, or if no rows were kept at all: a step of this prompt is missing.
        """
        if self._positions is None or tokens % self._cache_config.block_size:
            raise RuntimeError(f"pyramiddrop: rows of the {tokens} earlier tokens of a prompt are missing")
        at = _tokens_of(self._place[table[: tokens // block].long()], block)
        ranking = None if self._ranking is None else self._ranking[at]
        return Rows(self._hidden[at], self._positions[at].movedim(0, -1), ranking)


def _tokens_of(places: Tensor, block: int) -> Tensor:
    """The rows of the ring that hold the blocks that begin at `places`."""
    return (places[:, None] + torch.arange(block, device=places.device)).flatten()


class RecordedBlocks:
    """The scheduler's account of the blocks whose rows the workers hold.

    In a step a worker may record blocks in another order than they are scheduled in; so a block counts as written over
    as soon as the first of its step may be.
    """

    def __init__(self, limit: int) -> None:
        """`limit`: the blocks that a worker's ring holds."""
        self._limit = limit
        self._known: OrderedDict[int, tuple[Any, int, int]] = OrderedDict()
        self._step = self._before = self._count = 0

    def add(self, blocks: Sequence[Any], step: int) -> set[int]:
        """`blocks`, vLLM's with their hashes, are computed in `step`; the numbers of those that are written over."""
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
        """How many of `blocks`, from the first on, have rows that a request scheduled in `step` can read."""
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
        """The blocks recorded before `step`: a worker reads what a step needs before it records anything."""
        return self._before if step == self._step else self._count
