"""Ranking and choosing: what a stage end asks of the ranking layer, and the rows that stay."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pyramiddrop.hf.following import Following, Kwargs, take_tokens
from pyramiddrop.hf.masks import causal, hide, take_columns
from pyramiddrop.hf.memory import Slots
from pyramiddrop.hf.plan import Plan
from pyramiddrop.hf.projections import Projector
from pyramiddrop.hf.rows import Kept, take_rows
from pyramiddrop.hf.spans import Span
from pyramiddrop.schedule import Schedule
from pyramiddrop.scoring import Evidence, Scorer, attention_received
from pyramiddrop.selection import compact, select


class Ranking:
    """Decides for one prefill.

    Args:
        plan: of the prefill.
        schedule: of the method.
        scorer: of the method.
        following: positions of the rows.
        earlier: stage -> what earlier calls left in the stage's cache.
        projector: gives the queries and keys.
    """

    def __init__(
        self,
        plan: Plan,
        schedule: Schedule,
        scorer: Scorer,
        following: Following,
        earlier: Mapping[int, Slots],
        projector: Projector,
    ) -> None:
        self.plan, self.schedule, self.scorer = plan, schedule, scorer
        self.following, self.earlier, self.projector = following, earlier, projector

    def present(self, kept: Kept | None) -> tuple[Tensor, Tensor, Tensor]:
        """(B, N) rows that `kept` leaves (None: all), which of them are no filler, and which are visual tokens."""
        plan = self.plan
        if kept is not None:
            rows, valid = kept.rows, kept.valid
        else:
            rows, valid = torch.arange(plan.length, device=plan.visual.device).expand_as(plan.visual), plan.valid
        alive = torch.ones_like(rows, dtype=torch.bool) if valid is None else valid
        return rows, alive, plan.visual.gather(1, rows) & alive

    def choose(self, stage: int, before: Kept | None, scores: Tensor) -> Kept:
        """The rows that the end of `stage` leaves of those `before` it, by their `scores` (B, N)."""
        ending = self.plan.stages[stage - 1]
        rows, alive, visual = self.present(before)
        scores = scores.masked_fill(self.plan.protected.gather(1, rows), float("inf"))
        stays = select(scores, visual, self.plan.groups.gather(1, rows), ending.quota) | (alive & ~visual)
        local, valid = compact(stays, ending.length, ending.ragged)
        return Kept(rows.gather(1, local), local, valid)

    def score(
        self, stage: int, kept: Kept | None, index: int, layer: nn.Module, hidden: Tensor, kwargs: Kwargs
    ) -> Tensor:
        """(B, N) scores for the end of `stage`, of the rows that `kept` leaves.

        Args:
            index: of the ranking layer.
            layer: the ranking layer.
            hidden: (B, N, D), what it receives.
            kwargs: of the text model, for the full length.
        """
        rows, _, visual = self.present(kept)
        return self.scorer(
            Evidence(
                visual=visual,
                ordinal=self.plan.ordinal.gather(1, rows),
                groups=self.plan.groups.gather(1, rows),
                quota=self.plan.stages[stage - 1].quota,
                hidden=hidden,
                attention=lambda: self._attention(kept, index, layer, hidden, kwargs),
            )
        )

    def _attention(self, kept: Kept | None, index: int, layer: nn.Module, hidden: Tensor, kwargs: Kwargs) -> Tensor:
        """(B, N) the attention that each row receives from the query tokens in `layer`."""
        rows, alive, _ = self.present(kept)
        self._check_reach(index)
        # Numbered on this layer's own cache, which may have dropped more of an earlier turn than this call has yet.
        tokens = self.following.tokens(self.schedule.stage_of(index), kept, hidden, kwargs)
        fixed = {name: value for name, value in kwargs.items() if name not in (*tokens, *_CACHING)}
        fixed |= {"attention_mask": None} | {name: None for name in _CACHING if name in kwargs}

        def arguments(some: Tensor | None) -> Kwargs:
            return fixed | (tokens if some is None else take_tokens(tokens, some))

        with _no_dropout(layer):
            seen = self.projector.project(index, layer, hidden, self._asking(rows), arguments)
        keys, columns, alive = self._with_past(index, seen.keys, rows, alive, kwargs.get("past_key_values"))
        visible = self._visible(index, kwargs.get("attention_mask"), columns, alive)
        received = attention_received(
            seen.queries, keys, visible, self.plan.weights, seen.scale, seen.softcap, seen.sinks
        )
        return received[:, -rows.shape[1] :]

    def _asking(self, rows: Tensor) -> Tensor:
        """(B, Q) where the query tokens stand among `rows`."""
        numbers = torch.arange(rows.shape[1], device=rows.device).expand_as(rows)
        return torch.zeros_like(self.plan.groups).scatter(1, rows, numbers).gather(1, self.plan.queries)

    def _with_past(
        self, index: int, keys: Tensor, rows: Tensor, alive: Tensor, cache: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Keys (B, Hkv, K, d) of layer `index` with those that its cache holds before them; the column of each (B, K),
        and which are no filler."""
        past = self.plan.past
        if not past:
            return keys, rows, alive
        before = self.earlier.get(self.schedule.stage_of(index), Slots(rows[:, :0], None, 0)).until(past)
        before = before.handed_out(cache, index, 0)
        cached = cache.layers[index].keys[:, :, : before.columns.shape[1]].to(keys.device)
        if cached.shape[2] != before.columns.shape[1] or cached.shape[1] != keys.shape[1]:
            raise ValueError(
                f"a further image on top of a {type(cache).__name__} is not supported here, for its keys cannot be "
                "read back: use a DynamicCache or a StaticCache; a model with latent attention keeps no keys in either"
            )
        columns = torch.cat([before.columns, rows + past], 1)
        return torch.cat([cached, keys], 2), columns, torch.cat([before.alive, alive], 1)

    def _visible(self, index: int, mask: Tensor | None, columns: Tensor, alive: Tensor) -> Tensor:
        """(B, 1 or H, Q, K) which `columns` the query tokens see, by the text model's own full-length `mask`."""
        plan = self.plan
        if not self.following.trusts(index):
            mask = self.following.padding
        if mask is None or mask.dim() == 2:
            seen = causal(plan.queries + plan.past, columns, alive)
            return seen if mask is None else seen & mask.bool().gather(1, columns)[:, None, None]
        offset = plan.past + plan.length - mask.shape[-1] if self._span(index).windowed else 0
        asking = take_rows(mask.transpose(1, 2), plan.queries).transpose(1, 2)
        seen = take_columns(asking, (columns - offset).clamp(min=0) if offset else columns)
        return hide(seen, (alive & (columns >= offset) if offset else alive)[:, None, None])

    def _span(self, index: int) -> Span:
        return self.following.anatomy.spans[index]

    def _check_reach(self, index: int) -> None:
        """Raise ValueError where the ranking layer does not see every visual token: it would rank those it cannot see
        last, whatever they show."""
        span = self._span(index)
        reach = self.plan.past + self.plan.length if span.kind == "chunked" else self.plan.reach
        if span.windowed and reach > span.size:
            whole = [number for number, other in enumerate(self.following.anatomy.spans) if other.kind == "full"]
            raise ValueError(
                f"layer {index}, which ranks the visual tokens, sees {span.size} tokens, but they begin {reach} tokens "
                f"before the end of the prompt. Let a layer rank that sees everything ({whole or 'this model has none'}"
                "), or use a method that needs no attention (RandomDrop, UniformDrop)"
            )


_CACHING = ("past_key_values", "use_cache")


@contextmanager
def _no_dropout(layer: nn.Module) -> Iterator[None]:
    """Rank without dropout (LoRA's, say): a decision must neither be noisy nor move the random state of training."""
    training = [module for module in layer.modules() if module.training] if layer.training else []
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True
