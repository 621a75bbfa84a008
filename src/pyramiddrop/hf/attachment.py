"""Attach a method to a model by hooks, and take it off again."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from pyramiddrop.hf.cache_state import CacheState, check_lengths, forget, past_length
from pyramiddrop.hf.compatibility import TrainerCheck, check_cache, check_reached, check_signatures
from pyramiddrop.hf.generation import Generation
from pyramiddrop.hf.images import video_frames
from pyramiddrop.hf.layer_inputs import Kwargs
from pyramiddrop.hf.model_info import (
    ModelInfo,
    UnsupportedModelError,
    check_attention,
    check_compact_positions,
    check_further_image,
    check_grouping,
    check_layers,
    check_static_cache,
)
from pyramiddrop.hf.plan import (
    IGNORED_LABEL,
    GivenMasks,
    Plan,
    Request,
    call_shape,
    extend_request,
    make_plan,
    read_request,
    remark,
)
from pyramiddrop.hf.query_key import QueryKeyExtractor
from pyramiddrop.hf.run import Rules, Run
from pyramiddrop.hf.versions import cache_names, cache_of, given_twice, with_one_cache
from pyramiddrop.trace import Trace

_RUN = "pyramiddrop_run"
_MARK = "_pyramiddrop_attachment"
_WAIT = "Let the thread end before the `with` block does, or give it method.view(model) or an applied method"


# By attachment: labels of the calls that are running, the innermost last, of forwards that hand no run on.
_labels: ContextVar[Mapping[int, tuple[Tensor | None, ...]]] = ContextVar("pyramiddrop_labels", default={})  # noqa: B039

# By attachment, for a patched assistant model may generate inside the generation of a patched main model.
_generations: ContextVar[Mapping[int, Generation]] = ContextVar("pyramiddrop_generations", default={})  # noqa: B039


class Attachment:
    """A method on a model. Hooks alone: no module, parameter or class is replaced, and the state dict stays as it is.

    Args:
        parts: of the model.
        rules: the method's settings.
        given: masks of the user's.

    Attributes:
        method: what the user applied; nothing here reads it.
        trace: the last prefill.

    Raises:
        RuntimeError: where the model has a method already.
        UnsupportedModelError: where the model cannot work with these rules.
    """

    def __init__(self, parts: ModelInfo, rules: Rules, given: GivenMasks) -> None:
        if attachment_of(parts.text) is not None:
            raise RuntimeError(
                "a pyramiddrop method is applied to this model already; leave its `with` block or call remove(model)"
            )
        self.anatomy, self.rules, self.given = parts, rules, given
        self.method: Any = None
        self._check()
        self.trace, self._projector = Trace(), QueryKeyExtractor()
        self._said: set[str] = set()
        self._handles: list[RemovableHandle] = []
        # The calls of `generate` that run now, in any thread; with its own id, for a deep copy runs none of them.
        self._generating: set[tuple[int, int]] = set()
        # Of each stage the first layer with keys of its own: looked at in each call, whether its cache is as it was.
        first = {rules.schedule.stage_of(index): index for index in reversed(parts.caching)}
        self._first_layers = {index: stage for stage, index in first.items()}
        self._attach()

    def _check(self) -> None:
        """Raise UnsupportedModelError where this model does not allow the rules."""
        parts, rules = self.anatomy, self.rules
        check_signatures(parts)
        if rules.positions == "compact":
            check_compact_positions(parts)
        if rules.scorer.needs_vision_attention:
            raise UnsupportedModelError(
                "what a patch receives in the vision tower ranks before the decoder alone; use VisionDrop"
            )
        check_layers(parts, rules.schedule.layers, rules.rank_layer, rules.scorer)
        check_attention(parts, rules.schedule.layers[0])
        check_grouping(parts, rules.grouping)

    def _attach(self) -> None:
        text, generator = self.anatomy.text, self.anatomy.generator
        modules = (*self.anatomy.wrappers, text)
        signatures = [_parameters(module) for module in modules]
        # What a run is carried in does not get through a forward that names all of its arguments.
        closed = max((number for number, (_, takes_any) in enumerate(signatures) if not takes_any), default=-1)
        self._closed = type(modules[closed]).__name__ if closed >= 0 else ""
        caches: tuple[str, ...] = ()
        for number, module in reversed(list(enumerate(modules))):
            names = signatures[number][0]
            caches = cache_names(module.forward) or caches  # what a module does not name it passes on
            if number > closed:
                before = partial(self._before_model, names, caches)
                self._handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
                self._handles.append(module.register_forward_hook(self._after_model, with_kwargs=True))
            else:
                note = partial(self._note_labels, names)
                self._handles.append(module.register_forward_pre_hook(note, with_kwargs=True))
                self._handles.append(module.register_forward_hook(self._forget_labels, always_call=True))
        self._handles.append(text.register_forward_pre_hook(self._before_text, with_kwargs=True))
        self._handles.append(text.register_forward_hook(self._after_text, with_kwargs=True))
        for index, layer in enumerate(self.anatomy.layers):
            hook = partial(self._before_layer, self.rules.schedule.stage_of(index), index, _parameters(layer)[0])
            self._handles.append(layer.register_forward_pre_hook(hook, with_kwargs=True))
        check = TrainerCheck(self.rules, _rules_of, cache_of)
        self._handles.append(text.register_forward_pre_hook(check, with_kwargs=True))
        setattr(text, _MARK, self)
        if generator is not None:
            generator.__dict__["generate"] = Generate(self, generator)
            generator.__dict__["init_continuous_batching"] = _refuse_continuous_batching

    def detach(self) -> None:
        """Take all hooks off; the model is as it was."""
        if any(owner == id(self) for owner, _ in self._generating):
            warnings.warn(
                "the pyramiddrop method was taken off while another thread still generates with it; what that thread "
                f"writes from now on is wrong. {_WAIT}",
                stacklevel=3,
            )
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        delattr(self.anatomy.text, _MARK)
        if self.anatomy.generator is not None:
            del self.anatomy.generator.generate, self.anatomy.generator.init_continuous_batching

    @property
    def attached(self) -> bool:
        """Whether the hooks are on the model."""
        return bool(self._handles)

    @contextmanager
    def generating(self, generation: Generation) -> Iterator[None]:
        """Let forwards in the block, and in this thread, belong to this call of `generate`."""
        token = _generations.set({**_generations.get(), id(self): generation})
        self._generating.add((id(self), id(generation)))
        try:
            yield
        finally:
            self._generating.discard((id(self), id(generation)))
            _generations.reset(token)

    # ---- hooks -----------------------------------------------------------------------------------------------------

    def _note_labels(self, names: tuple[str, ...], module: nn.Module, args: tuple[Any, ...], kwargs: Kwargs) -> None:
        """On modules around a forward that hands no run on: for the time of the call, what its labels are."""
        labels = {**dict(zip(names, args, strict=False)), **kwargs}.get("labels")
        noted = _labels.get()
        _labels.set({**noted, id(self): (*noted.get(id(self), ()), labels)})

    def _forget_labels(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        noted = _labels.get()
        _labels.set({**noted, id(self): noted.get(id(self), ())[:-1]})

    def _open_below(self, call: Kwargs) -> Run | None:
        """The run of a call inside one that takes the loss, by the labels of that one."""
        labels = next(reversed(_labels.get().get(id(self), ())), None)
        if labels is None or call.get("labels") is not None:
            return self._open(call)
        known = {**call, "labels": labels}
        run = self._open(known)
        if run is not None and run.shift_labels is not None:
            raise ValueError(
                f'logits="kept" is not supported for {self._closed}, whose forward names all of its arguments: the '
                'loss needs the labels of the rows that are left. Let forward take **kwargs, or use logits="full"'
            )
        if known["labels"] is not labels:
            raise ValueError(
                f"{self._closed} would score labels of visual tokens or of padding on rows that are dropped; its "
                "forward names all of its arguments, so that they cannot be taken out. Set these labels to -100, or "
                "let forward take **kwargs"
            )
        return run

    def _before_model(
        self,
        names: tuple[str, ...],
        caches: tuple[str, ...],
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: Kwargs,
    ) -> tuple[tuple[()], Kwargs] | None:
        """On each module from the model down to the text model: the outermost that sees tokens opens the run."""
        if torch.compiler.is_exporting() or torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
            raise RuntimeError(
                "a model with a pyramiddrop method on it cannot be exported (torch.export, torch.jit.trace, ONNX): "
                "what is dropped depends on the input. Export it without the method"
            )
        if _RUN in kwargs or len(args) > len(names) or (args and given_twice(names[: len(args)], kwargs, caches)):
            return None
        call = {**dict(zip(names, args, strict=False)), **kwargs}
        if call_shape(call) is None:
            return None
        known = with_one_cache(call, caches)
        run = self._open_below(known) if self._closed else self._open(known)
        if run is not None and run.unreached is not None:
            check_cache(module, call)
        if call.get("labels") is not None:
            call["labels"] = known["labels"]  # without those that nothing is left to predict
        if run is not None and run.shift_labels is not None:
            call["shift_labels"] = run.shift_labels
        return (), {**call, _RUN: run}

    def _after_model(self, module: nn.Module, args: tuple[Any, ...], kwargs: Kwargs, output: Any) -> None:
        run: Run | None = kwargs.get(_RUN)
        if run is not None and run.unreached is not None:
            check_reached(module, self.anatomy.text, run.unreached)

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
        run: Run | None = kwargs.get(_RUN)
        if run is None:
            return output
        if run.trace is not None:
            self._show(run.trace)
        return run.leave(output)

    # ---- opening a run ---------------------------------------------------------------------------------------------

    def _open(self, call: Kwargs) -> Run | None:
        """The run of this forward: a prefill that drops, a step that follows an earlier one, or None."""
        cache, (_, length) = cache_of(call), call_shape(call) or (0, 0)
        follows = length == 1 and cache is not None and cache.is_compileable
        if torch.compiler.is_compiling() and follows:
            memory = CacheState.of(cache)
            return None if memory is None else Run(self.anatomy, self.rules, 0, 1, memory=memory)
        opened: Run | None = self._open_eagerly(call, cache)
        return opened

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _open_eagerly(self, call: Kwargs, cache: Any) -> Run | None:
        past = past_length(cache)
        if past == 0:
            forget(cache)
        memory = CacheState.of(cache)
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
        trace = self._begin_trace(plan) if plan is not None and first else None
        if memory is None and (plan is None or not plan.drops):
            return None
        self._check_length(past + (call_shape(call) or (0, 0))[1])
        tokens: Tensor = call["inputs_embeds"] if call.get("inputs_embeds") is not None else call["input_ids"]
        if past and plan is not None and plan.drops:
            check_further_image(self.anatomy, self.rules.schedule.layers[0])
        dropping = plan.to(tokens.device) if plan is not None and plan.drops else None
        if dropping is not None:
            check_static_cache(self.anatomy, next(stage.layer for stage in dropping.stages if stage.drops), cache)
            self._ignore_labels(call, dropping)
        labels = call.get("labels") if self.rules.logits == "kept" else None
        mask = call.get("attention_mask")
        padding = mask if isinstance(mask, Tensor) and mask.shape == (len(tokens), past + tokens.shape[1]) else None
        length = tokens.shape[1]
        return Run(self.anatomy, self.rules, past, length, dropping, memory, labels, trace, padding, self._projector)

    def _generation(self) -> Generation | None:
        """The call of `generate` that this forward is part of."""
        return _generations.get().get(id(self))

    def _ignore_labels(self, call: Kwargs, plan: Plan) -> None:
        """Take the labels out of `call` that nothing is left to predict: they would be scored on zero vectors."""
        if plan.ignored is not None:
            call["labels"] = call["labels"].masked_fill(plan.ignored.to(call["labels"].device), IGNORED_LABEL)

    def _check_length(self, columns: int) -> None:
        longest = self.anatomy.longest
        if longest is not None and columns > longest:
            raise UnsupportedModelError(
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
        plan = make_plan(request, self.rules.schedule)
        if generation is None:
            self._warn(request, plan)
        return plan

    def _request(
        self, call: Kwargs, past: int, shape: tuple[int, int], generation: Generation | None, own: bool
    ) -> Request:
        """The request of a prompt: the `generation`'s `own`, or another one that is asked outside or inside of it."""
        anatomy, grouping = self.anatomy, self.rules.grouping
        if generation is None:
            training = anatomy.text.training
            return read_request(call, anatomy, self.given, past, training, 0, grouping, may_be_packed=True)
        if not own:
            given = self._given_inside(generation, call, shape)
            return read_request(call, anatomy, given, past, False, 0, grouping, may_be_packed=True)
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

    def _warn(self, request: Request, plan: Plan) -> None:
        """Say once what a training or evaluation loop may not have meant."""
        idle = all(stage.keep == 1 for stage in self.rules.schedule.stages)
        loop = request.labels is not None or self.anatomy.text.training
        if idle or not loop or not plan.visual.any():
            return
        text = remark(request, plan, self.given.query is not None)
        if text is not None and text not in self._said:
            self._said.add(text)
            warnings.warn(f"pyramiddrop {text}. (Said once for this model.)", stacklevel=2)

    def _begin_trace(self, plan: Plan) -> Trace:
        """The trace of one prefill; shown once it is whole, which it is already where nothing is dropped."""
        schedule, layers = self.rules.schedule, len(self.anatomy.layers)
        lengths = [plan.length, *(stage.length for stage in plan.stages)]
        sizes = self.anatomy.sizes
        trace = Trace(
            visual_columns=[row.nonzero()[:, 0] + plan.past for row in plan.visual.cpu()],
            length=plan.length,
            lengths=[lengths[schedule.stage_of(layer)] for layer in range(layers)],
            _shape=sizes,
            _choosing=sum(self.rules.choosing(sizes, choice) for choice in plan.choices) if sizes is not None else 0,
        )
        if not plan.drops:
            rows = torch.arange(plan.length).expand_as(plan.visual)
            for stage in plan.stages:
                trace.record(stage.layer, stage.keep, rows, plan.visual, plan.past)
            self.trace.show(trace)
        return trace

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _show(self, trace: Trace) -> None:
        self.trace.show(trace)


