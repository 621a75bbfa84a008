"""Rank the visual tokens at a drop by the scorer's inputs from the ranking layer, and select the kept rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pyramiddrop.hf.cache_state import CacheIndex
from pyramiddrop.hf.compatibility import cache_unwritten, check_cache, check_per_token
from pyramiddrop.hf.layer_inputs import Kwargs, LayerCall, LayerInputs, take_tokens
from pyramiddrop.hf.masks import causal, hide, take_columns
from pyramiddrop.hf.model_info import UnsupportedModelError
from pyramiddrop.hf.plan import GeneralPlan, LastTokenPlan, Plan
from pyramiddrop.hf.query_key import QueryKey, cached_keys, extract
from pyramiddrop.hf.rows import Packing, Selection, Unpacked, take_rows
from pyramiddrop.hf.versions import CACHE_NAMES, cache_of
from pyramiddrop.scoring import ScorerInputs
from pyramiddrop.scoring.attention import attention_by_head, attention_received
from pyramiddrop.selection import best, compact, select
from pyramiddrop.trace import Ranked, Trace

#: Gives the vision tower's score of each visual token of a plan, (B, L) float.
VisionScores = Callable[[GeneralPlan], Tensor]


class Ranking:
    """The decisions of one prefill: scores at each drop, the kept rows, and their record in the trace."""

    plan: Plan

    def score(self, drop: int, kept: Selection | None, call: LayerCall, previous: Tensor | None) -> Tensor:
        """(B, n) scores for `drop` of the rows that are `kept` before it, on the device of the plan.

        The called layer ranks; `previous` (B, N, D) is the input of the layer before it, or None.
        """
        check_cache(call.layer, call.kwargs)
        check_per_token(call.layer, call.kwargs, self.plan.length)
        with cache_unwritten(call.layer, call.index, call.kwargs):
            return self._score(drop, kept, call, previous).to(self.device)

    @property
    def device(self) -> torch.device:
        """The device of the plan's tensors."""
        raise NotImplementedError

    def move(self, device: torch.device) -> None:
        """Move to another device."""
        if self.device != device:
            self.plan = self.plan.to(device)

    def choose(self, drop: int, before: Selection | None, scores: Tensor | None) -> Selection:
        """Select the rows that `drop` keeps of those `before` it, by the scores; None if it does not rank."""
        raise NotImplementedError

    def record(
        self, trace: Trace, drop: int, before: Selection | None, kept: Selection | None, scores: Tensor | None
    ) -> None:
        """Record a drop in the trace; `scores` is None if it did not rank."""
        planned = self.plan.drops[drop]
        ranked = None if scores is None else Ranked(*self._visual_rows(drop, before), scores)
        trace.record(planned.layer, planned.keep, *self._visual_rows(drop + 1, kept), self.plan.past, ranked)

    def _visual_rows(self, stage: int, kept: Selection | None) -> tuple[Tensor, Tensor | None]:
        """(B, n) rows of `stage`, which are `kept`, and which of them are visual tokens; None: all."""
        raise NotImplementedError

    def _score(self, drop: int, kept: Selection | None, call: LayerCall, previous: Tensor | None) -> Tensor:
        raise NotImplementedError


class LastTokenRanking(Ranking):
    """The usual prefill, scored by attention: the last row is the query and attends to every row."""

    def __init__(self, plan: LastTokenPlan, inputs: LayerInputs) -> None:
        self.plan: LastTokenPlan = plan
        self.inputs = inputs
        self._left: dict[int, Tensor] = {}  # stage -> (B, V) the columns that the drop before it has kept

    @property
    def device(self) -> torch.device:
        return self.plan.columns.device

    def _visual(self, stage: int) -> Tensor:
        """(B, V) ascending, the columns of the visual tokens of `stage`."""
        chosen = max((number for number in self._left if number <= stage), default=None)
        return self.plan.visual if chosen is None else self._left[chosen]

    def _visual_rows(self, stage: int, kept: Selection | None) -> tuple[Tensor, None]:
        return self._visual(stage), None

    def _score(self, drop: int, kept: Selection | None, call: LayerCall, previous: Tensor | None) -> Tensor:
        tokens = self.inputs.tokens(drop, kept, call.hidden, call.kwargs)
        seen: QueryKey = extract(call.layer, call.hidden, None, _kernel_arguments(tokens, call.kwargs))
        scores = attention_received(seen.queries, seen.keys, None, None, seen.scale, seen.softcap, seen.sinks)
        columns = self._visual(drop)
        rows = columns if kept is None else torch.searchsorted(kept.rows, columns)
        return scores.gather(1, rows.to(scores.device))

    def choose(self, drop: int, before: Selection | None, scores: Tensor | None) -> Selection:
        columns = self._visual(drop)
        chosen = columns[:, :0] if scores is None else best(scores, self.plan.drops[drop].kept)
        columns = columns.gather(1, chosen).sort().values
        self._left[drop + 1] = columns
        rows = torch.cat([self.plan.text, columns], 1).sort().values
        return Selection(rows, rows if before is None else torch.searchsorted(before.rows, rows), None)


