"""Decide what a forward is, a prefill that drops, a decode step on a pruned cache or neither, and plan it."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad

from pyramiddrop.hf.cache_state import CacheState, check_lengths, detach_state, past_length
from pyramiddrop.hf.compatibility import calling_trainer
from pyramiddrop.hf.forward import DecodeStep, Forward, Rules
from pyramiddrop.hf.generation import Generation, generations
from pyramiddrop.hf.layer_inputs import Kwargs
from pyramiddrop.hf.model_info import ModelInfo, UnsupportedModelError, check_further_image, check_static_cache
from pyramiddrop.hf.plan import GeneralPlan, Plan, make_plan, plan_last_token
from pyramiddrop.hf.prefill import Prefill
from pyramiddrop.hf.prompt_masks import (
    IGNORED_LABEL,
    GivenMasks,
    Prompt,
    PromptMasks,
    call_shape,
    extend_prompt_masks,
    labelled_columns,
    read_prompt,
    read_prompt_masks,
    remark,
)
from pyramiddrop.hf.ranking import VisionScores
from pyramiddrop.hf.versions import cache_of
from pyramiddrop.trace import Trace

Shape = tuple[int, int]


class TowerScores(Protocol):
    """What the vision tower tells of the patches of a call's pictures."""

    @property
    def received(self) -> Tensor | None:
        """(pictures, patches) of the last pictures that this thread has shown to the tower, or (1, patches) of any
        picture; None if it has shown none."""
        ...


