"""Dropping methods as values, and how they are applied to a model and removed from it.

A method is a schedule, a scorer and a few settings. PyTorch and the Transformers adapter are imported when a method
meets a model, so that costing a method stays fast.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields
from inspect import cleandoc
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self, TypeVar, cast, get_args

from pyramiddrop.cost import DecoderShape, DropCounts, merging_flops
from pyramiddrop.saving import install_save_hook, remove_save_hook
from pyramiddrop.schedule import PreLLMSchedule, Schedule, Stage, equal_stage_layers, is_number, is_whole, powers
from pyramiddrop.scoring import (
    AttentionScorer,
    ComposedScorer,
    GridReserveScorer,
    RandomAfterScorer,
    RandomScorer,
    Scorer,
    UniformScorer,
    VisionScorer,
    scorer_of,
    scorer_settings,
)
from pyramiddrop.trace import Trace

if TYPE_CHECKING:
    from torch import Tensor, nn

    from pyramiddrop.hf import Attachment, GivenMasks, Rules
    from pyramiddrop.hf.model_info import ModelInfo

Model = TypeVar("Model", bound="nn.Module")

FILE_NAME = "pyramiddrop.json"
Positions = Literal["original", "compact"]
RankLayer = Literal["next", "last"]
Logits = Literal["auto", "full", "kept"]
BY_ATTENTION, BY_VISION = AttentionScorer(), VisionScorer()


@dataclass(frozen=True, kw_only=True)
class Method:
    """Base class of all methods. A new method is a subclass with a `schedule` and a `scorer`, and a line in METHODS.

    Attributes:
        positions: "original": kept tokens keep their position ids; "compact": they are renumbered 0..n-1 after each
            drop, as the official code does.
        rank_layer: the layer whose queries and keys rank the tokens. "next": the layer before which they are dropped,
            on the undropped rows; "last": the layer before that one.
        per_image: each image and each video of a sample has its own quota; False: all of them share one.
        per_frame: each image and each frame of a video has its own quota.
        merge: merge each dropped token into the most similar kept token of its group.
        logits: which logits a forward with labels returns. "full": all rows; "kept": head, logits and loss of the kept
            rows alone, which saves memory; "auto": "kept" in training (training mode, gradients, and Transformers' own
            loss), else "full".
        source: the paper of the method.

    Raises:
        ValueError: At construction, if a value is not allowed; the message names the argument.
    """

    source: ClassVar[str] = ""
    positions: Positions = "original"
    rank_layer: RankLayer = "next"
    per_image: bool = False
    per_frame: bool = False
    merge: bool = False
    logits: Logits = "auto"

    def __post_init__(self) -> None:
        _check_choice("positions", self.positions, get_args(Positions))
        _check_choice("rank_layer", self.rank_layer, get_args(RankLayer))
        _check_choice("logits", self.logits, get_args(Logits))
        for name in ("per_image", "per_frame", "merge"):
            _check_choice(name, getattr(self, name), (False, True))

    def schedule(self, num_layers: int, allowed: Sequence[int] | None = None) -> Schedule:
        """The drops for a model of `num_layers` decoder layers; ValueError if they do not fit.

        Args:
            allowed: the layers before which the model can drop, if not all are suitable (sliding windows, recurrent
                layers). Drops whose layers the user did not give move to the nearest of them.
        """
        raise NotImplementedError

    def scorer(self) -> Scorer:
        """The scorer that ranks the visual tokens."""
        raise NotImplementedError

    def ranking_flops(self, shape: DecoderShape, drop: DropCounts) -> int:
        """FLOPs of ranking (and merging) at one drop of one sample; 0 if the drop keeps no visual token."""
        if not drop.kept:
            return 0
        return self.scorer().flops(shape, drop) + (merging_flops(shape, drop) if self.merge else 0)

    def attach(self, info: ModelInfo, rules: Rules, given: GivenMasks) -> Attachment:
        """Install the method's hooks on a model."""
        from pyramiddrop.hf import Attachment

        return Attachment(info, rules, given)

    def __or__(self, inside: Method) -> Compose:
        """Compose this method, before the decoder, with `inside`: `VisionDrop(keep=0.5) | PyramidDrop()`."""
        return Compose(before=self, inside=inside) if isinstance(inside, Method) else NotImplemented

    def __call__(
        self, model: nn.Module, visual_mask: Tensor | None = None, query_mask: Tensor | None = None
    ) -> Applied:
        """Apply the method during a `with` block, which yields the Trace.

        Args:
            model: a Transformers vision-language model or a pipeline with one; with a visual mask also a text model.
            visual_mask: (B, L) bool, the visual tokens, if the model is called with `inputs_embeds`.
            query_mask: (B, L) bool, the tokens whose attention ranks; by default the prompt's last token, and with
                labels the token just before each answer span.

        Raises:
            ValueError: on entering, if the model family is not supported, the schedule does not fit its depth or a
                mask is not a (batch, length) bool tensor.
            RuntimeError: on entering, if the model already has a method.
        """
        from pyramiddrop.hf import GivenMasks

        return Applied(model, self, GivenMasks(visual_mask, query_mask))

    def save_pretrained(self, directory: str | Path) -> None:
        """Write `pyramiddrop.json` into `directory`, beside a checkpoint."""
        path = Path(directory)
        path.mkdir(parents=True, exist_ok=True)
        (path / FILE_NAME).write_text(json.dumps(self.settings(), indent=2) + "\n")

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> Self:
        """Read the method that `save_pretrained` wrote. `Method` accepts any method, a subclass only its own.

        Raises:
            FileNotFoundError: if there is no `pyramiddrop.json`.
            ValueError: if it holds another method or unknown settings.
        """
        path = Path(directory) / FILE_NAME
        try:
            settings = json.loads(path.read_text())
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} is no JSON: {error}") from error
        return cls.from_settings(settings, str(path))

    @classmethod
    def from_settings(cls, settings: Any, source: str) -> Self:
        """Build a method from the parsed `pyramiddrop.json`: its class name under "method", and its arguments.

        Args:
            settings: the parsed JSON.
            source: its origin, with which errors begin.

        Raises:
            ValueError: if it describes another method or has unknown settings.
        """
        if not isinstance(settings, dict):
            raise ValueError(f"{source} must hold a JSON object; got {settings!r}")
        settings = dict(settings)
        name = settings.pop("method", None)
        found = METHODS.get(name)
        if found is None or not issubclass(found, cls):
            expected = ", ".join(METHODS) if cls is Method else cls.__name__
            raise ValueError(f"{source} holds method {name!r}; expected {expected}")
        fixed = {key: settings.pop(key) for key in found._fixed() if key in settings}
        try:
            method = found(**settings)
        except TypeError as error:
            raise ValueError(f"{source}: {error}") from error
        wrong = {key: value for key, value in fixed.items() if getattr(method, key) != value}
        if wrong:
            raise ValueError(f"{source}: {name} does not take {wrong}")
        return method

    def view(self, model: Model) -> Model:
        """A second model object on the same weights with this method applied; `model` itself is unchanged.

        Views are independent: one set of weights serves many methods at once, from many threads. A view has this method
        alone, even if `model` has another one. No tensor is copied, so a change of the weights in place reaches all
        views. Move the model to its device first, because `.to` leaves the buffers of other views behind.

        Args:
            model: as for `apply`.

        Returns:
            A model of the same class. `trace_of` gives its trace, `remove` removes the method.

        Raises:
            ValueError: as for `apply`, and if a module's `forward` was replaced by a function (a compiled one, say).
        """
        from pyramiddrop.hf import attachment_of, shared_copy

        second: Model = shared_copy(_module_of(model))
        if attachment_of(second) is not None:
            remove(second)
        apply(second, self)
        return second

    def settings(self) -> dict[str, Any]:
        """The settings that `from_settings` reads, as plain JSON values."""
        values = {entry.name: _in_words(getattr(self, entry.name)) for entry in fields(self)}
        return {"method": type(self).__name__, **values}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.__repr__ = cls.__repr__  # type: ignore[method-assign] # or `dataclass` writes one that shows all arguments

    def __repr__(self) -> str:
        """A Python expression that builds the method, without arguments that have their default."""
        shown = {}
        for entry in fields(self):
            value = getattr(self, entry.name)
            if entry.init and value != entry.default:
                with suppress(ValueError):  # a scorer that is not registered is shown as it is
                    value = _in_words(value)
                shown[entry.name] = value
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in shown.items())})"

    @classmethod
    def _fixed(cls) -> list[str]:
        """The names of settings that the class itself fixes."""
        return [entry.name for entry in cls.__dataclass_fields__.values() if not entry.init]