class GeneralRanking(Ranking):
    """Any prefill, with any scorer.

    Args:
        earlier: stage -> the slots that earlier calls left in the stage's cache.
        vision: gives the vision tower's scores for a drop before the decoder that needs them, or None.
    """

    def __init__(
        self, plan: GeneralPlan, inputs: LayerInputs, earlier: Mapping[int, CacheIndex], vision: VisionScores | None
    ) -> None:
        self.plan: GeneralPlan = plan
        self.inputs, self.earlier, self.vision = inputs, earlier, vision
        self._active: dict[Selection | None, ActiveRows] = {}

    @property
    def device(self) -> torch.device:
        return self.plan.visual.device

    def _score(self, drop: int, kept: Selection | None, call: LayerCall, previous: Tensor | None) -> Tensor:
        plan, rules, device = self.plan, self.inputs.rules, call.hidden.device
        rows, alive, visual = self.active_rows(kept)
        documents, packing, bounds = None, plan.packing, plan.document_bounds(drop)
        if packing is not None and bounds is not None:
            numbers = packing.documents.gather(1, rows).masked_fill(~alive, packing.count)
            documents = Unpacked(numbers, packing.count, bounds.longest)
        ranking_layer = RankingLayer(self, kept, rows, alive, call, documents)
        scorer_inputs = ScorerInputs(
            layer=plan.drops[drop].layer,
            visual=visual.to(device),
            token_index=plan.token_index.gather(1, rows).to(device),
            groups=plan.groups.gather(1, rows).to(device),
            num_keep=plan.num_keeps[drop].to(device),
            hidden=_first_stream(call.hidden),
            attention=ranking_layer.attention,
            keys=ranking_layer.keys,
            previous=None if previous is None else _first_stream(previous).to(device),
            vision=self.vision(plan).to(device) if self.vision and not plan.drops[drop].layer else None,
        )
        if packing is None or documents is None:
            return rules.scorer(scorer_inputs)
        return documents.put(rules.scorer(_by_document(scorer_inputs, packing, documents)))

    def choose(self, drop: int, before: Selection | None, scores: Tensor | None) -> Selection:
        return select_rows(self.plan, drop, self.active_rows(before), scores)

    def active_rows(self, kept: Selection | None) -> ActiveRows:
        """`active_rows` of the plan, computed once."""
        if kept not in self._active:
            self._active[kept] = active_rows(self.plan, kept)
        return self._active[kept]

    def _visual_rows(self, stage: int, kept: Selection | None) -> tuple[Tensor, Tensor]:
        rows, _, visual = self.active_rows(kept)
        return rows, visual


def _by_document(scorer_inputs: ScorerInputs, packing: Packing, documents: Unpacked) -> ScorerInputs:
    """The scorer's inputs for packed rows, with each document as a row of a batch."""
    own = packing.owners[packing.rows] == torch.arange(packing.count, device=packing.rows.device)[:, None]
    own, valid = own.to(scorer_inputs.visual.device), documents.valid.to(scorer_inputs.visual.device)
    previous, vision = scorer_inputs.previous, scorer_inputs.vision
    return replace(
        scorer_inputs,
        visual=documents.take(scorer_inputs.visual) & valid,
        token_index=documents.take(scorer_inputs.token_index),
        groups=documents.take(scorer_inputs.groups),
        num_keep=scorer_inputs.num_keep[packing.rows.to(own.device)] * own,
        hidden=documents.take(scorer_inputs.hidden),
        previous=None if previous is None else documents.take(previous),
        vision=None if vision is None else documents.take(vision),
    )


def _first_stream(hidden: Tensor) -> Tensor:
    """(B, N, D): the stream that layers compute on, in models with several hidden streams (Gemma 3n)."""
    return hidden if hidden.dim() == 3 else hidden[0]


