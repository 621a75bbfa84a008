"""Hooks on a model and off again: how a method takes part in the model's forward and `generate`."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from contextvars import ContextVar
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from pyramiddrop.hf.anatomy import Anatomy, UnsupportedModelError
from pyramiddrop.hf.cache_layer import forget
from pyramiddrop.hf.following import Kwargs
from pyramiddrop.hf.generation import Generation
from pyramiddrop.hf.groups import video_frames
from pyramiddrop.hf.limits import (
    check_attention,
    check_compact_positions,
    check_further_image,
    check_grouping,
    check_layers,
)
from pyramiddrop.hf.memory import CacheMemory, cache_of, check_lengths, past_length
from pyramiddrop.hf.plan import Plan, Request, make_plan
from pyramiddrop.hf.projections import Projector
from pyramiddrop.hf.request import GivenMasks, call_shape, extend_request, read_request
from pyramiddrop.hf.run import Rules, Run
from pyramiddrop.trace import Trace

_RUN = "pyramiddrop_run"
_MARK = "_pyramiddrop_attachment"


# By attachment, for a patched assistant model may generate inside the generation of a patched main model.
_generations: ContextVar[Mapping[int, Generation]] = ContextVar("pyramiddrop_generations", default={})  # noqa: B039


class Attachment:
    """A method on a model. Hooks alone: no module, parameter or class is replaced, and the state dict stays as it is.

    Args:
        parts: of the model.
        rules: the method's settings.
        given: masks of the user's.

    Raises:
        RuntimeError: where the model has a method already.
        UnsupportedModelError: where the model cannot work with these rules.
    """

    def __init__(self, parts: Anatomy, rules: Rules, given: GivenMasks) -> None:
        if attachment_of(parts.text) is not None:
            raise RuntimeError(
                "a pyramiddrop method is applied to this model already; leave its `with` block or call remove(model)"
            )
        self.anatomy, self.rules, self.given = parts, rules, given
        self._check()
        self.trace, self._projector = Trace(), Projector()
        self._handles: list[RemovableHandle] = []
        # Of each stage the first layer with keys of its own: looked at in each call, whether its cache is as it was.
        first = {rules.schedule.stage_of(index): index for index in reversed(parts.caching)}
        self._first_layers = {index: stage for stage, index in first.items()}
        self._attach()

    def _check(self) -> None:
        """Raise UnsupportedModelError where this model does not allow the rules."""
        parts, rules = self.anatomy, self.rules
        if rules.positions == "compact":
            check_compact_positions(parts)
        if rules.scorer.watches:
            raise UnsupportedModelError(
                "what a patch receives in the vision tower ranks before the decoder alone; use VisionDrop"
            )
        check_layers(parts, rules.schedule.layers, rules.rank_layer, rules.scorer)
        check_attention(parts, rules.schedule.layers[0])
        check_grouping(parts, rules.grouping)

    def _attach(self) -> None:
        text, generator = self.anatomy.text, self.anatomy.generator
        for module in (*self.anatomy.wrappers, text):
            names, takes_any = _parameters(module)
            if takes_any:
                hook = partial(self._before_model, names)
                self._handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
        self._handles.append(text.register_forward_pre_hook(self._before_text, with_kwargs=True))
        self._handles.append(text.register_forward_hook(self._after_text, with_kwargs=True))
        for index, layer in enumerate(self.anatomy.layers):
            hook = partial(self._before_layer, self.rules.schedule.stage_of(index), index, _parameters(layer)[0])
            self._handles.append(layer.register_forward_pre_hook(hook, with_kwargs=True))
        setattr(text, _MARK, self)
        if generator is not None:
            generator.__dict__["generate"] = Generate(self, generator)
            generator.__dict__["init_continuous_batching"] = _refuse_continuous_batching

    def detach(self) -> None:
        """Take all hooks off; the model is as it was."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        delattr(self.anatomy.text, _MARK)
        if self.anatomy.generator is not None:
            del self.anatomy.generator.generate, self.anatomy.generator.init_continuous_batching

    # ---- hooks -----------------------------------------------------------------------------------------------------

    def _before_model(
        self, names: tuple[str, ...], module: nn.Module, args: tuple[Any, ...], kwargs: Kwargs
    ) -> tuple[tuple[()], Kwargs] | None:
        """On each module from the model down to the text model: the outermost that sees tokens opens the run."""
        if _RUN in kwargs or len(args) > len(names):
            return None
        call = {**dict(zip(names, args, strict=False)), **kwargs}
        if call_shape(call) is None:
            return None
        run = self._open(call)
        if run is not None and run.shift_labels is not None:
            call["shift_labels"] = run.shift_labels
        return (), {**call, _RUN: run}

    def _before_text(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: Kwargs
    ) -> tuple[tuple[Any, ...], Kwargs] | None:
        run: Run | None = kwargs.get(_RUN)
        return None if run is None else (args, run.arrive(kwargs))

    def _before_layer(
        self, stage: int, index: int, names: tuple[str, ...], layer: nn.Module, args: tuple[Any, ...], kwargs: Kwargs
    ) -> tuple[tuple[Any, ...], Kwargs] | None:
        if _RUN not in kwargs:
            return None
        run: Run | None = kwargs.pop(_RUN)
        if run is None:
            return args, kwargs
        if len(args) == 1:
            hidden, call = run.enter(stage, index, layer, args[0], kwargs)
            return (hidden,), call
        # What came by position goes on so: reentrant gradient checkpointing leads gradients to such arguments alone.
        placed, named = names[1 : len(args)], {**kwargs, **dict(zip(names, args, strict=False))}
        hidden, call = run.enter(stage, index, layer, named.pop(names[0]), named)
        return (hidden, *(call[name] for name in placed)), {k: v for k, v in call.items() if k not in placed}

    def _after_text(self, module: nn.Module, args: tuple[Any, ...], kwargs: Kwargs, output: Any) -> Any:
        run = kwargs.get(_RUN)
        return output if run is None else run.leave(output)

    # ---- opening a run ---------------------------------------------------------------------------------------------

    def _open(self, call: Kwargs) -> Run | None:
        """The run of this forward: a prefill that drops, a step that follows an earlier one, or None."""
        cache, (_, length) = cache_of(call), call_shape(call) or (0, 0)
        follows = length == 1 and cache is not None and cache.is_compileable
        if torch.compiler.is_compiling() and follows:
            memory = CacheMemory.of(cache)
            return None if memory is None else Run(self.anatomy, self.rules, 0, 1, memory=memory)
        opened: Run | None = self._open_eagerly(call, cache)
        return opened

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _open_eagerly(self, call: Kwargs, cache: Any) -> Run | None:
        past = past_length(cache)
        if past == 0:
            forget(cache)
        memory = CacheMemory.of(cache)
        if memory is not None:
            memory.check(self.rules.schedule.layers, self.rules.positions, (call_shape(call) or (0, 0))[0])
            memory.called = True
        if past:
            check_lengths(cache, past, self._first_layers, memory)
        if memory is not None:
            memory.crop(past)
        generation = self._generation()
        first = generation is None or generation.is_first
        plan = self._plan(call, past, generation, generation is not None and generation.continues(call))
        if plan is not None and first:
            self._begin_trace(plan)
        if memory is None and (plan is None or not plan.drops):
            return None
        self._check_length(past + (call_shape(call) or (0, 0))[1])
        tokens: Tensor = call["inputs_embeds"] if call.get("inputs_embeds") is not None else call["input_ids"]
        if past and plan is not None and plan.drops:
            check_further_image(self.anatomy, self.rules.schedule.layers[0])
        dropping = plan.to(tokens.device) if plan is not None and plan.drops else None
        labels = call.get("labels") if self.rules.logits == "kept" else None
        trace = self.trace if first else None
        mask = call.get("attention_mask")
        padding = mask if isinstance(mask, Tensor) and mask.shape == (len(tokens), past + tokens.shape[1]) else None
        length = tokens.shape[1]
        return Run(self.anatomy, self.rules, past, length, dropping, memory, labels, trace, padding, self._projector)

    def _generation(self) -> Generation | None:
        """The call of `generate` that this forward is part of."""
        return _generations.get().get(id(self))

    def _check_length(self, columns: int) -> None:
        longest = self.anatomy.longest
        if longest is not None and columns > longest:
            raise ValueError(
                f"{type(self.anatomy.text).__name__} scales the queries of sequences of more than {longest} tokens by "
                f"row numbers, which dropping changes; this one has {columns}. Use shorter prompts, or no method"
            )

    def _plan(self, call: Kwargs, past: int, generation: Generation | None, step: bool) -> Plan | None:
        """The plan of this forward where it is a prefill, else None; `step`: where it is one of the `generation`."""
        shape = call_shape(call)
        assert shape is not None
        if generation is not None and step:
            # A step of `generate`. With a cache it follows what the prompt left, and image ids that it made itself are
            # never dropped; without one the prompt is ranked again, by its own last token.
            if generation.prompt is None or cache_of(call) is not None:
                return None
            return make_plan(extend_request(generation.prompt, call), self.rules.schedule)
        own = generation is not None and not generation.started
        if generation is not None and own:
            generation.start(call, shape[0])
        if shape[1] == 1 and past:
            return None
        request = self._request(call, past, shape, generation, own)
        if past and not request.visual.any():
            return None  # text alone on top of a cache
        return make_plan(request, self.rules.schedule)

    def _request(
        self, call: Kwargs, past: int, shape: tuple[int, int], generation: Generation | None, own: bool
    ) -> Request:
        """The request of a prompt: the `generation`'s `own`, or another one that is asked outside or inside of it."""
        anatomy, grouping = self.anatomy, self.rules.grouping
        if generation is None:
            return read_request(call, anatomy, self.given, past, anatomy.text.training, 0, grouping)
        if not own:
            return read_request(call, anatomy, self._given_inside(generation, call, shape), past, False, 0, grouping)
        guesses, beams = generation.guesses(past, shape[1]), generation.beams(shape[0])
        request = read_request(call, anatomy, self.given, past, False, guesses, grouping, generation.frames, beams)
        generation.prompt = request
        return request

    def _given_inside(self, generation: Generation, call: Kwargs, shape: tuple[int, int]) -> GivenMasks:
        """The user's masks for another prompt inside `generate`: they are of the generation's, unless only a mask can
        tell where this one's visual tokens are. Ids beside a prompt of embeddings are text."""
        if call.get("input_ids") is None:
            return self.given
        if self.anatomy.visual_ids:
            return GivenMasks()
        return GivenMasks(torch.zeros(shape, dtype=torch.bool)) if generation.embedded else self.given

    def _begin_trace(self, plan: Plan) -> None:
        schedule, layers = self.rules.schedule, len(self.anatomy.layers)
        lengths = [plan.length, *(stage.length for stage in plan.stages)]
        columns = [row.nonzero()[:, 0] + plan.past for row in plan.visual.cpu()]
        per_layer = [lengths[schedule.stage_of(layer)] for layer in range(layers)]
        sizes = self.anatomy.sizes
        choosing = sum(self.rules.choosing(sizes, choice) for choice in plan.choices) if sizes is not None else 0
        self.trace.begin(columns, plan.length, per_layer, choosing, sizes)
        if not plan.drops:
            rows = torch.arange(plan.length).expand_as(plan.visual)
            for stage in plan.stages:
                self.trace.record(stage.layer, stage.keep, rows, plan.visual, plan.past)


