"""The layer that ranks: what its heads attend to, and its keys, for the rows that are left when a stage ends."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pyramiddrop.hf.anatomy import UnsupportedModelError
from pyramiddrop.hf.following import Following, Kwargs, take_tokens
from pyramiddrop.hf.masks import causal, hide, take_columns
from pyramiddrop.hf.memory import Slots
from pyramiddrop.hf.packing import Packing, Unpacked
from pyramiddrop.hf.plan import Plan
from pyramiddrop.hf.projections import Projection, Projector, cached_keys
from pyramiddrop.hf.rows import Kept, take_rows
from pyramiddrop.hf.spans import Span
from pyramiddrop.hf.versions import CACHE_NAMES, cache_of
from pyramiddrop.scoring.attention import attention_by_head


class RankingLayer:
    """One layer at one stage end. Nothing is computed before it is asked for.

    Args:
        plan: of the prefill.
        following: positions of the rows.
        projector: gives the queries and keys.
        stage: drops that the layer has behind it.
        earlier: stage -> what earlier calls left in the stage's cache.
        kept: the rows that are left, or None for all.
        present: (B, N) those rows, and which of them are no filler.
        index: of the layer.
        layer: the layer.
        hidden: (B, N, D), what it receives.
        kwargs: of the text model, for the full length.
        documents: in those rows, or None where no row is packed; what is asked for is then told of each document.
    """

    def __init__(
        self,
        plan: Plan,
        following: Following,
        projector: Projector,
        stage: int,
        earlier: Mapping[int, Slots],
        kept: Kept | None,
        present: tuple[Tensor, Tensor],
        index: int,
        layer: nn.Module,
        hidden: Tensor,
        kwargs: Kwargs,
        documents: Unpacked | None = None,
    ) -> None:
        self.plan, self.following, self.projector = plan, following, projector
        self.stage, self.earlier, self.kept, self.present = stage, earlier, kept, present
        self.index, self.layer, self.hidden, self.kwargs = index, layer, hidden, kwargs
        self.documents = documents

    def keys(self) -> Tensor:
        """(B, Hkv, N, d), rotated."""
        keys = self._project(self.plan.queries, rotated=True).keys.to(self.hidden.device)
        return keys if self.documents is None else _by_document(self.documents, keys)

    def attention(self, *, instruction: bool = False, rotated: bool = True) -> Tensor:
        """(B, H, N) the attention that each row receives; see `pyramiddrop.scoring.Attention`."""
        plan, (rows, alive) = self.plan, self.present
        columns, weights = plan.queries, plan.weights
        if instruction:
            columns, weights = plan.instruction, plan.instruction_weights
        if plan.past and not rotated:
            raise ValueError(
                "score='rope_free' cannot rank a further image on top of a cache, whose keys are rotated already; give "
                "the whole conversation without a cache, or use another score"
            )
        self._check_reach()
        seen = self._project(columns, rotated)
        if plan.packing is not None and self.documents is not None:
            width = plan.packing.instruction if instruction else plan.packing.queries
            return self._within_documents(plan.packing, self.documents, columns, weights, seen, width)
        keys, key_columns, alive = self._with_past(seen.keys, rows, alive)
        # The layer may be on another device than what it is about to be given: one number a row and head is moved.
        visible, weights = (table.to(keys.device) for table in (self._visible(columns, key_columns, alive), weights))
        received = attention_by_head(seen.queries, keys, visible, weights, seen.scale, seen.softcap, seen.sinks)
        return received[..., -rows.shape[1] :].to(self.hidden.device)

    def _within_documents(
        self, packing: Packing, documents: Unpacked, columns: Tensor, weights: Tensor, seen: Projection, width: int
    ) -> Tensor:
        """(S, H, W) the attention that each document's rows receive from its own query tokens, at most `width`."""
        numbers = packing.documents.gather(1, columns).masked_fill(weights == 0, packing.count)
        asking = Unpacked(numbers, packing.count, width)
        visible = self._visible(
            asking.take(columns), documents.take(self.present[0]), documents.valid, packing.rows[:, None, None]
        )
        queries, keys = _by_document(asking, seen.queries), _by_document(documents, seen.keys)
        visible, weights = visible.to(keys.device), asking.valid.to(keys.device)
        received = attention_by_head(queries, keys, visible, weights, seen.scale, seen.softcap, seen.sinks)
        return received.to(self.hidden.device)

    def _project(self, columns: Tensor, rotated: bool) -> Projection:
        """Queries of the rows at `columns` (B, Q), and keys of all rows that are left."""
        # Numbered on this layer's own cache, which may have dropped more of an earlier turn than this call has yet.
        tokens = self.following.tokens(self.stage, self.kept, self.hidden, self.kwargs)
        if not rotated:
            tokens = tokens | unrotated(tokens)
        fixed = {name: value for name, value in self.kwargs.items() if name not in (*tokens, *_CACHING)}
        fixed |= {"attention_mask": None} | {name: None for name in _CACHING if name in self.kwargs}

        def arguments(some: Tensor | None) -> Kwargs:
            return fixed | (tokens if some is None else take_tokens(tokens, some))

        asking = self._among_rows(columns)
        seen: Projection = self.projector.project(self.index, self.layer, self.hidden, asking, arguments)
        return seen

    def _among_rows(self, columns: Tensor) -> Tensor:
        """(B, Q) where the tokens at `columns` stand among the rows that are left."""
        rows = self.present[0]
        numbers = torch.arange(rows.shape[1], device=rows.device).expand_as(rows)
        return torch.zeros_like(self.plan.groups).scatter(1, rows, numbers).gather(1, columns)

    def _with_past(self, keys: Tensor, rows: Tensor, alive: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Keys (B, Hkv, K, d) with those that the layer's cache holds before them; the column of each (B, K), and which
        are no filler."""
        past: int = self.plan.past
        cache: Any = cache_of(self.kwargs)
        if not past:
            return keys, rows, alive
        before = self.earlier.get(self.stage, Slots(rows[:, :0], None, 0)).until(past)
        before = before.handed_out(cache, self.index, 0)
        cached = cached_keys(self.layer, cache.layers[self.index])[:, :, : before.columns.shape[1]].to(keys.device)
        if cached.shape[2] != before.columns.shape[1] or cached.shape[1] != keys.shape[1]:
            raise ValueError(
                f"a further image on top of a {type(cache).__name__} is not supported here, for its keys cannot be "
                "read back: use a DynamicCache or a StaticCache"
            )
        columns = torch.cat([before.columns, rows + past], 1)
        return torch.cat([cached, keys], 2), columns, torch.cat([before.alive, alive], 1)

    def _visible(self, asking: Tensor, columns: Tensor, alive: Tensor, batch: Tensor | None = None) -> Tensor:
        """(B, 1 or H, Q, K) which `columns` (B, K) those at `asking` (B, Q) see, by the text model's own full-length
        mask; of packed rows, (S, 1, 1) `batch` tells the row of each document."""
        plan, mask = self.plan, self.kwargs.get("attention_mask")
        if not self.following.trusts(self.index):
            mask = self.following.padding
        if mask is None or mask.dim() == 2:
            seen = causal(asking + plan.past, columns, alive)
            if mask is None:
                return seen
            shown: Tensor = mask.bool().gather(1, columns) if batch is None else mask.bool()[batch[..., 0], columns]
            return seen & shown[:, None, None]
        offset = plan.past + plan.length - mask.shape[-1] if self._span.windowed else 0
        if batch is not None:
            mask = mask.expand(len(plan.visual), -1, -1, -1)
            seen = mask[batch, :, asking[..., None], columns[:, None]].movedim(-1, 1)
            return hide(seen, alive[:, None, None])
        by_asking = take_rows(mask.transpose(1, 2), asking).transpose(1, 2)
        seen = take_columns(by_asking, (columns - offset).clamp(min=0) if offset else columns)
        return hide(seen, (alive & (columns >= offset) if offset else alive)[:, None, None])

    @property
    def _span(self) -> Span:
        return self.following.anatomy.spans[self.index]

    def _check_reach(self) -> None:
        """Raise UnsupportedModelError where the ranking layer does not see every visual token: it would rank those it
        cannot see last, whatever they show."""
        span = self._span
        reach = self.plan.past + self.plan.length if span.kind == "chunked" else self.plan.reach
        if span.windowed and reach > span.size:
            whole = [number for number, other in enumerate(self.following.anatomy.spans) if other.kind == "full"]
            raise UnsupportedModelError(
                f"layer {self.index}, which ranks the visual tokens, sees {span.size} tokens, but they begin {reach} "
                "tokens before the end of the prompt. Let a layer rank that sees everything "
                f"({whole or 'this model has none'}), or use a method that needs no attention (RandomDrop, UniformDrop)"
            )


def _by_document(documents: Unpacked, heads: Tensor) -> Tensor:
    """(S, H, W, d) queries or keys of each document, of those of rows (B, H, N, d)."""
    return documents.take(heads.transpose(1, 2)).transpose(1, 2)


_CACHING = (*CACHE_NAMES, "use_cache")


def unrotated(tokens: Kwargs) -> Kwargs:
    """What makes of the position arguments in `tokens` those of a prompt all of whose tokens stand at position 0.

    Of a cosine and a sine (or a complex number) only the length is left, for some models scale queries and keys by it.
    """
    changed: Kwargs = {}
    embeddings = tokens.get("position_embeddings")
    if isinstance(embeddings, Tensor):
        changed["position_embeddings"] = embeddings.abs().to(embeddings.dtype)
    elif embeddings is not None:
        cos, sin = embeddings
        changed["position_embeddings"] = (torch.hypot(cos.float(), sin.float()).to(cos.dtype), torch.zeros_like(sin))
    if tokens.get("position_ids") is not None:
        changed["position_ids"] = torch.zeros_like(tokens["position_ids"])
    return changed
