"""What the layer that ranks at a drop tells of its rows: their keys, and the attention that they receive."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from pyramiddrop.hf.cache_state import CacheIndex
from pyramiddrop.hf.layer_inputs import Kwargs, LayerCall, LayerInputs, take_tokens
from pyramiddrop.hf.masks import Span, causal, hide, take_columns
from pyramiddrop.hf.model_info import UnsupportedModelError
from pyramiddrop.hf.plan import GeneralPlan
from pyramiddrop.hf.query_key import QueryKey, cached_keys, extract
from pyramiddrop.hf.rows import Packing, Selection, Unpacked, take_rows
from pyramiddrop.hf.versions import CACHE_NAMES, cache_of
from pyramiddrop.scoring.attention import attention_by_head


class RankingLayer:
    """One layer at one drop. Nothing is computed before it is asked for.

    Args:
        plan: of the prefill.
        inputs: positions of the rows.
        stage: of the layer.
        earlier: stage -> what earlier calls left in the stage's cache.
        kept: the rows that are left, or None for all.
        rows, alive: (B, N) those rows, and which of them are no padding.
        call: of the layer.
        documents: in those rows, or None if no row is packed; what is asked for is then told of each document.
    """

    def __init__(
        self,
        plan: GeneralPlan,
        inputs: LayerInputs,
        stage: int,
        earlier: Mapping[int, CacheIndex],
        kept: Selection | None,
        rows: Tensor,
        alive: Tensor,
        call: LayerCall,
        documents: Unpacked | None = None,
    ) -> None:
        self.plan, self.inputs, self.stage, self.earlier, self.kept = plan, inputs, stage, earlier, kept
        self.rows, self.alive, self.call, self.documents = rows, alive, call, documents

    def keys(self) -> Tensor:
        """(B, Hkv, N, d), rotated."""
        keys = self._project(self.plan.queries, rotated=True).keys.to(self.call.hidden.device)
        return keys if self.documents is None else _heads_by_document(self.documents, keys)

    def attention(self, *, instruction: bool = False, rotated: bool = True) -> Tensor:
        """(B, H, N) the attention that each row receives; see `pyramiddrop.scoring.Attention`."""
        plan, rows = self.plan, self.rows
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
        keys, key_columns, alive = self._with_past(seen.keys)
        # The layer may be on another device than what it is about to be given: one number a row and head is moved.
        visible, weights = (table.to(keys.device) for table in (self._visible(columns, key_columns, alive), weights))
        received = attention_by_head(seen.queries, keys, visible, weights, seen.scale, seen.softcap, seen.sinks)
        return received[..., -rows.shape[1] :].to(self.call.hidden.device)

    def _within_documents(
        self, packing: Packing, documents: Unpacked, columns: Tensor, weights: Tensor, seen: QueryKey, width: int
    ) -> Tensor:
        """(S, H, W) the attention that each document's rows receive from its own query tokens, at most `width`."""
        numbers = packing.documents.gather(1, columns).masked_fill(weights == 0, packing.count)
        asking = Unpacked(numbers, packing.count, width)
        visible = self._visible(
            asking.take(columns), documents.take(self.rows), documents.valid, packing.rows[:, None, None]
        )
        queries, keys = _heads_by_document(asking, seen.queries), _heads_by_document(documents, seen.keys)
        visible, weights = visible.to(keys.device), asking.valid.to(keys.device)
        received = attention_by_head(queries, keys, visible, weights, seen.scale, seen.softcap, seen.sinks)
        return received.to(self.call.hidden.device)

    def _project(self, columns: Tensor, rotated: bool) -> QueryKey:
        """Queries of the rows at `columns` (B, Q), and keys of all rows that are left."""
        # Numbered on this layer's own cache, which may have dropped more of an earlier turn than this call has yet.
        tokens = self.inputs.tokens(self.stage, self.kept, self.call.hidden, self.call.kwargs)
        if not rotated:
            tokens = tokens | unrotated(tokens)
        arguments = kernel_arguments(tokens, self.call.kwargs)
        seen: QueryKey = extract(self.call.layer, self.call.hidden, self._among_rows(columns), arguments)
        return seen

    def _among_rows(self, columns: Tensor) -> Tensor:
        """(B, Q) where the tokens at `columns` stand among the rows that are left."""
        rows = self.rows
        numbers = torch.arange(rows.shape[1], device=rows.device).expand_as(rows)
        return torch.zeros_like(self.plan.groups).scatter(1, rows, numbers).gather(1, columns)

    def _with_past(self, keys: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Keys (B, Hkv, K, d) with those that the layer's cache holds before them; the column of each (B, K), and which
        are no filler."""
        rows, alive, past = self.rows, self.alive, self.plan.past
        cache: Any = cache_of(self.call.kwargs)
        if not past:
            return keys, rows, alive
        before = self.earlier.get(self.stage, CacheIndex(rows[:, :0], None, 0)).until(past)
        before = before.window(cache, self.call.index, 0)
        cached = cached_keys(self.call.layer, cache.layers[self.call.index])[:, :, : before.columns.shape[1]].to(
            keys.device
        )
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
        plan, mask = self.plan, self.call.kwargs.get("attention_mask")
        if not self.inputs.counts_columns(self.call.index):
            mask = self.inputs.padding
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
        return self.inputs.info.spans[self.call.index]

    def _check_reach(self) -> None:
        """Raise UnsupportedModelError where the ranking layer does not see every visual token: it would rank those it
        cannot see last, whatever they show."""
        span = self._span
        reach = self.plan.past + self.plan.length if span.kind == "chunked" else self.plan.reach
        if span.windowed and reach > span.size:
            whole = [number for number, other in enumerate(self.inputs.info.spans) if other.kind == "full"]
            raise UnsupportedModelError(
                f"layer {self.call.index}, which ranks the visual tokens, sees {span.size} tokens, but they begin "
                f"{reach} tokens before the end of the prompt. Let a layer rank that sees everything "
                f"({whole or 'this model has none'}), or use a method that needs no attention (RandomDrop, UniformDrop)"
            )


def _heads_by_document(documents: Unpacked, heads: Tensor) -> Tensor:
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


def kernel_arguments(tokens: Kwargs, kwargs: Kwargs) -> Callable[[Tensor | None], Kwargs]:
    """What a ranking layer is called with beside some rows: rows (B, n) of `tokens`, or all of them for None, and what
    of `kwargs` is not per token; no mask, and no cache to write to."""
    fixed = {name: value for name, value in kwargs.items() if name not in tokens}
    fixed |= {"attention_mask": None} | {name: None for name in _CACHING if name in kwargs}
    return lambda some: fixed | (tokens if some is None else take_tokens(tokens, some))
