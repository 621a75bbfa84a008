"""Select the rows that a request keeps at a drop, with the core's scorers and selection."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from vllm.distributed import get_tensor_model_parallel_world_size, tensor_model_parallel_all_gather

from pyramiddrop.scoring import ScorerInputs
from pyramiddrop.scoring.attention import attention_by_head
from pyramiddrop.selection import compact, select
from pyramiddrop.vllm.prompts import VisualPrompt
from pyramiddrop.vllm.rules import Rules


class TokenSelector:
    """The remaining rows of one request, from the first drop of its prompt to the last.

    Attributes:
        asking: the row of the prompt's last token, whose attention ranks; it is never dropped.
    """

    def __init__(self, prompt: VisualPrompt, length: int, rules: Rules, device: torch.device) -> None:
        """Begin with `length` rows: the prompt's, and those of tokens generated before a preemption."""
        self._prompt, self._rules = prompt, rules
        self.asking, self._length = prompt.length - 1, length
        columns = prompt.columns.to(device, non_blocking=True)
        self._visual = torch.zeros(1, length, dtype=torch.bool, device=device)
        self._visual[0, columns] = True
        self._groups = torch.zeros(1, length, dtype=torch.long, device=device)
        self._groups[0, columns] = prompt.groups.to(device, non_blocking=True)
        self._token_index = (self._visual.long().cumsum(1) - 1).clamp(min=0)

    def drops(self, stage: int) -> bool:
        """True if the drop before `stage` drops any token."""
        return self._prompt.dropped[stage] > self._prompt.dropped[stage - 1]

    def ranks(self, stage: int) -> bool:
        """True if the drop before `stage` ranks: it drops some visual tokens and keeps others."""
        return self.drops(stage) and any(self._prompt.num_keep[stage - 1])

    def scores(self, stage: int, layer: Any, hidden: Tensor, positions: Tensor) -> Tensor:
        """(1, N) float32 scores for the drop before `stage`.

        Args:
            layer: vLLM's decoder layer that ranks.
            hidden: (N, D), its input.
            positions: (N,) or (3, N).
        """
        return self._rules.scorer(
            ScorerInputs(
                layer=self._rules.schedule.layers[stage - 1],
                visual=self._visual,
                token_index=self._token_index,
                groups=self._groups,
                num_keep=self._num_keep(stage),
                hidden=hidden[None],
                attention=lambda **_: attention_from(layer, hidden, positions, self.asking),
                keys=_not_served,
            )
        )

    def choose(self, stage: int, scores: Tensor | None) -> Tensor:
        """Keep the best rows and return their indices, (n,) long, ascending; without scores, no row is ranked."""
        scores = torch.zeros(self._visual.shape, device=self._visual.device) if scores is None else scores
        protected = torch.zeros_like(self._visual)
        protected[0, self.asking] = True
        scores = scores.masked_fill(protected, float("inf"))
        stays = select(scores, self._visual, self._groups, self._num_keep(stage)) | ~self._visual
        gone = self._prompt.dropped[stage] - self._prompt.dropped[stage - 1]
        self._length -= gone
        self.asking -= gone  # visual tokens come before the prompt's last token, or are it
        rows, _ = compact(stays, self._length, ragged=False)
        self._visual, self._groups, self._token_index = (
            state.gather(1, rows) for state in (self._visual, self._groups, self._token_index)
        )
        return rows[0]

    def _num_keep(self, stage: int) -> Tensor:
        return torch.tensor([self._prompt.num_keep[stage - 1]]).to(self._visual.device, non_blocking=True)


def _not_served() -> Tensor:
    raise RuntimeError("a scorer that reads keys is not served")  # rules.py has refused it


def attention_from(layer: Any, hidden: Tensor, positions: Tensor, asking: int) -> Tensor:
    """(1, H, N) float32: the attention that each row receives in each head of `layer` from the row `asking`.

    Rows after `asking` were generated later and receive none.
    """
    queries, keys = project(layer, hidden[: asking + 1], positions[..., : asking + 1])
    received = attention_by_head(
        queries[None, -1:].transpose(1, 2),
        keys[None].transpose(1, 2),
        torch.ones(1, 1, 1, asking + 1, dtype=torch.bool, device=hidden.device),
        torch.ones(1, 1, device=hidden.device),
        layer.self_attn.scaling,
    )
    if get_tensor_model_parallel_world_size() > 1:
        # Gathered before heads are averaged, so that all ranks add in the same order and agree to the last bit.
        received = tensor_model_parallel_all_gather(received, dim=1)
    return torch.nn.functional.pad(received, (0, len(hidden) - asking - 1))


def project(layer: Any, hidden: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """This rank's rotated queries (N, H, d) and keys (N, Hkv, d) of `hidden` (N, D) in `layer`."""
    attention = layer.self_attn
    packed, _ = attention.qkv_proj(layer.input_layernorm(hidden))
    queries, keys, _ = packed.split([attention.q_size, attention.kv_size, attention.kv_size], dim=-1)
    if hasattr(attention, "q_norm"):
        queries, keys = _normed(attention.q_norm, queries), _normed(attention.k_norm, keys)
    queries, keys = attention.rotary_emb(positions.contiguous(), queries.contiguous(), keys.contiguous())
    width = attention.head_dim
    return queries.view(len(hidden), -1, width), keys.view(len(hidden), -1, width)


def _normed(norm: Any, states: Tensor) -> Tensor:
    """Normalise each head, as in Qwen3."""
    heads: Tensor = norm(states.view(*states.shape[:-1], -1, norm.weight.shape[-1]))
    return heads.flatten(-2)
