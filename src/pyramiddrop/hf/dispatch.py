"""Decide whether a forward is a prefill that drops, a decode step on a pruned cache or neither, and plan it."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import pad

from pyramiddrop.hf.cache_state import CacheState, check_lengths, detach_state, past_length
from pyramiddrop.hf.compatibility import calling_trainer
from pyramiddrop.hf.forward import DecodeStep, Forward
from pyramiddrop.hf.generation import Generation, generations
from pyramiddrop.hf.layer_inputs import Kwargs, LayerInputs
from pyramiddrop.hf.model_info import ModelInfo, UnsupportedModelError, check_further_image, check_static_cache
from pyramiddrop.hf.plan import GeneralPlan, Plan, Rules, make_plan, plan_last_token
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


@dataclass(eq=False)
class Dispatcher:
    """Opens the forwards of one attachment.

    Attributes:
        trace: the attachment's trace, which shows the last prefill.
        reads_shift_labels: True if the loss reads `shift_labels`, so that `logits="auto"` may shorten logits.
        tower: gives the vision tower's scores for a drop before the decoder that needs them: (pictures, patches) of
            the last pictures encoded in this thread, None if there are none, or (1, patches) for all pictures.
    """

    info: ModelInfo
    rules: Rules
    given: GivenMasks
    trace: Trace
    reads_shift_labels: bool
    tower: Callable[[], Tensor | None] | None
    _said: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        # The first layer with keys of its own in each stage, whose cache length is checked in each call.
        first = {self.rules.schedule.stage_of(index): index for index in reversed(self.info.caching)}
        self._first_layers = {index: stage for stage, index in first.items()}

    def open(self, call: Kwargs, shape: Shape) -> Forward | None:
        """Open the state of this forward; None if the method has nothing to do in it.

        Labels that cannot be scored are removed from `call`, the arguments of the outermost forward with tokens.
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
        generation = generations.get().get(id(self))
        # An outermost prompt is traced; planning starts its generation.
        traced = generation is None or not (generation.started or generation.nested)
        vision = self._vision(call, generation)
        plan = self._plan(call, shape, past, generation)
        trace = self._begin_trace(plan) if plan is not None and traced else None
        if cache_state is None and (plan is None or not plan.drops_any):
            return None
        longest = self.info.longest
        if longest is not None and past + shape[1] > longest:
            raise UnsupportedModelError(
                f"{type(self.info.text).__name__} scales the queries of sequences of more than {longest} tokens by row "
                f"numbers, which dropping changes; this one has {past + shape[1]}. Use shorter prompts, or no method"
            )
        mask, shift = call.get("attention_mask"), {} if cache_state is None else cache_state.shift
        padding = mask if isinstance(mask, Tensor) and mask.shape == (shape[0], past + shape[1]) else None
        if plan is not None and plan.drops_any:
            plan = self._prepared(plan, call, past)
            inputs = LayerInputs(self.info, self.rules, past, shape[1], dict(shift), padding, plan)
            return Prefill(inputs, cache_state, self._labels_to_shorten(call), trace, vision)
        assert cache_state is not None
        shown = mask is None or (generation is not None and generation.continues(call) and not generation.padded)
        if shown and DecodeStep.is_plain(self.info, shape[1], cache_state):
            return None
        return DecodeStep(LayerInputs(self.info, self.rules, past, shape[1], shift, padding), cache_state)

    def _prepared(self, plan: Plan, call: Kwargs, past: int) -> Plan:
        """Check the plan of a prefill that drops, move it to the call's device, and take out labels that it ignores."""
        if past:
            check_further_image(self.info, self.rules.schedule.layers[0])
        check_static_cache(self.info, next(drop.layer for drop in plan.drops if drop.happens), cache_of(call))
        tokens: Tensor = call["input_ids"] if call.get("inputs_embeds") is None else call["inputs_embeds"]
        plan = plan.to(tokens.device)
        if plan.ignored is not None:  # labels whose predicting rows are dropped would be scored on zero vectors
            ignored = plan.ignored.to(call["labels"].device)
            columns = labelled_columns(call, (plan.batch, plan.length))
            if columns is not None:
                ignored = pad(ignored[:, columns.to(ignored.device)], (1, 0))
            call["labels"] = call["labels"].masked_fill(ignored, IGNORED_LABEL)
        return plan

    def _vision(self, call: Kwargs, generation: Generation | None) -> VisionScores | None:
        """The vision tower's scores for a drop before the decoder; called before the forward is planned.

        A generation's prompt uses the scores from its start, because the tower may have encoded other pictures since.
        """
        tower = self.tower
        if tower is None:
            return None
        own = generation if generation is not None and (not generation.started or generation.continues(call)) else None

        def scores(plan: GeneralPlan) -> Tensor:
            if own is not None and own.vision is None:
                own.vision = tower()
            received, visual = tower() if own is None else own.vision, plan.visual
            total = int(visual.sum())
            if received is None or total % received.shape[1] or len(received) not in (1, total // received.shape[1]):
                raise UnsupportedModelError(
                    f"the {total} visual tokens of this call are not the patches that its vision tower has seen (beams "
                    "and images given as embeddings cannot be told apart here); leave beams out"
                )
            flat = received.expand(total // received.shape[1], -1).flatten().to(visual.device).float()
            return torch.zeros(visual.shape, device=visual.device).masked_scatter(visual, flat)

        return scores

    def _labels_to_shorten(self, call: Kwargs) -> Tensor | None:
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

    # ---- planning --------------------------------------------------------------------------------------------------

    def _plan(self, call: Kwargs, shape: Shape, past: int, generation: Generation | None) -> Plan | None:
        """The plan of this forward; None if it is no prefill."""
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
        info, given, candidates, frames, beams = self.info, self.given, 0, None, 1
        if generation is not None and own:
            candidates, beams = generation.candidates(past, shape[1]), generation.beams(shape[0])
            frames = generation.frames
        elif generation is not None and call.get("input_ids") is not None:
            # The user's masks belong to the generation's own prompt, and are used for another one only if nothing else
            # tells where the visual tokens are. Ids beside a prompt of embeddings are text.
            if info.visual_ids:
                given = GivenMasks()
            elif generation.embedded:
                given = GivenMasks(torch.zeros(shape, dtype=torch.bool))
        prompt = read_prompt(call, shape, info, given, past, candidates, may_be_packed=not own)
        training = generation is None and info.text.training
        masks = partial(read_prompt_masks, prompt, info, training, self.rules.grouping, frames, beams)
        if generation is not None and own:
            generation.prompt = masks
            generation.padded = past > 0 or prompt.valid is not None  # cached columns may be padding
        return prompt, masks

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
            _ranking_cost=sum(self.rules.ranking_flops(sizes, drop) for drop in plan.drop_counts) if sizes else 0,
        )
        if not plan.drops_any:
            for drop in plan.drops:
                trace.record(drop.layer, drop.keep, *plan.visual_rows, plan.past)
            self.trace.show(trace)
        return trace
