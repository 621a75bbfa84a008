"""The layer that ranks: what its heads attend to, and its keys, for the rows that are left when a stage ends."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pyramiddrop.hf.following import Following, Kwargs, take_tokens
from pyramiddrop.hf.masks import causal, hide, take_columns
from pyramiddrop.hf.memory import CACHE_NAMES, Slots, cache_of
from pyramiddrop.hf.plan import Plan
from pyramiddrop.hf.projections import Projection, Projector
from pyramiddrop.hf.rows import Kept, take_rows
from pyramiddrop.hf.spans import Span
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
    ) -> None:
        self.plan, self.following, self.projector = plan, following, projector
        self.stage, self.earlier, self.kept, self.present = stage, earlier, kept, present
        self.index, self.layer, self.hidden, self.kwargs = index, layer, hidden, kwargs

    def keys(self) -> Tensor:
        """(B, Hkv, N, d), rotated."""
        return self._project(self.plan.queries, rotated=True).keys

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
        keys, key_columns, alive = self._with_past(seen.keys, rows, alive)
        visible = self._visible(columns, key_columns, alive)
        received = attention_by_head(seen.queries, keys, visible, weights, seen.scale, seen.softcap, seen.sinks)
        return received[..., -rows.shape[1] :]

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
        with _no_dropout(self.layer):
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
        with _no_dropout(self.layer):
            cached = _cached_keys(self.layer, cache.layers[self.index])[:, :, : before.columns.shape[1]].to(keys.device)
        if cached.shape[2] != before.columns.shape[1] or cached.shape[1] != keys.shape[1]:
            raise ValueError(
                f"a further image on top of a {type(cache).__name__} is not supported here, for its keys cannot be "
                "read back: use a DynamicCache or a StaticCache"
            )
        columns = torch.cat([before.columns, rows + past], 1)
        return torch.cat([cached, keys], 2), columns, torch.cat([before.alive, alive], 1)

    def _visible(self, asking: Tensor, columns: Tensor, alive: Tensor) -> Tensor:
        """(B, 1 or H, Q, K) which `columns` (B, K) those at `asking` (B, Q) see, by the text model's own full-length
        mask."""
        plan, mask = self.plan, self.kwargs.get("attention_mask")
        if not self.following.trusts(self.index):
            mask = self.following.padding
        if mask is None or mask.dim() == 2:
            seen = causal(asking + plan.past, columns, alive)
            return seen if mask is None else seen & mask.bool().gather(1, columns)[:, None, None]
        offset = plan.past + plan.length - mask.shape[-1] if self._span.windowed else 0
        by_asking = take_rows(mask.transpose(1, 2), asking).transpose(1, 2)
        seen = take_columns(by_asking, (columns - offset).clamp(min=0) if offset else columns)
        return hide(seen, (alive & (columns >= offset) if offset else alive)[:, None, None])

    @property
    def _span(self) -> Span:
        return self.following.anatomy.spans[self.index]

    def _check_reach(self) -> None:
        """Raise ValueError where the ranking layer does not see every visual token: it would rank those it cannot see
        last, whatever they show."""
        span = self._span
        reach = self.plan.past + self.plan.length if span.kind == "chunked" else self.plan.reach
        if span.windowed and reach > span.size:
            whole = [number for number, other in enumerate(self.following.anatomy.spans) if other.kind == "full"]
            raise ValueError(
                f"layer {self.index}, which ranks the visual tokens, sees {span.size} tokens, but they begin {reach} "
                "tokens before the end of the prompt. Let a layer rank that sees everything "
                f"({whole or 'this model has none'}), or use a method that needs no attention (RandomDrop, UniformDrop)"
            )


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


def _cached_keys(layer: nn.Module, cached: Any) -> Tensor:
    """(B, Hkv, K, d) the keys in a layer's cache. Latent attention keeps what it expands them from in each forward."""
    latent: Any = next((module for module in layer.modules() if hasattr(module, "expand_kv")), None)
    keys: Tensor = cached.keys if latent is None else latent.expand_kv(cached.keys, cached.values)[0]
    return keys


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
