"""Attach a method to a model through hooks, and detach it."""

from __future__ import annotations

import inspect
import threading
import warnings
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from pyramiddrop.hf.cache_state import CacheState
from pyramiddrop.hf.compatibility import TrainerCheck, check_cache, check_reached, check_signatures
from pyramiddrop.hf.dispatch import Dispatcher
from pyramiddrop.hf.forward import DecodeStep, Forward
from pyramiddrop.hf.generation import WAIT, Generate, refuse_continuous_batching
from pyramiddrop.hf.layer_inputs import Kwargs, LayerInputs
from pyramiddrop.hf.model_info import (
    ModelInfo,
    UnsupportedModelError,
    check_attention,
    check_compact_positions,
    check_grouping,
    check_layers,
)
from pyramiddrop.hf.plan import Rules
from pyramiddrop.hf.prompt_masks import GivenMasks, call_shape
from pyramiddrop.hf.versions import cache_names, cache_of, given_twice, with_one_cache
from pyramiddrop.trace import Trace

_FORWARD = "pyramiddrop_forward"
_MARK = "_pyramiddrop_attachment"

# By attachment: labels of running calls, innermost last, of modules whose forward does not pass state on.
_labels: ContextVar[Mapping[int, tuple[Tensor | None, ...]]] = ContextVar("pyramiddrop_labels", default={})  # noqa: B039