@dataclass(frozen=True, kw_only=True)
class ScoredMethod(Method):
    """A method whose scorer can be chosen.

    Attributes:
        score: the scorer: a name in `pyramiddrop.scoring.SCORERS`, or a Scorer, which JSON holds as {"name": ...,
            **settings}. A name is replaced by its scorer.
        reserve: the share of the kept tokens, in [0, 1], that is evenly spaced over the picture regardless of score.
        random_from: select tokens at random for drops before this 0-based layer and deeper ones; None: never.
    """

    score: Scorer | str | Mapping[str, Any] = BY_ATTENTION
    reserve: float = 0.0
    random_from: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "score", scorer_of(self.score))
        reserve, layer = self.reserve, self.random_from
        if not is_number(reserve) or not 0 <= reserve <= 1:
            raise ValueError(f"reserve must be a number in [0, 1]; got {reserve!r}")
        if layer is not None and (not is_whole(layer) or layer < 1):
            raise ValueError(f"random_from must be a layer of at least 1, or None; got {layer!r}")

    def scorer(self) -> Scorer:
        assert isinstance(self.score, Scorer)
        scorer = self.score
        if self.random_from is not None:
            scorer = RandomAfterScorer(scorer, self.random_from)
        return GridReserveScorer(scorer, self.reserve) if self.reserve else scorer