class Dispatcher:
    """Opens the forwards of one attachment.

    Args:
        info: of the model.
        rules: of the method.
        given: masks of the user's.
        trace: the attachment's, which shows the last prefill.
        reads_shift_labels: whether the loss is known to be taken by `shift_labels`, so that `logits="auto"` may shorten
            logits.
        tower: what the vision tower tells to a drop before the decoder, or None.
    """

    def __init__(
        self,
        info: ModelInfo,
        rules: Rules,
        given: GivenMasks,
        trace: Trace,
        reads_shift_labels: bool,
        tower: TowerScores | None = None,
    ) -> None:
        self.info, self.rules, self.given, self.trace = info, rules, given, trace
        self.reads_shift_labels, self.tower = reads_shift_labels, tower
        self._said: set[str] = set()
        # Of each stage the first layer with keys of its own: looked at in each call, whether its cache is as it was.
        first = {rules.schedule.stage_of(index): index for index in reversed(info.caching)}
        self._first_layers = {index: stage for stage, index in first.items()}

    def open(self, call: Kwargs, shape: Shape) -> Forward | None:
        """The state of this forward; None if the method has nothing to do in it.

        Args:
            call: arguments of the outermost forward that sees tokens; labels that are not scored are taken out of it.
            shape: (B, L) of its tokens.
        """
        cache = cache_of(call)
        past = past_length(cache)
        if past == 0:
            detach_state(cache)
        cache_state = CacheState.of(cache)
        if cache_state is not None:
            cache_state.check(self.rules.schedule.layers, self.rules.positions, shape[0])
            cache_state.called = True
        if past:
            check_lengths(cache, past, self._first_layers, cache_state)
        if cache_state is not None:
            cache_state.crop(past)
        generation = self._generation()
        vision = self._vision(call, generation)
        plan, trace = self._plan(call, shape, past, generation)
        if plan is not None and plan.drops_any:
            return self._prefill(call, past, plan, cache_state, trace, vision)
        if cache_state is None:
            return None
        self._check_length(past + shape[1])
        mask = call.get("attention_mask")
        shown = mask is None or (generation is not None and generation.continues(call) and not generation.padded)
        if shown and DecodeStep.is_plain(self.info, shape[1], cache_state):
            return None
        return DecodeStep(self.info, self.rules, past, shape[1], cache_state, _padding(mask, shape, past))

    def _prefill(
        self,
        call: Kwargs,
        past: int,
        plan: Plan,
        cache_state: CacheState | None,
        trace: Trace | None,
        vision: VisionScores | None,
    ) -> Prefill:
        self._check_length(past + plan.length)
        if past:
            check_further_image(self.info, self.rules.schedule.layers[0])
        check_static_cache(self.info, next(drop.layer for drop in plan.drops if drop.happens), cache_of(call))
        plan = plan.to(tokens_of(call).device)
        self.ignore_labels(call, plan)
        padding = _padding(call.get("attention_mask"), (plan.batch, plan.length), past)
        labels = self.labels_to_shorten(call)
        return Prefill(self.info, self.rules, past, plan, cache_state, labels, trace, padding, vision)

    def _vision(self, call: Kwargs, generation: Generation | None) -> VisionScores | None:
        """What tells a drop before the decoder of the vision tower; called before the forward is planned.

        A generation's prompt is told what the tower saw at its start, for it may have looked at other pictures since.
        """
        tower = self.tower
        if tower is None:
            return None
        own = generation is not None and (not generation.started or generation.continues(call))

        def scores(plan: GeneralPlan) -> Tensor:
            if generation is None or not own:
                return scores_by_patch(plan.visual, tower.received)
            if generation.vision is None:
                generation.vision = tower.received
            return scores_by_patch(plan.visual, generation.vision)

        return scores

    def _generation(self) -> Generation | None:
        """The call of `generate` that this forward is part of."""
        return generations.get().get(id(self))

    def ignore_labels(self, call: Kwargs, plan: Plan) -> None:
        """Take the labels out of `call` that nothing is left to predict: they would be scored on zero vectors."""
        if plan.ignored is None:
            return
        ignored, columns = plan.ignored.to(call["labels"].device), labelled_columns(call, (plan.batch, plan.length))
        if columns is not None:
            ignored = pad(ignored[:, columns.to(ignored.device)], (1, 0))
        call["labels"] = call["labels"].masked_fill(ignored, IGNORED_LABEL)

    def labels_to_shorten(self, call: Kwargs) -> Tensor | None:
        """The labels, if the loss is taken on the remaining rows alone, and logits are computed for no others.

        Labels of some columns alone (`logits_to_keep`) are not: their caller wants the logits of just these columns.
        """
        labels: Tensor | None = call.get("labels")
        if labels is not None and labels.shape != call_shape(call):
            return None
        if self.rules.logits == "auto":
            # Whoever evaluates reads logits beside the labels; whoever trains reads the loss, but for preferences.
            trains = labels is not None and self.info.text.training and torch.is_grad_enabled()
            return labels if trains and self.reads_shift_labels and calling_trainer() is None else None
        return labels if self.rules.logits == "kept" else None

    def _check_length(self, columns: int) -> None:
        longest = self.info.longest
        if longest is not None and columns > longest:
            raise UnsupportedModelError(
                f"{type(self.info.text).__name__} scales the queries of sequences of more than {longest} tokens by "
                f"row numbers, which dropping changes; this one has {columns}. Use shorter prompts, or no method"
            )

    # ---- planning --------------------------------------------------------------------------------------------------

    def _plan(
        self, call: Kwargs, shape: Shape, past: int, generation: Generation | None
    ) -> tuple[Plan | None, Trace | None]:
        """The plan of this forward if it is a prefill, and its trace if it is one that is shown."""
        first = generation is None or generation.is_first
        plan = self._plan_of(call, shape, past, generation)
        return plan, self._begin_trace(plan) if plan is not None and first else None

    def _plan_of(self, call: Kwargs, shape: Shape, past: int, generation: Generation | None) -> Plan | None:
        if generation is not None and generation.continues(call):
            # A step of `generate`. With a cache it follows what the prompt left, and image ids that it made itself are
            # never dropped; without one the prompt is ranked again, by its own last token.
            if generation.prompt is None or cache_of(call) is not None:
                return None
            return make_plan(extend_prompt_masks(generation.prompt(), call, shape), self.rules.schedule)
        own = generation is not None and not generation.started
        if generation is not None and own:
            generation.start(call, shape[0])
        if shape[1] == 1 and past:
            return None
        prompt, work_out_masks = self._read(call, shape, past, generation, own)
        if past and not prompt.visual.any():
            return None  # text alone on top of a cache
        usual = self._usual_plan(prompt, generation)
        if usual is not None:
            return usual
        masks = work_out_masks()
        plan = make_plan(masks, self.rules.schedule)
        if generation is None:
            self._warn(masks, plan)
        return plan

    def _usual_plan(self, prompt: Prompt, generation: Generation | None) -> Plan | None:
        """The plan if the last token of each prompt asks, and the layers that rank see all of it."""
        training = generation is None and self.info.text.training
        mask = prompt.call.get("attention_mask")
        if training or not self.rules.are_usual or not (mask is None or (isinstance(mask, Tensor) and mask.dim() == 2)):
            return None
        scopes = [self.info.scopes[layer] for layer in self.rules.ranking_layers]
        if any(scope.windowed and scope.size < prompt.shape[1] for scope in scopes):
            return None
        return plan_last_token(prompt, self.rules.schedule)

    def _read(
        self, call: Kwargs, shape: Shape, past: int, generation: Generation | None, own: bool
    ) -> tuple[Prompt, Callable[[], PromptMasks]]:
        """A prompt, and what works out its masks: the `generation`'s `own`, or another one outside or inside of it."""
        info, grouping = self.info, self.rules.grouping
        if generation is None:
            prompt = read_prompt(call, shape, info, self.given, past)
            return prompt, partial(read_prompt_masks, prompt, info, info.text.training, grouping)
        if not own:
            prompt = read_prompt(call, shape, info, self._given_inside(generation, call, shape), past)
            return prompt, partial(read_prompt_masks, prompt, info, False, grouping)
        candidates, beams = generation.candidates(past, shape[1]), generation.beams(shape[0])
        prompt = read_prompt(call, shape, info, self.given, past, candidates, may_be_packed=False)
        generation.prompt = partial(read_prompt_masks, prompt, info, False, grouping, generation.frames, beams)
        generation.padded = past > 0 or prompt.valid is not None  # what a cache holds may be padded
        return prompt, generation.prompt

    def _given_inside(self, generation: Generation, call: Kwargs, shape: Shape) -> GivenMasks:
        """The user's masks for another prompt inside `generate`: they are of the generation's, unless only a mask can
        tell where this one's visual tokens are. Ids beside a prompt of embeddings are text."""
        if call.get("input_ids") is None:
            return self.given
        if self.info.visual_ids:
            return GivenMasks()
        return GivenMasks(torch.zeros(shape, dtype=torch.bool)) if generation.embedded else self.given

    def _warn(self, masks: PromptMasks, plan: Plan) -> None:
        """Say once what a training or evaluation loop may not have meant."""
        idle = all(stage.keep == 1 for stage in self.rules.schedule.stages)
        loop = masks.labels is not None or self.info.text.training
        if idle or not loop or not plan.visual_tokens:
            return
        text = remark(masks, plan.drops_any, self.given.query is not None)
        if text is not None and text not in self._said:
            self._said.add(text)
            warnings.warn(f"pyramiddrop {text}. (Said once for this model.)", stacklevel=2)

    def _begin_trace(self, plan: Plan) -> Trace:
        """The trace of one prefill; shown once it is whole, which it is already if nothing is dropped."""
        schedule, layers, sizes = self.rules.schedule, len(self.info.layers), self.info.sizes
        lengths = [plan.length, *(drop.length for drop in plan.drops)]
        trace = Trace(
            visual_columns=[columns + plan.past if plan.past else columns for columns in plan.visual_columns],
            length=plan.length,
            lengths=[lengths[schedule.stage_of(layer)] for layer in range(layers)],
            _shape=sizes,
            _ranking_cost=sum(self.rules.ranking_flops(sizes, drop) for drop in plan.drop_counts)
            if sizes is not None
            else 0,
        )
        if not plan.drops_any:
            for drop in plan.drops:
                trace.record(drop.layer, drop.keep, *plan.visual_rows, plan.past)
            self.trace.show(trace)
        return trace


def tokens_of(call: Kwargs) -> Tensor:
    """The ids or embeddings of a call."""
    tokens: Tensor = call["input_ids"] if call.get("inputs_embeds") is None else call["inputs_embeds"]
    return tokens


def scores_by_patch(visual: Tensor, received: Tensor | None) -> Tensor:
    """(B, L) float for the `visual` tokens (B, L), of values (pictures, patches), or (1, patches) of all pictures.

    Raises:
        UnsupportedModelError: where the visual tokens are not those patches.
    """
    total = int(visual.sum())
    if received is None or total % received.shape[1] or len(received) not in (1, total // received.shape[1]):
        raise UnsupportedModelError(
            f"the {total} visual tokens of this call are not the patches that its vision tower has seen (beams and "
            "images given as embeddings cannot be told apart here); leave beams out"
        )
    flat = received.expand(total // received.shape[1], -1).flatten().to(visual.device).float()
    return torch.zeros(visual.shape, device=visual.device).masked_scatter(visual, flat)


def _padding(mask: object, shape: Shape, past: int) -> Tensor | None:
    """The call's own (B, past + L) attention mask, if it has one of two dimensions."""
    return mask if isinstance(mask, Tensor) and mask.shape == (shape[0], past + shape[1]) else None