class Generate:
    """Stands in for a patched model's `generate`, so that the forwards know to which generation they belong."""

    def __init__(self, attachment: Attachment, generator: Any) -> None:
        self.attachment, self.generator = attachment, generator
        self.__wrapped__ = MethodType(type(generator).generate, generator)  # what it looks like to `inspect`

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        config = kwargs.get("generation_config") or self.generator.generation_config
        if kwargs.get("prefill_chunk_size") or getattr(config, "prefill_chunk_size", None):
            raise UnsupportedModelError(
                "prefill_chunk_size is not supported with a pyramiddrop method: tokens are ranked by the last token "
                "of the whole prompt. Leave it unset"
            )
        frames = video_frames(kwargs, self.attachment.anatomy.merged_frames)
        outer, mask, key = _generations.get(), kwargs.get("attention_mask"), id(self.attachment)
        generation = Generation(_tokens(args, kwargs), None if mask is None else mask.shape[1], frames, key in outer)
        if not self.attachment.attached:
            warnings.warn(
                "this `generate` was taken from a model while a pyramiddrop method was on it, and starts after the "
                f"method was taken off: nothing is dropped. {_WAIT}",
                stacklevel=2,
            )
        with self.attachment.generating(generation):
            return type(self.generator).generate(self.generator, *args, **kwargs)


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


def _rules_of(model: nn.Module) -> Rules | None:
    found = attachment_of(model)
    return None if found is None else found.rules