@dataclass(frozen=True, kw_only=True)
class StagedMethod(Method):
    """A method with several stages.

    Attributes:
        lam: λ in (0, 1]; the k-th drop keeps the share λ^k of the original visual tokens. Not used if `keep` is given.
        stages: number of equal stages of the model's layers, at least 2. If the model cannot drop before every layer,
            the nearest possible ones are taken. Not used if `layers` or `keep` is given.
        layers: 0-based layers before which tokens are dropped, ascending; None: those of equal stages.
        keep: the share of the ORIGINAL visual tokens that each drop keeps, not ascending; None: λ, λ², λ³, ... After a
            last share of 0 no visual token remains (early exit); any other share keeps at least one.
    """

    lam: float = 0.5
    stages: int = 4
    layers: Sequence[int] | None = None
    keep: Sequence[float] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("layers", "keep"):
            value = getattr(self, name)
            if value is not None:
                if isinstance(value, str) or not isinstance(value, Sequence):
                    raise ValueError(f"{name} must be a list of numbers; got {value!r}")
                object.__setattr__(self, name, tuple(value))
        if not is_whole(self.stages) or self.stages < 2:
            raise ValueError(f"stages must be a whole number of at least 2; got {self.stages!r}")
        keep = self._keep_ratios()
        Schedule.of(range(1, len(keep) + 1) if self.layers is None else self.layers, keep)

    def schedule(self, num_layers: int, allowed: Sequence[int] | None = None) -> Schedule:
        keep = self._keep_ratios()
        layers = equal_stage_layers(num_layers, len(keep) + 1, allowed) if self.layers is None else self.layers
        schedule = Schedule.of(layers, keep)
        schedule.check_depth(num_layers)
        return schedule

    def _keep_ratios(self) -> Sequence[float]:
        if self.keep is not None:
            return self.keep
        return powers(self.lam, self.stages - 1 if self.layers is None else len(self.layers))


@dataclass(frozen=True, kw_only=True)
class PyramidDrop(StagedMethod, ScoredMethod):
    """At each drop, rank the visual tokens by the attention from the query tokens, and keep a share.

    >>> with PyramidDrop()(model) as trace:
    ...     model.generate(**inputs)
    """

    source: ClassVar[str] = "arXiv 2410.17247"


