"""Drop visual tokens before the decoder, by attention in the vision encoder or by a smaller picture.

For the controls that papers are compared with. It stands on the same hooks as staged dropping, but there is nothing to
follow inside: masks and positions are cut once, and the KV cache of every layer is equally short.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate
from torch.utils.hooks import RemovableHandle

from pyramiddrop.families import FAMILIES
from pyramiddrop.hf.attachment import Attachment
from pyramiddrop.hf.cache_state import RowMemory, cache_made, check_lengths, forget, memory_of, past_length, remember
from pyramiddrop.hf.compatibility import check_signatures, number_run
from pyramiddrop.hf.dispatch import Dispatcher, tokens_of
from pyramiddrop.hf.forward import Forward, Rules
from pyramiddrop.hf.generation import Generation
from pyramiddrop.hf.layer_inputs import Kwargs, per_token
from pyramiddrop.hf.model_info import ModelInfo, UnsupportedModelError, check_grouping
from pyramiddrop.hf.plan import GeneralPlan
from pyramiddrop.hf.prompt_masks import GivenMasks
from pyramiddrop.hf.query_key import extract
from pyramiddrop.hf.ranking import active_rows, select_rows
from pyramiddrop.hf.rows import Selection, give_back, scatter_rows, take_next_labels, take_rows
from pyramiddrop.hf.versions import cache_of, let_crop_follow
from pyramiddrop.schedule import PreLLMSchedule
from pyramiddrop.scoring import ScorerInputs
from pyramiddrop.scoring.attention import attention_by_head
from pyramiddrop.trace import Ranked, Trace


@dataclass
class _Memory(RowMemory):
    """What a cache holds of a prompt of `length` columns: the rows that were `kept`, with their `positions`."""

    length: int
    kept: Selection
    positions: str

    @staticmethod
    def of(cache: Any, past: int, batch: int, positions: str) -> _Memory | None:
        """The memory of a cache that holds `past` tokens, for a call of this `batch`; None where there is none.

        Raises:
            ValueError: where a call cannot go on with the cache.
        """
        memory = memory_of(cache)
        if memory is None:
            return None
        if not isinstance(memory, _Memory) or memory.positions != positions:
            raise ValueError(
                "this KV cache was pruned by another method, and cannot be continued by one that drops before the "
                f"decoder with positions={positions!r}; go on with the method that filled it, or start without it"
            )
        held, rows = memory.kept.rows.shape
        if held != batch:
            raise ValueError(f"this KV cache was pruned for a batch of {held}; this call has a batch of {batch}")
        if past < rows:
            raise ValueError(
                f"this KV cache holds {past} tokens of a prompt of which {rows} were kept: it was cropped into that "
                "prompt, or something else has removed keys from it, such as a press of kvpress. Crop only what "
                "follows the prompt, and use one method at a time"
            )
        return memory

    def select(self, pick: Callable[[Tensor], Tensor]) -> _Memory:
        """The memory of the rows that `pick` takes of a (B, ...) tensor."""
        kept = self.kept
        valid = None if kept.valid is None else pick(kept.valid)
        return replace(self, kept=Selection(pick(kept.rows), pick(kept.index), valid))


class PreLLMAttachment(Attachment):
    """A method that drops before the decoder, on a model.

    Args:
        shrinks: whether the vision tower sees a smaller picture, and its tokens are those that stay.

    Raises:
        RuntimeError: where the model has a method already.
        UnsupportedModelError: where the model cannot work so.
    """

    def __init__(self, info: ModelInfo, rules: Rules, given: GivenMasks, shrinks: bool) -> None:
        windowed = [index for index, scope in enumerate(info.scopes) if scope.kind != "full"]
        if windowed:
            raise UnsupportedModelError(
                f"{type(info.text).__name__} cannot drop before its first layer: layer {windowed[0]} does not see "
                "everything, and would count what is left"
            )
        self.watch = ClsAttentionRecorder(Tower(info)) if rules.scorer.needs_vision_attention else None
        self.shrunk: DownsampledEncoder | None = None
        if shrinks:
            tower = Tower(info)
            self.shrunk = DownsampledEncoder(tower, small_side(tower.side, rules.schedule.keep[0]))
            rules = replace(rules, schedule=PreLLMSchedule.keeping(self.shrunk.share))
        super().__init__(info, rules, given)

    def _make_dispatcher(self) -> PreLLMDispatcher:
        return PreLLMDispatcher(
            self.info, self.rules, self.given, self.trace, self._reads_shift_labels, self.watch, self.shrunk
        )

    def _check(self) -> None:
        check_signatures(self.info)
        check_grouping(self.info, self.rules.grouping)

    def _attach(self, names: list[tuple[str, ...]]) -> None:
        super()._attach(names)
        for part in (self.watch, self.shrunk):
            self._handles += part.attach() if part else []


class PreLLMDispatcher(Dispatcher):
    """Opens the forwards of one attachment; arguments as of `Dispatcher`.

    Args:
        watch: tells what each patch receives in the vision tower, if that ranks.
        shrunk: the smaller picture, if that is the method.
    """

    def __init__(
        self,
        info: ModelInfo,
        rules: Rules,
        given: GivenMasks,
        trace: Trace,
        reads_shift_labels: bool,
        watch: ClsAttentionRecorder | None,
        shrunk: DownsampledEncoder | None,
    ) -> None:
        super().__init__(info, rules, given, trace, reads_shift_labels)
        self.watch, self.shrunk = watch, shrunk

    def open(self, call: Kwargs, shape: tuple[int, int]) -> Forward | None:
        cache = cache_of(call)
        past = past_length(cache)
        if cache is not None and cache.is_compileable:
            raise UnsupportedModelError(
                f"a {type(cache).__name__} is not supported where tokens are dropped before the decoder; use a "
                "DynamicCache"
            )
        if not past:
            forget(cache)
        memory = _Memory.of(cache, past, shape[0], self.rules.positions)
        if memory is not None:
            memory.called = True
        generation = self._generation()
        step = generation is not None and generation.continues(call)
        own = generation if step or (generation is not None and not generation.started) else None
        plan, trace = self._plan(call, shape, past, generation)
        if isinstance(plan, GeneralPlan) and plan.drops_any:
            self._check_prompt(plan)
            self.ignore_labels(call, plan)
            plan = plan.to(tokens_of(call).device)
            return _Prompt(self, plan, cache, self.labels_to_shorten(call), trace, own)
        return None if memory is None else _Step(memory, past, shape[1], self.rules.positions == "compact")

    def _check_prompt(self, plan: GeneralPlan) -> None:
        if plan.past:
            raise ValueError(
                "a further image on top of a cache is not supported where tokens are dropped before the decoder; give "
                "the whole conversation without a cache"
            )
        if plan.packing is not None:
            raise ValueError(
                "packed rows (several documents in one, whose position_ids start again) are not supported where tokens "
                "are dropped before the decoder; give each document a row of its own, or use a staged method"
            )


class _Prompt(Forward):
    """A forward that drops."""

    def __init__(
        self,
        dispatcher: PreLLMDispatcher,
        plan: GeneralPlan,
        cache: Any,
        labels: Tensor | None,
        trace: Trace | None,
        generation: Generation | None,
    ) -> None:
        self.generation = generation  # of which this is the prompt or a step, if any
        self.dispatcher, self.plan, self.cache, self.trace = dispatcher, plan, cache, trace
        self._kept: Selection | None = None
        self.unreached = number_run()
        self._labels = labels
        if labels is not None:
            self.shift_labels = labels.new_full((len(labels), plan.drops[-1].length), -100)

    def before_text(self, kwargs: Kwargs) -> Kwargs:
        """The text model's `kwargs` with the rows that stay alone, chosen on the device of its embeddings."""
        self.unreached = None
        hidden = kwargs.get("inputs_embeds")
        mask, ids = kwargs.get("attention_mask"), kwargs.get("position_ids")
        flat = mask is None or (isinstance(mask, Tensor) and mask.dim() == 2)
        if hidden is None or not flat or (ids is not None and ids.dim() != 2):
            raise UnsupportedModelError(
                f"{type(self.dispatcher.info.text).__name__} cannot drop before its first layer: it is not called "
                "with embeddings, a two-dimensional mask and positions of one axis"
            )
        self.plan = self.plan.to(hidden.device)
        kept = self._kept = self._choose(hidden)
        ids = torch.arange(hidden.shape[1], device=hidden.device)[None] if ids is None else ids
        ids = take_rows(ids.expand(len(kept.rows), -1), kept.rows)
        left = _alive(kept)
        if self.dispatcher.rules.positions == "compact":
            ids = (left.long().cumsum(1) - 1).clamp(min=0)
        others = {name: take_rows(kwargs[name], kept.rows) for name in per_token(kwargs, hidden.shape[1])}
        # Never without a mask: Transformers would take gaps between positions for the bounds of packed sequences.
        return {**kwargs, **others, "attention_mask": left.long(), "position_ids": ids}

    @torch.no_grad()
    def _choose(self, hidden: Tensor) -> Selection:
        """The rows that stay; the trace is told."""
        scores = self._scores(hidden)
        every = active_rows(self.plan, None)
        kept = select_rows(self.plan, 0, every, scores)
        if self.trace is not None:
            rows, _, visual = active_rows(self.plan, kept)
            ranked = Ranked(every[0], every[2], scores)
            self.trace.record(0, self.plan.drops[0].keep, rows, visual, 0, ranked)
        return kept

    def _scores(self, hidden: Tensor) -> Tensor:
        """(B, L)."""
        plan, shrunk, watch = self.plan, self.dispatcher.shrunk, self.dispatcher.watch
        if shrunk is not None:
            return self._by_patch(shrunk.firsts().float().to(hidden.device)[None])
        return self.dispatcher.rules.scorer(
            ScorerInputs(
                layer=0,
                visual=plan.visual,
                token_index=plan.token_index,
                groups=plan.groups,
                num_keep=plan.num_keeps[0],
                hidden=hidden,
                attention=_nobody_asks,
                keys=_nobody_asks,
                vision=self._by_patch(self._vision(watch)) if watch else None,
            )
        )

    def _vision(self, watch: ClsAttentionRecorder) -> Tensor | None:
        """What the vision tower told of this prompt's pictures; of a generation's at its start, for the tower may have
        looked at others since."""
        if self.generation is None:
            return watch.received
        if self.generation.vision is None:
            self.generation.vision = watch.received
        return self.generation.vision

    def _by_patch(self, values: Tensor | None) -> Tensor:
        """(B, L) of values by picture and patch (pictures, patches), or of one row for all pictures."""
        visual = self.plan.visual
        total = int(visual.sum())
        if values is None or total % values.shape[1] or len(values) not in (1, total // values.shape[1]):
            raise UnsupportedModelError(
                f"the {total} visual tokens of this call are not the patches that its vision tower has seen (beams and "
                "images given as embeddings cannot be told apart here); leave beams out"
            )
        flat = values.expand(total // values.shape[1], -1).flatten().to(visual.device).float()
        return torch.zeros(visual.shape, device=visual.device).masked_scatter(visual, flat)

    def after_text(self, output: Any) -> Any:
        """Put rows back to the columns where the caller expects them; rows of dropped tokens are zero."""
        kept, labels, length = self._kept, self._labels, self.plan.length
        cache = self.cache or cache_made(output)
        if kept is not None and cache is not None:
            layers = self.dispatcher.info.caching
            check_lengths(cache, kept.rows.shape[1], dict.fromkeys(layers, 1), None)
            remember(cache, _Memory(length, kept, self.dispatcher.rules.positions))
            let_crop_follow(cache, dict.fromkeys(layers, length - kept.rows.shape[1]))
        if kept is None or output[0].shape[1] != kept.rows.shape[1]:
            return output

        def full(states: Tensor, dim: int = 1) -> Tensor:
            return scatter_rows(states, kept.rows, kept.valid, length, dim)

        def hidden(index: int, states: Tensor | None) -> Tensor | None:
            return None if states is None else full(states)

        def attention(index: int, weights: Tensor | None) -> Tensor | None:
            return None if weights is None else full(full(weights, 2), 3)

        def last(states: Tensor) -> Tensor:
            if self.shift_labels is None or labels is None:
                return full(states)
            self.shift_labels.copy_(take_next_labels(labels, kept.rows, kept.valid))
            return states

        return give_back(output, last, hidden, attention)


class _Step(Forward):
    """A forward on top of a cache from which tokens were left out."""

    def __init__(self, memory: _Memory, past: int, new: int, renumbered: bool) -> None:
        self.memory, self.past, self.new, self.renumbered = memory, past, new, renumbered

    def before_text(self, kwargs: Kwargs) -> Kwargs:
        """The text model's `kwargs` with a mask of the slots that are there, and positions behind the whole prompt."""
        memory, hidden, mask = self.memory, kwargs["inputs_embeds"], kwargs.get("attention_mask")
        rows, alive = memory.kept.rows, _alive(memory.kept)
        answered = self.past - rows.shape[1]  # tokens between the prompt and this call
        later = alive.new_ones(len(alive), answered + self.new)
        if mask is not None:
            mask = mask.to(rows.device)
            alive = alive & mask[:, : memory.length].gather(1, rows).bool()
            later = mask[:, memory.length :].bool()
        ids = kwargs.get("position_ids")
        if ids is None:
            ids = torch.arange(self.new, device=hidden.device)[None] + memory.length + answered
        if self.renumbered:
            kept = alive.long().sum(1, keepdim=True)
            ids = (kept + later.long().cumsum(1) - 1)[:, -self.new :]
        return {**kwargs, "attention_mask": torch.cat([alive, later], 1).long(), "position_ids": ids}


def _alive(kept: Selection) -> Tensor:
    """(B, n) False at padding."""
    return torch.ones_like(kept.rows, dtype=torch.bool) if kept.valid is None else kept.valid


def _nobody_asks(**options: bool) -> Tensor:
    raise UnsupportedModelError(
        "before the decoder there is no layer that could rank: score must be one that needs no attention of it"
    )


class Tower:
    """The tower of one model.

    Attributes:
        module: the tower.
        side: patches on a side of the square that it sees.
        class_token: whether a token stands before the patches.

    Raises:
        UnsupportedModelError: where visual tokens are not its patches, one for one.
    """

    def __init__(self, info: ModelInfo) -> None:
        config = info.config
        named = info.wrappers[0].named_modules()
        module = next((part for name, part in named if name.endswith("vision_tower")), None)
        if not info.family.fixed_patches or module is None or config.vision_feature_select_strategy != "default":
            fixed = [name for name, family in FAMILIES.items() if family.fixed_patches]
            raise UnsupportedModelError(
                f"{config.model_type!r}: which patch of the vision tower a visual token is, is known for "
                f"{', '.join(fixed)} with vision_feature_select_strategy='default' alone"
            )
        self.module: nn.Module = module
        vision = config.vision_config
        self.side = int(vision.image_size // vision.patch_size)
        self.class_token = vision.model_type == "clip_vision_model"
        stacks = [getattr(part, "layers", None) for part in module.modules()]
        self.layers = next(stack for stack in stacks if isinstance(stack, nn.ModuleList))
        feature = config.vision_feature_layer
        feature = feature[-1] if isinstance(feature, list | tuple) else feature
        # Hidden state number k is what layer k - 1 gives.
        self.layer = int(feature) % (len(self.layers) + 1) - 1


class ClsAttentionRecorder:
    """Keeps what the patches of a call's pictures received in the tower, in the layer whose output is taken.

    It is kept with the thread (or task) that calls, for others may call the same model at the same time.
    """

    def __init__(self, tower: Tower) -> None:
        self._tower = tower

    @property
    def received(self) -> Tensor | None:
        """(pictures, patches) of the last pictures that this thread has shown to the tower, or None."""
        return _received.get().get(ref(self))

    def attach(self) -> list[RemovableHandle]:
        """Put the hooks on."""
        layer = self._tower.layers[self._tower.layer]
        return [layer.register_forward_pre_hook(self._look, with_kwargs=True)]

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    @torch.no_grad()
    def _look(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        first = int(self._tower.class_token)
        count = 1 if first else hidden.shape[1]
        asking = torch.arange(count, device=hidden.device).expand(len(hidden), -1)
        seen = extract(layer, hidden, asking, lambda rows: {"attention_mask": None})
        visible = seen.keys.new_ones(1, 1, 1, hidden.shape[1], dtype=torch.bool)
        weights = seen.keys.new_ones(len(hidden), count)
        received = attention_by_head(seen.queries, seen.keys, visible, weights, seen.scale).mean(1)[:, first:]
        others = {watch: table for watch, table in _received.get().items() if watch() is not None}
        _received.set({**others, ref(self): received})


# By watch, for a patched assistant model may look at the same pictures before the main model goes on.
_received: ContextVar[Mapping[ref[ClsAttentionRecorder], Tensor]] = ContextVar("pyramiddrop_received", default={})  # noqa: B039


class DownsampledEncoder:
    """Lets the tower see each picture smaller: `side` patches on a side; each of its patches stands for as many of the
    full grid as it covers, so that the model finds as many visual tokens as it expects.

    Attributes:
        side: patches on a side of the small picture.
    """

    def __init__(self, tower: Tower, side: int) -> None:
        self._tower, self.side = tower, side

    def attach(self) -> list[RemovableHandle]:
        """Put the hooks on."""
        module = self._tower.module
        return [
            module.register_forward_pre_hook(self._shrink, with_kwargs=True),
            module.register_forward_hook(self._spread),
        ]

    @property
    def share(self) -> float:
        """Of the full grid's patches; a little more, so that products with whole numbers of them have that floor."""
        return (self.side**2 + 1e-3) / self._tower.side**2

    def firsts(self) -> Tensor:
        """(side of the full grid squared,) bool: the first patch of the full grid in each patch of the small one."""
        number = torch.arange(self._tower.side) * self.side // self._tower.side
        first = torch.cat([torch.ones(1, dtype=torch.bool), number[1:] != number[:-1]])
        return (first[:, None] & first).flatten()

    def _shrink(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        pixels = args[0] if args else kwargs["pixel_values"]
        size = pixels.shape[-1] * self.side // self._tower.side
        small = interpolate(pixels.float(), (size, size), mode="bicubic", antialias=True, align_corners=False)
        others = {name: value for name, value in kwargs.items() if name != "pixel_values"}
        return (small.to(pixels.dtype),), {**others, "interpolate_pos_encoding": True}

    def _spread(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        output.last_hidden_state = self._spread_one(output.last_hidden_state)
        if getattr(output, "hidden_states", None) is not None:
            output.hidden_states = tuple(
                None if state is None else self._spread_one(state) for state in output.hidden_states
            )
        return output

    def _spread_one(self, state: Tensor) -> Tensor:
        """(n, rows, D) of the small grid as that of the full one, a class token before it as it is."""
        side, first = self._tower.side, int(self._tower.class_token)
        number = torch.arange(side, device=state.device) * self.side // side
        rows = (number[:, None] * self.side + number).flatten() + first
        return torch.cat([state[:, :first], state[:, rows]], 1)


def small_side(side: int, keep: float) -> int:
    """The side of the largest square grid that has no more than the share `keep` of `side` squared patches."""
    return max(1, math.isqrt(math.floor(side * side * keep)))