class Attachment:
    """A method attached to a model through hooks; no module, parameter, class or state dict changes.

    Attributes:
        method: the user's method; it is only stored here.
        tower: gives the vision tower's scores for a drop before the decoder that needs them; see `Dispatcher`.
    """

    tower: Callable[[], Tensor | None] | None = None

    def __init__(self, info: ModelInfo, rules: Rules, given: GivenMasks) -> None:
        if attachment_of(info.text) is not None:
            raise RuntimeError(
                "a pyramiddrop method is applied to this model already; leave its `with` block or call remove(model)"
            )
        self.info, self.rules = info, rules
        self.method: Any = None
        self._check()
        self.trace = Trace()
        self._handles: list[RemovableHandle] = []
        # The running calls of `generate` in all threads, with the owner's id, because a deep copy runs none of them.
        self.generating: set[tuple[int, int]] = set()
        signatures = [_parameters(module) for module in (*info.wrappers, info.text)]
        # The keyword that carries the state does not pass through a forward that names all of its arguments.
        self._closed = max((number for number, (_, takes_any) in enumerate(signatures) if not takes_any), default=-1)
        # Transformers' `loss_function` receives `shift_labels`.
        code = getattr(inspect.unwrap(getattr(info.generator, "forward", _parameters)), "__code__", None)
        reads_shift_labels = self._closed < 0 and code is not None and "loss_function" in code.co_names
        self.dispatcher = Dispatcher(info, rules, given, self.trace, reads_shift_labels, self.tower)
        self._attach([names for names, _ in signatures])

    def _check(self) -> None:
        """Raise UnsupportedModelError if the model does not allow the rules."""
        info, rules = self.info, self.rules
        check_signatures(info)
        if rules.positions == "compact":
            check_compact_positions(info)
        check_grouping(info, rules.grouping)
        layers = rules.schedule.layers
        if rules.scorer.needs_vision_attention and layers[0]:
            raise UnsupportedModelError(
                "what a patch receives in the vision tower ranks before the decoder alone; use VisionDrop"
            )
        check_layers(info, tuple(layer for layer in layers if layer), rules.rank_layer, rules.scorer)
        check_attention(info, layers[0])

    def _attach(self, names: list[tuple[str, ...]]) -> None:
        text, generator = self.info.text, self.info.generator
        modules = (*self.info.wrappers, text)
        caches: tuple[str, ...] = ()
        for number, module in reversed(list(enumerate(modules))):
            caches = cache_names(module.forward) or caches  # a module passes on the arguments that it does not name
            if number > self._closed:
                before = partial(self._before_model, names[number], caches)
                self._handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
                self._handles.append(module.register_forward_hook(self._after_model, with_kwargs=True))
            else:
                note = partial(self._note_labels, names[number])
                self._handles.append(module.register_forward_pre_hook(note, with_kwargs=True))
                self._handles.append(module.register_forward_hook(self._forget_labels, always_call=True))
        self._handles.append(text.register_forward_pre_hook(self._before_text, with_kwargs=True))
        self._handles.append(text.register_forward_hook(self._after_text, with_kwargs=True))
        stage_of, hooks = self.rules.schedule.stage_of, list[tuple[nn.Module, Hook]]()
        for index, layer in enumerate(self.info.layers):
            hooks.append((layer, partial(self._before_layer, stage_of(index), index, _parameters(layer)[0])))
        self._layer_hooks = LayerHooks(hooks)
        check = TrainerCheck(self.rules, attachment_of)
        self._handles.append(text.register_forward_pre_hook(check, with_kwargs=True))
        setattr(text, _MARK, self)
        if generator is not None:
            generator.__dict__["generate"] = Generate(self, generator)
            generator.__dict__["init_continuous_batching"] = refuse_continuous_batching

    def detach(self) -> None:
        """Remove all hooks, which restores the model."""
        if any(owner == id(self) for owner, _ in self.generating):
            warnings.warn(
                "the pyramiddrop method was taken off while another thread still generates with it; what that thread "
                f"writes from now on is wrong. {WAIT}",
                stacklevel=3,
            )
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._layer_hooks.remove()
        delattr(self.info.text, _MARK)
        if self.info.generator is not None:
            del self.info.generator.generate, self.info.generator.init_continuous_batching

    @property
    def attached(self) -> bool:
        """True while the hooks are on the model."""
        return bool(self._handles)

    # ---- hooks -----------------------------------------------------------------------------------------------------

    def _note_labels(self, names: tuple[str, ...], module: nn.Module, args: tuple[Any, ...], kwargs: Kwargs) -> None:
        """Remember the labels during a call, on modules around a forward that does not pass our state on."""
        labels = {**dict(zip(names, args, strict=False)), **kwargs}.get("labels")
        noted = _labels.get()
        _labels.set({**noted, id(self): (*noted.get(id(self), ()), labels)})

    def _forget_labels(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        noted = _labels.get()
        _labels.set({**noted, id(self): noted.get(id(self), ())[:-1]})

    def _open_below(self, call: Kwargs, shape: tuple[int, int]) -> Forward | None:
        """Open the state of a call inside another one that computes the loss, with the labels of the latter."""
        labels = next(reversed(_labels.get().get(id(self), ())), None)
        if labels is None or call.get("labels") is not None:
            return self._open(call, shape)
        # The innermost module whose forward names all of its arguments.
        taker = type((*self.info.wrappers, self.info.text)[self._closed]).__name__
        known = {**call, "labels": labels}
        state = self._open(known, shape)
        if state is not None and state.shift_labels is not None:
            raise ValueError(
                f'logits="kept" is not supported for {taker}, whose forward names all of its arguments: the loss '
                'needs the labels of the remaining rows. Let forward take **kwargs, or use logits="full"'
            )
        if known["labels"] is not labels:
            raise ValueError(
                f"{taker} would score labels of visual tokens or of padding on rows that are dropped; its forward "
                "names all of its arguments, so that they cannot be taken out. Set these labels to -100, or let "
                "forward take **kwargs"
            )
        return state

    def _open(self, call: Kwargs, shape: tuple[int, int]) -> Forward | None:
        """Open the state of this forward; None if the method has nothing to do in it."""
        cache = cache_of(call)
        follows = shape[1] == 1 and cache is not None and cache.is_compileable
        if torch.compiler.is_compiling() and follows:
            cache_state = CacheState.of(cache)
            if cache_state is None:
                return None
            return DecodeStep(LayerInputs(self.info, self.rules, 0, 1, cache_state.shift, None), cache_state)
        opened: Forward | None = self._open_eagerly(call, shape, cache)
        return opened

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _open_eagerly(self, call: Kwargs, shape: tuple[int, int], cache: Any) -> Forward | None:
        state = self.dispatcher.open(call, shape)
        self._layer_hooks.update(state, forever=cache is not None and cache.is_compileable)
        return state

    def _before_model(
        self, names: tuple[str, ...], caches: tuple[str, ...], module: nn.Module, args: tuple[Any, ...], kwargs: Kwargs
    ) -> tuple[tuple[()], Kwargs] | None:
        """Hook of each module from the model down to the text model; the outermost one with tokens opens the state."""
        if torch.compiler.is_exporting() or torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
            raise RuntimeError(
                "a model with a pyramiddrop method on it cannot be exported (torch.export, torch.jit.trace, ONNX): "
                "what is dropped depends on the input. Export it without the method"
            )
        if _FORWARD in kwargs or len(args) > len(names) or (args and given_twice(names[: len(args)], kwargs, caches)):
            return None
        call = {**dict(zip(names, args, strict=False)), **kwargs}
        shape = call_shape(call)
        if shape is None:
            return None
        known = with_one_cache(call, caches)
        state = self._open_below(known, shape) if self._closed >= 0 else self._open(known, shape)
        if state is not None and state.unreached is not None:
            check_cache(module, call)
        if call.get("labels") is not None:
            call["labels"] = known["labels"]  # without labels whose predicting rows are dropped
        if state is not None and state.shift_labels is not None:
            call["shift_labels"] = state.shift_labels
        return (), {**call, _FORWARD: state}

    def _after_model(self, module: nn.Module, args: tuple[Any, ...], kwargs: Kwargs, output: Any) -> None:
        state: Forward | None = kwargs.get(_FORWARD)
        if state is not None and state.unreached is not None:
            check_reached(module, self.info.text, state.unreached)

    def _before_text(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: Kwargs
    ) -> tuple[tuple[Any, ...], Kwargs] | None:
        state: Forward | None = kwargs.get(_FORWARD)
        if state is not None:
            return args, state.before_text(kwargs)
        # Layers do not receive the state, because their hooks may be off and their kernels would receive the keyword.
        return (args, {k: v for k, v in kwargs.items() if k != _FORWARD}) if _FORWARD in kwargs else None

    def _before_layer(
        self, stage: int, index: int, names: tuple[str, ...], layer: nn.Module, args: tuple[Any, ...], kwargs: Kwargs
    ) -> tuple[tuple[Any, ...], Kwargs] | None:
        state: Forward | None = kwargs.pop(_FORWARD, None)
        if state is None:
            return None
        if len(args) == 1:
            hidden, call = state.before_layer(stage, index, layer, args[0], kwargs)
            return (hidden,), call
        # Positional arguments stay positional: reentrant checkpointing sends gradients to no others.
        placed, named = names[1 : len(args)], {**kwargs, **dict(zip(names, args, strict=False))}
        hidden, call = state.before_layer(stage, index, layer, named.pop(names[0]), named)
        return (hidden, *(call[name] for name in placed)), {k: v for k, v in call.items() if k not in placed}

    def _after_text(self, module: nn.Module, args: tuple[Any, ...], kwargs: Kwargs, output: Any) -> Any:
        state: Forward | None = kwargs.get(_FORWARD)
        if state is None:
            return output
        if state.trace is not None:
            self._show(state.trace)
        return state.after_text(output)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _show(self, trace: Trace) -> None:
        self.trace.show(trace)


Hook = Callable[..., Any]

# The forwards that need the hooks, by the id of each; it ends with its call, or with its gradients.
_running: WeakKeyDictionary[Forward, int] = WeakKeyDictionary()
_changing = threading.Lock()


class LayerHooks:
    """The forward pre-hooks on decoder layers, which are installed only while a running forward needs them.

    Even a hook that does nothing makes PyTorch call a layer on its slow path; in a decode step, that would be the whole
    overhead of a method.
    """

    def __init__(self, hooks: list[tuple[nn.Module, Hook]]) -> None:
        self._hooks = hooks
        self._handles: list[RemovableHandle] = []
        self._pinned = False
        self._register()

    def update(self, forward: Forward | None, forever: bool) -> None:
        """Install the hooks while `forward` runs; None: remove them if no other forward needs them.

        They stay `forever` with a static cache: such a model may be compiled, and a compiled graph does not notice
        later hooks. They also stay beside foreign hooks, whose order would change.
        """
        if forward is None and not forever and (self._pinned or not self._handles):
            return
        with _changing:
            self._pinned = self._pinned or forever
            if forward is not None:
                _running[forward] = id(self)
            alone = all(len(layer._forward_pre_hooks) == 1 for layer, _ in self._hooks)
            if forward is not None or self._pinned:
                self._register()
            elif alone and id(self) not in _running.values():
                self._unregister()

    def _register(self) -> None:
        self._handles = self._handles or [
            layer.register_forward_pre_hook(hook, with_kwargs=True) for layer, hook in self._hooks
        ]

    def _unregister(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def remove(self) -> None:
        """Remove the hooks permanently."""
        with _changing:
            self._unregister()
            self._hooks = []


def _parameters(module: nn.Module) -> tuple[tuple[str, ...], bool]:
    """The names of the positional parameters of a module's forward, and whether it has `**kwargs`."""
    parameters = inspect.signature(module.forward).parameters.values()
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    names = tuple(parameter.name for parameter in parameters if parameter.kind in positional)
    return names, any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters)


def attachment_of(model: nn.Module) -> Attachment | None:
    """The attachment of a model, found from any module around its text model; None if there is none."""
    return next((found for module in model.modules() if (found := module.__dict__.get(_MARK)) is not None), None)