@dataclass(frozen=True, kw_only=True)
class FastV(ScoredMethod):
    """One drop before layer `layer`, ranked by the attention of the layer before it.

    Attributes:
        layer: 0-based, the paper's K.
        keep: the share of the visual tokens that is kept; 1 - R in the paper.
    """

    source: ClassVar[str] = "arXiv 2403.06764"

    layer: int = 2
    keep: float = 0.5
    rank_layer: RankLayer = field(default="last", init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        try:
            Schedule((Stage(self.layer, self.keep),))
        except ValueError as error:
            raise ValueError(f"FastV(layer={self.layer!r}, keep={self.keep!r}): {error}") from error

    def schedule(self, num_layers: int, allowed: Sequence[int] | None = None) -> Schedule:
        schedule = Schedule((Stage(self.layer, self.keep),))
        schedule.check_depth(num_layers)
        return schedule


@dataclass(frozen=True, kw_only=True)
class RandomDrop(StagedMethod):
    """A control: the schedule of PyramidDrop, with the kept tokens drawn at random.

    Attributes:
        seed: seed of the draw, the same for every call and sample; None draws anew at each call.
    """

    seed: int | None = 0
    rank_layer: RankLayer = field(default="next", init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.seed is not None and not is_whole(self.seed):
            raise ValueError(f"seed must be a whole number or None; got {self.seed!r}")

    def scorer(self) -> Scorer:
        return RandomScorer(self.seed)


@dataclass(frozen=True, kw_only=True)
class UniformDrop(StagedMethod):
    """A control: the schedule of PyramidDrop, with the kept tokens evenly spaced."""

    rank_layer: RankLayer = field(default="next", init=False)

    def scorer(self) -> Scorer:
        return UniformScorer()


@dataclass(frozen=True, kw_only=True)
class PreLLMMethod(Method):
    """Base class of controls with one drop before the decoder.

    Those that read or change what the vision tower does need a LLaVA-like model, whose visual tokens are its patches.

    Attributes:
        keep: the share of the visual tokens that is kept.
    """

    keep: float = 0.5
    rank_layer: RankLayer = field(default="next", init=False)
    merge: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        PreLLMSchedule.keeping(self.keep)

    def schedule(self, num_layers: int, allowed: Sequence[int] | None = None) -> Schedule:
        return PreLLMSchedule.keeping(self.keep)

    def attach(self, info: ModelInfo, rules: Rules, given: GivenMasks) -> Attachment:
        from pyramiddrop.hf import PreLLMAttachment

        return PreLLMAttachment(info, rules, given, shrinks=isinstance(self, Downsample))


@dataclass(frozen=True, kw_only=True)
class VisionDrop(PreLLMMethod):
    """A control: one drop before the decoder, ranked independently of the question.

    Attributes:
        score: the scorer: "vision", the attention in the vision tower; or "diversity", "random", "uniform".
    """

    source: ClassVar[str] = "after VisionZip, arXiv 2412.04467"

    score: Scorer | str | Mapping[str, Any] = BY_VISION

    def __post_init__(self) -> None:
        super().__post_init__()
        scorer = scorer_of(self.score)
        if scorer.needs_attention or scorer.needs_previous_hidden:
            raise ValueError(
                f"score must be one that needs no layer of the decoder (vision, diversity, random, uniform); got "
                f"{self.score!r}"
            )
        object.__setattr__(self, "score", scorer)

    def scorer(self) -> Scorer:
        assert isinstance(self.score, Scorer)
        return self.score


@dataclass(frozen=True, kw_only=True)
class Downsample(PreLLMMethod):
    """A control: the vision tower sees a smaller picture, with position embeddings interpolated to the largest square
    grid that has at most the share `keep` of the patches. Each token stands at the first place that it covers."""

    def scorer(self) -> Scorer:
        return BY_VISION  # the downsampled encoder marks the kept places in these scores


@dataclass(frozen=True, kw_only=True)
class Compose(Method):
    """One drop before the decoder, then drops inside it; written as `before | inside`.

    Settings of a whole forward (`positions`, `per_image`, `per_frame`, `logits`) must be the same in both methods.

    Attributes:
        before: the method before the decoder: VisionDrop or Downsample.
        inside: the method inside the decoder; its keep ratios refer to the tokens that `before` keeps.
    """

    source: ClassVar[str] = "after DUET-VLM, arXiv 2602.18846"

    before: Method | Mapping[str, Any] = field(default_factory=VisionDrop)
    inside: Method | Mapping[str, Any] = field(default_factory=PyramidDrop)
    positions: Positions = field(default="original", init=False)
    rank_layer: RankLayer = field(default="next", init=False)
    per_image: bool = field(default=False, init=False)
    per_frame: bool = field(default=False, init=False)
    merge: bool = field(default=False, init=False)
    logits: Logits = field(default="auto", init=False)

    def __post_init__(self) -> None:
        for name in ("before", "inside"):
            value = getattr(self, name)
            if not isinstance(value, Method):
                object.__setattr__(self, name, Method.from_settings(value, name))
        _check_places(*self.parts)
        for name in SHARED:
            if len({getattr(part, name) for part in self.parts}) > 1:
                raise ValueError(f"{self}: {name} holds for a whole forward; give both methods the same")
        for name in (*SHARED, "rank_layer", "merge"):
            object.__setattr__(self, name, getattr(self.parts[1], name))

    @property
    def parts(self) -> tuple[Method, Method]:
        """The method before the decoder, and the one inside it."""
        return cast("tuple[Method, Method]", (self.before, self.inside))

    def schedule(self, num_layers: int, allowed: Sequence[int] | None = None) -> Schedule:
        before, inside = (part.schedule(num_layers, allowed) for part in self.parts)
        return PreLLMSchedule(before.stages).inside(inside)

    def scorer(self) -> Scorer:
        return ComposedScorer(*(part.scorer() for part in self.parts))

    def ranking_flops(self, shape: DecoderShape, drop: DropCounts) -> int:
        return self.parts[drop.layer > 0].ranking_flops(shape, drop)

    def attach(self, info: ModelInfo, rules: Rules, given: GivenMasks) -> Attachment:
        return self.parts[0].attach(info, rules, given)

    def settings(self) -> dict[str, Any]:
        before, inside = self.parts
        return {"method": type(self).__name__, "before": before.settings(), "inside": inside.settings()}

    def __repr__(self) -> str:
        return " | ".join(map(repr, self.parts))


#: Settings of a whole forward, which both methods of a composition share.
SHARED = ("positions", "per_image", "per_frame", "logits")

METHODS: dict[str, type[Method]] = {
    kind.__name__: kind for kind in (PyramidDrop, FastV, RandomDrop, UniformDrop, VisionDrop, Downsample, Compose)
}


def _with_arguments(kind: type[Method]) -> str:
    """A method class's docstring with an entry for each argument, including those that its bases document."""
    docs = [cleandoc(base.__dict__.get("__doc__") or "") for base in kind.__mro__ if issubclass(base, Method)]
    entries = dict(entry for doc in reversed(docs) for entry in re.findall(r"^    (\w+): (.+(?:\n {8}.+)*)", doc, re.M))
    taken = [entry.name for entry in fields(kind) if entry.init]
    own = list(dict.fromkeys(name for doc in docs for name in re.findall(r"^    (\w+): ", doc, re.M) if name in taken))
    summary = docs[0].partition("\n\nAttributes:")[0]
    return "\n".join([f"{summary}\n\nArgs:", *(f"    {name}: {entries[name]}" for name in own)])


for _kind in METHODS.values():  # `help` shows a class without its bases' docstrings
    _kind.__doc__ = _with_arguments(_kind)


class Applied:
    """Context manager that applies a method to a model; entering it returns the trace."""

    def __init__(self, model: nn.Module, method: Method, given: GivenMasks) -> None:
        self._model, self._method, self._given = model, method, given
        self._attachment: Attachment | None = None

    def __enter__(self) -> Trace:
        self._attachment = _attach(self._model, self._method, self._given)
        return self._attachment.trace

    def __exit__(self, *_: object) -> None:
        if self._attachment is not None:
            self._attachment.detach()
            self._attachment = None


def apply(model: nn.Module, method: Method | str) -> Trace:
    """Apply `method` to `model` until `remove(model)`; returns the trace, which each prefill replaces.

    While it is applied, the model's `save_pretrained` also writes the method's `pyramiddrop.json`.

    Args:
        model: a Transformers model, or a pipeline with one.
        method: a method, or its specification as text, such as "pyramiddrop:lam=0.4".

    Raises:
        ValueError: if the model family is not supported or the schedule does not fit its depth.
        TypeError: if `model` is not a model or `method` is not a method.
        RuntimeError: if the model already has a method.
    """
    from pyramiddrop.hf import GivenMasks

    model, method = _module_of(model), _method_of(method)
    attachment = _attach(model, method, GivenMasks())
    install_save_hook(attachment.info.wrappers, method)
    return attachment.trace


def current_method(model: nn.Module) -> Method | None:
    """The method applied to `model` by `apply`, a `with` block or a view; None if there is none."""
    from pyramiddrop.hf import attachment_of

    attachment = attachment_of(_module_of(model))
    return None if attachment is None else attachment.method


def trace_of(model: nn.Module) -> Trace:
    """The trace that `apply` or the `with` block returned for `model`.

    Raises:
        RuntimeError: if no method is applied.
    """
    return _attachment(model).trace


def remove(model: nn.Module) -> None:
    """Remove the method from `model`.

    Raises:
        RuntimeError: if no method is applied.
    """
    attachment = _attachment(model)
    attachment.detach()
    remove_save_hook(attachment.info.wrappers)


def _attachment(model: nn.Module) -> Attachment:
    from pyramiddrop.hf import attachment_of

    attachment = attachment_of(_module_of(model))
    if attachment is None:
        raise RuntimeError("no pyramiddrop method is applied to this model")
    return attachment


def _module_of(model: Any) -> Any:
    """The model itself, or the one of a pipeline."""
    from torch import nn

    if isinstance(model, Method):
        raise TypeError(f"the model comes first: apply(model, {type(model).__name__}())")
    module = model if isinstance(model, nn.Module) else getattr(model, "model", None)
    if not isinstance(module, nn.Module):
        raise TypeError(f"model must be a PyTorch module or a Transformers pipeline; got {type(model).__name__}")
    return module


def _method_of(method: Any) -> Method:
    """The method itself, or the one that a specification describes."""
    if isinstance(method, Method):
        return method
    if isinstance(method, str):
        from pyramiddrop.method_spec import parse_method_spec

        parsed = parse_method_spec(method)
        if parsed is None:
            raise ValueError(f"method {method!r} drops nothing: leave the model as it is")
        return parsed
    if isinstance(method, type) and issubclass(method, Method):
        raise TypeError(f"method must be a method, not its class: write {method.__name__}() with its arguments")
    raise TypeError(f"method must be a method such as PyramidDrop(); got {type(method).__name__}")


def _attach(model: nn.Module, method: Method, given: GivenMasks) -> Attachment:
    from pyramiddrop.hf import Rules, UnsupportedModelError, drop_layers, inspect_model
    from pyramiddrop.hf.versions import warn_if_untested

    warn_if_untested()
    info, scorer = inspect_model(_module_of(model)), method.scorer()
    allowed = drop_layers(info, method.rank_layer, scorer)
    try:
        schedule = method.schedule(len(info.layers), allowed)
    except ValueError as error:
        raise UnsupportedModelError(f"{type(method).__name__} does not fit this model: {error}") from error
    rules = Rules(
        schedule=schedule,
        scorer=scorer,
        positions=method.positions,
        rank_layer=method.rank_layer,
        grouping="frame" if method.per_frame else "image" if method.per_image else "sample",
        logits=method.logits,
        merge=method.merge,
        ranking_flops=method.ranking_flops,
    )
    attachment = method.attach(info, rules, given)
    attachment.method = method
    return attachment


def _in_words(value: Any) -> Any:
    """A setting as a JSON value; a registered scorer becomes its name."""
    return scorer_settings(value) if isinstance(value, Scorer) else value


def _check_places(before: Method, inside: Method) -> None:
    """Raise ValueError unless the first method drops before the decoder and the second one inside it."""
    places = [isinstance(part, PreLLMMethod) for part in (before, inside)]
    if isinstance(before, Compose) or isinstance(inside, Compose):
        why = "a composition has two methods, one before the decoder and one inside it, and one of these has both"
    elif all(places):
        why = "both drop before the decoder: use one of them, and behind it a method that drops inside"
    elif not any(places):
        why = "both drop inside the decoder: give all layers to one, as PyramidDrop(layers=[2, 8], keep=[0.5, 0.25])"
    else:
        why = f"the one that drops before the decoder comes first: {inside} | {before}"
    if places != [True, False] or isinstance(inside, Compose):
        raise ValueError(f"{before} | {inside}: {why}")


def _check_choice(name: str, value: Any, allowed: tuple[Any, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}; got {value!r}")