class Generate:
    """Stands in for a patched model's `generate`, so that the forwards know to which generation they belong."""

    def __init__(self, attachment: Attachment, generator: Any) -> None:
        self.attachment, self.generator = attachment, generator
        self.__wrapped__ = MethodType(type(generator).generate, generator)  # what it looks like to `inspect`

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        config = kwargs.get("generation_config") or self.generator.generation_config
        if kwargs.get("prefill_chunk_size") or getattr(config, "prefill_chunk_size", None):
            raise ValueError(
                "prefill_chunk_size is not supported with a pyramiddrop method: tokens are ranked by the last token "
                "of the whole prompt. Leave it unset"
            )
        frames = video_frames(kwargs, self.attachment.anatomy.merged_frames)
        outer, mask, key = _generations.get(), kwargs.get("attention_mask"), id(self.attachment)
        generation = Generation(_tokens(args, kwargs), None if mask is None else mask.shape[1], frames, key in outer)
        token = _generations.set({**outer, key: generation})
        try:
            return type(self.generator).generate(self.generator, *args, **kwargs)
        finally:
            _generations.reset(token)


def _refuse_continuous_batching(*args: Any, **kwargs: Any) -> None:
    """Stands in for what `generate_batch` and a server start with."""
    raise ValueError(
        "continuous batching (generate_batch, init_continuous_batching) is not supported with a pyramiddrop method: "
        "its paged cache holds every token in every layer. Use generate with a batch, or serve with vLLM (pyramiddrop "
        "serve), or take the method off with remove(model)"
    )


def _tokens(args: tuple[Any, ...], kwargs: Kwargs) -> Tensor | None:
    """The ids or embeddings that `generate` was given."""
    given = [*args[:1], *(kwargs.get(name) for name in ("inputs", "input_ids", "inputs_embeds"))]
    return next((value for value in given if isinstance(value, Tensor)), None)


def _parameters(module: nn.Module) -> tuple[tuple[str, ...], bool]:
    """Names of the positional parameters of a module's forward, and whether it takes any further keyword."""
    parameters = inspect.signature(module.forward).parameters.values()
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    names = tuple(parameter.name for parameter in parameters if parameter.kind in positional)
    return names, any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters)


def attachment_of(model: nn.Module) -> Attachment | None:
    """The attachment of a model, found from any module around its text model; None where there is none."""
    return next((found for module in model.modules() if (found := module.__dict__.get(_MARK)) is not None), None)
