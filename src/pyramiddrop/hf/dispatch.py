"""Decide whether a forward is a prefill that drops, a decode step on a pruned cache or neither, and plan it."""

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
    """Scores that the vision tower gives to the patches of a call's pictures."""

    @property
    def received(self) -> Tensor | None:
        """(pictures, patches) scores of the last pictures encoded in this thread, or (1, patches) for all pictures.

        None if this thread has encoded none.
        """
        ...


class Dispatcher:
    """Opens the forwards of one attachment.

    Args:
        info: the parts of the model.
        rules: the rules of the method.
        given: the user's masks.
        trace: the attachment's trace, which shows the last prefill.
        reads_shift_labels: True if the loss reads `shift_labels`, so that `logits="auto"` may shorten logits.
        tower: the vision tower's scores for a drop before the decoder; None if it does not need them.
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
        # The first layer with keys of its own in each stage, whose cache length is checked in each call.
        first = {rules.schedule.stage_of(index): index for index in reversed(info.caching)}
        self._first_layers = {index: stage for stage, index in first.items()}

    def open(self, call: Kwargs, shape: Shape) -> Forward | None:
        """Open the state of this forward; None if the method has nothing to do in it.

        Args:
            call: arguments of the outermost forward with tokens; labels that cannot be scored are removed from it.
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
        """The vision tower's scores for a drop before the decoder; called before the forward is planned.

        A generation's prompt uses the scores from its start, because the tower may have encoded other pictures since.
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
        """The call of `generate` to which this forward belongs."""
        return generations.get().get(id(self))

    def ignore_labels(self, call: Kwargs, plan: Plan) -> None:
        """Remove labels from `call` whose predicting rows are dropped: they would be scored on zero vectors."""
        if plan.ignored is None:
            return
        ignored, columns = plan.ignored.to(call["labels"].device), labelled_columns(call, (plan.batch, plan.length))
        if columns is not None:
            ignored = pad(ignored[:, columns.to(ignored.device)], (1, 0))
        call["labels"] = call["labels"].masked_fill(ignored, IGNORED_LABEL)

    def labels_to_shorten(self, call: Kwargs) -> Tensor | None:
        """The labels, if loss and logits are to be computed for the remaining rows alone, else None.

        Labels of selected columns (`logits_to_keep`) are excluded: their caller wants the logits of these columns.
        """
        labels: Tensor | None = call.get("labels")
        if labels is not None and labels.shape != call_shape(call):
            return None
        if self.rules.logits == "auto":
            # Evaluation loops read logits beside the labels; trainers read the loss alone, except for preferences.
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
        """The plan of this forward if it is a prefill, and its trace if it is one to be shown."""
        first = generation is None or generation.is_first
        plan = self._plan_of(call, shape, past, generation)
        return plan, self._begin_trace(plan) if plan is not None and first else None

    def _plan_of(self, call: Kwargs, shape: Shape, past: int, generation: Generation | None) -> Plan | None:
        if generation is not None and generation.continues(call):
            # A step of `generate`. With a cache it continues the pruned prompt, and generated image ids are never
            # dropped; without a cache the prompt is ranked again, by its own last token.
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
            return None  # only text on top of a cache
        usual = self._usual_plan(prompt, generation)
        if usual is not None:
            return usual
        masks = work_out_masks()
        plan = make_plan(masks, self.rules.schedule)
        if generation is None:
            self._warn(masks, plan)
        return plan

    def _usual_plan(self, prompt: Prompt, generation: Generation | None) -> Plan | None:
        """The plan of a usual prefill: the last token of each prompt is the query, and ranking layers see all of it."""
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
        """A prompt and the function that computes its masks: the `generation`'s `own` prompt, or another one."""
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
        generation.padded = past > 0 or prompt.valid is not None  # cached columns may be padding
        return prompt, generation.prompt

    def _given_inside(self, generation: Generation, call: Kwargs, shape: Shape) -> GivenMasks:
        """The user's masks for another prompt inside `generate`.

        They belong to the generation's own prompt, and are used here only if nothing else tells where the visual tokens
        are. Ids beside a prompt of embeddings are text.
        """
        if call.get("input_ids") is None:
            return self.given
        if self.info.visual_ids:
            return GivenMasks()
        return GivenMasks(torch.zeros(shape, dtype=torch.bool)) if generation.embedded else self.given

    def _warn(self, masks: PromptMasks, plan: Plan) -> None:
        """Warn once about what a training or evaluation loop probably did not intend."""
        idle = all(stage.keep == 1 for stage in self.rules.schedule.stages)
        loop = masks.labels is not None or self.info.text.training
        if idle or not loop or not plan.visual_tokens:
            return
        text = remark(masks, plan.drops_any, self.given.query is not None)
        if text is not None and text not in self._said:
            self._said.add(text)
            warnings.warn(f"pyramiddrop {text}. (Said once for this model.)", stacklevel=2)

    def _begin_trace(self, plan: Plan) -> Trace:
        """Begin the trace of a prefill; it is shown when complete, which is at once if nothing is dropped."""
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
    """The ids or embeddings of a call, whichever it has."""
    tokens: Tensor = call["input_ids"] if call.get("inputs_embeds") is None else call["inputs_embeds"]
    return tokens


def scores_by_patch(visual: Tensor, received: Tensor | None) -> Tensor:
    """(B, L) float: the values (pictures, patches), or (1, patches) for all pictures, at the `visual` tokens (B, L).

    Raises:
        UnsupportedModelError: if the visual tokens are not these patches.
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
    """The call's own (B, past + L) attention mask, if it has a two-dimensional one."""
    return mask if isinstance(mask, Tensor) and mask.shape == (shape[0], past + shape[1]) else None