ActiveRows = tuple[Tensor, Tensor, Tensor]


def active_rows(plan: GeneralPlan, kept: Selection | None) -> ActiveRows:
    """(B, N) the rows in `kept` (None: all), which of them are not padding, and which are visual tokens."""
    if kept is not None:
        rows, valid = kept.rows, kept.valid
    else:
        rows, valid = torch.arange(plan.length, device=plan.visual.device).expand_as(plan.visual), plan.valid
    alive = torch.ones_like(rows, dtype=torch.bool) if valid is None else valid
    return rows, alive, plan.visual.gather(1, rows) & alive


def select_rows(plan: GeneralPlan, drop: int, before: ActiveRows, scores: Tensor | None) -> Selection:
    """Select the rows that `drop` keeps of the active ones `before` it, by their `scores` (B, N)."""
    rows, alive, visual = before
    scores = torch.zeros(rows.shape, device=rows.device) if scores is None else scores
    scores = scores.masked_fill(plan.protected.gather(1, rows), float("inf"))
    stays = select(scores, visual, plan.groups.gather(1, rows), plan.num_keeps[drop]) | (alive & ~visual)
    index, valid = compact(stays, plan.drops[drop].length, plan.ragged[drop])
    return Selection(rows.gather(1, index), index, valid)


@dataclass(eq=False)
class RankingLayer:
    """The ranking layer at one drop. It computes keys and attention only when they are requested.

    Attributes:
        kept: the remaining rows; None: all.
        rows, alive: (B, N) the indices of these rows, and which of them are not padding.
        call: the call of the layer.
        documents: the documents of these rows; None if no row is packed. Results are then given for each document.
    """

    ranking: GeneralRanking
    kept: Selection | None
    rows: Tensor
    alive: Tensor
    call: LayerCall
    documents: Unpacked | None

    def __post_init__(self) -> None:
        self.plan, self.inputs = self.ranking.plan, self.ranking.inputs
        self.stage = self.inputs.rules.schedule.stage_of(self.call.index)
        self.scope = self.inputs.info.scopes[self.call.index]

    def keys(self) -> Tensor:
        """(B, Hkv, N, d), rotated."""
        keys = self._project(self.plan.queries, rotated=True).keys.to(self.call.hidden.device)
        return keys if self.documents is None else _heads_by_document(self.documents, keys)

    def attention(self, *, instruction: bool = False, rotated: bool = True) -> Tensor:
        """(B, H, N) the attention that each row receives; see `pyramiddrop.scoring.Attention`."""
        plan = self.plan
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
        if plan.packing is None or self.documents is None:
            keys, key_columns, alive = self._with_past(seen.keys)
            queries, visible = seen.queries, self._visible(columns, key_columns, alive)
        else:  # each document's rows receive attention from its own query tokens alone
            packing, documents = plan.packing, self.documents
            numbers = packing.documents.gather(1, columns).masked_fill(weights == 0, packing.count)
            asking = Unpacked(numbers, packing.count, packing.instruction if instruction else packing.queries)
            queries, keys = _heads_by_document(asking, seen.queries), _heads_by_document(documents, seen.keys)
            query_columns, key_columns, weights = asking.take(columns), documents.take(self.rows), asking.valid
            visible = self._visible(query_columns, key_columns, documents.valid, packing.rows[:, None, None])
        # The layer may be on another device than its inputs; only one number for each row and head is moved.
        visible, weights = visible.to(keys.device), weights.to(keys.device)
        received = attention_by_head(queries, keys, visible, weights, seen.scale, seen.softcap, seen.sinks)
        return received[..., -self.rows.shape[1] :].to(self.call.hidden.device)

    def _project(self, columns: Tensor, rotated: bool) -> QueryKey:
        """Queries of the rows at `columns` (B, Q), and keys of all remaining rows."""
        # Positions are those of this layer's own cache, which may have dropped more of an earlier turn than this call.
        tokens = self.inputs.tokens(self.stage, self.kept, self.call.hidden, self.call.kwargs)
        if not rotated:
            tokens = tokens | _unrotated(tokens)
        arguments = _kernel_arguments(tokens, self.call.kwargs)
        rows = self.rows
        numbers = torch.arange(rows.shape[1], device=rows.device).expand_as(rows)  # of tokens among the remaining rows
        query_rows = torch.zeros_like(self.plan.groups).scatter(1, rows, numbers).gather(1, columns)
        seen: QueryKey = extract(self.call.layer, self.call.hidden, query_rows, arguments)
        return seen

    def _with_past(self, keys: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Keys (B, Hkv, K, d) after the cached ones, the column of each (B, K), and which are not padding."""
        rows, alive, past, cache = self.rows, self.alive, self.plan.past, cache_of(self.call.kwargs)
        if not past:
            return keys, rows, alive
        before = self.ranking.earlier.get(self.stage, CacheIndex(rows[:, :0], None, 0)).resized(past)
        before = before.window(cache, self.call.index, 0)
        cached, count = cached_keys(self.call.layer, cache.layers[self.call.index]), before.columns.shape[1]
        cached = cached[:, :, :count].to(keys.device)
        if cached.shape[2] != count or cached.shape[1] != keys.shape[1]:
            raise ValueError(
                f"a further image on top of a {type(cache).__name__} is not supported here, for its keys cannot be "
                "read back: use a DynamicCache or a StaticCache"
            )
        columns = torch.cat([before.columns, rows + past], 1)
        return torch.cat([cached, keys], 2), columns, torch.cat([before.alive, alive], 1)

    def _visible(self, query_columns: Tensor, columns: Tensor, alive: Tensor, batch: Tensor | None = None) -> Tensor:
        """(B, 1 or H, Q, K): which `columns` (B, K) those at `query_columns` (B, Q) attend to, by the model's mask.

        For packed rows, (S, 1, 1) `batch` gives the row of each document.
        """
        plan, mask = self.plan, self.call.kwargs.get("attention_mask")
        if not self.inputs.counts_columns(self.call.index):
            mask = self.inputs.padding
        if mask is None or mask.dim() == 2:
            seen = causal(query_columns + plan.past, columns, alive)
            if mask is None:
                return seen
            shown: Tensor = mask.bool().gather(1, columns) if batch is None else mask.bool()[batch[..., 0], columns]
            return seen & shown[:, None, None]
        offset = plan.past + plan.length - mask.shape[-1] if self.scope.windowed else 0
        if batch is not None:
            mask = mask.expand(len(plan.visual), -1, -1, -1)
            seen = mask[batch, :, query_columns[..., None], columns[:, None]].movedim(-1, 1)
            return hide(seen, alive[:, None, None])
        query_rows = take_rows(mask.transpose(1, 2), query_columns).transpose(1, 2)
        seen = take_columns(query_rows, (columns - offset).clamp(min=0) if offset else columns)
        return hide(seen, (alive & (columns >= offset) if offset else alive)[:, None, None])

    def _check_reach(self) -> None:
        """Raise UnsupportedModelError if the ranking layer does not attend to every visual token.

        It would rank the tokens outside its window last, regardless of their content.
        """
        scope, plan = self.scope, self.plan
        reach = plan.past + plan.length if scope.kind == "chunked" else plan.reach
        if scope.windowed and reach > scope.size:
            whole = [number for number, other in enumerate(self.inputs.info.scopes) if other.kind == "full"]
            raise UnsupportedModelError(
                f"layer {self.call.index}, which ranks the visual tokens, sees {scope.size} tokens, but they begin "
                f"{reach} tokens before the end of the prompt. Let a layer rank that sees everything "
                f"({whole or 'this model has none'}), or use a method that needs no attention (RandomDrop, UniformDrop)"
            )


def _heads_by_document(documents: Unpacked, heads: Tensor) -> Tensor:
    """(S, H, W, d) queries or keys of each document, taken from those of rows (B, H, N, d)."""
    return documents.take(heads.transpose(1, 2)).transpose(1, 2)


_CACHING = (*CACHE_NAMES, "use_cache")


def _unrotated(tokens: Kwargs) -> Kwargs:
    """Replace the position arguments in `tokens` by those of a prompt with every token at position 0.

    Cosines and sines (or complex numbers) keep their length, by which some models scale queries and keys.
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


def _kernel_arguments(tokens: Kwargs, kwargs: Kwargs) -> Callable[[Tensor | None], Kwargs]:
    """The further arguments of a ranking layer for rows (B, n); None: all rows.

    They are these rows of `tokens`, and everything in `kwargs` that is not per token, without mask and cache.
    """
    fixed = {name: value for name, value in kwargs.items() if name not in tokens}
    fixed |= {"attention_mask": None} | {name: None for name in _CACHING if name in kwargs}
    return lambda some: fixed | (tokens if some is None else take_tokens(tokens, some))
