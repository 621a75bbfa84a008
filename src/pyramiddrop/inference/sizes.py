"""A model's sizes, from a preset, a configuration or plain numbers, and the costs of methods in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pyramiddrop import Method
from pyramiddrop.cost import BYTES, PRESETS, CostBreakdown, DecoderShape, ModelShape, Prompt, estimate_cost
from pyramiddrop.inference import InputError, user_input
from pyramiddrop.inference.resolve import resolve_method
from pyramiddrop.method_spec import NAMES, VANILLA, method_label, with_defaults

DEFAULT_SHAPE = "llava-1.5-7b"
PLAIN = "plain numbers"
TEXT_TOKENS = 64  # a short question in a chat template
NUMBERS = ("num_layers", "hidden", "intermediate", "heads", "kv_heads")
NEEDED = NUMBERS[:3]


@dataclass(frozen=True)
class SizeOptions:
    """The options of a model's sizes, None if not given. Without any, the shape is `llava-1.5-7b`.

    Attributes:
        shape: a name in `pyramiddrop.cost.PRESETS`.
        model: a folder or a hub name; only its config.json is read.
        num_layers, hidden, intermediate, heads, kv_heads: sizes of a decoder with gated MLPs. Without heads, heads are
            128 wide; without kv_heads, there are as many as heads.
        visual_tokens, text_tokens, crops: the token and crop counts of the prompt.
        dtype: the dtype of the KV cache.
    """

    shape: str | None = None
    model: str | None = None
    num_layers: int | None = None
    hidden: int | None = None
    intermediate: int | None = None
    heads: int | None = None
    kv_heads: int | None = None
    visual_tokens: int | None = None
    text_tokens: int | None = None
    crops: int | None = None
    dtype: str | None = None


@dataclass(frozen=True)
class Sizes:
    """A model's sizes and a prompt, with their name."""

    name: str
    shape: ModelShape
    prompt: Prompt

    @property
    def about(self) -> str:
        """A description of what is counted."""
        return f"{self.name}: {self.prompt.visual_tokens} visual and {self.prompt.text_tokens} text tokens"

    @property
    def remark(self) -> str:
        """A note on parts of the model that are not counted; empty if there are none."""
        if self.shape.vision is not None or self.name == PLAIN:
            return ""
        return "No vision tower and no projector are counted: their sizes are not known."


def choose_sizes(options: SizeOptions) -> Sizes:
    """The sizes that `options` describe.

    Raises:
        InputError: for two sources of sizes, an unknown name, or missing or impossible numbers.
    """
    given = [name for name in NUMBERS if getattr(options, name) is not None]
    sources = [name for name in ("shape", "model") if getattr(options, name) is not None]
    if given:
        sources.append(_flag(given[0]))
    if len(sources) > 1:
        raise InputError(f"the sizes come from one place; got --{' and --'.join(sources)}")
    if options.dtype is not None and options.dtype not in BYTES:
        raise InputError(f"dtype {options.dtype!r} is not one of {', '.join(BYTES)}")
    if given:
        name, shape, visual = PLAIN, _plain(options), None
    elif options.model is not None:
        name, shape, visual = options.model, *_read(options.model)
    else:
        name, shape, visual = _preset(options.shape or DEFAULT_SHAPE)
    if options.dtype is not None:
        shape = replace(shape, decoder=replace(shape.decoder, bytes_per_value=BYTES[options.dtype]))
    return Sizes(name, shape, _prompt(options, visual))


def _preset(name: str) -> tuple[str, ModelShape, int]:
    if name not in PRESETS:
        raise InputError(f"shape {name!r} is not one of {', '.join(PRESETS)}")
    return name, PRESETS[name].shape, PRESETS[name].visual_tokens


def _read(source: str) -> tuple[ModelShape, int | None]:
    from pyramiddrop.cost.model_sizes import model_shape, visual_tokens_of
    from pyramiddrop.inference.checkpoint import read_any_config

    config = read_any_config(source)
    with user_input(f"cannot count {source}"):
        return model_shape(config), visual_tokens_of(config)


def _plain(options: SizeOptions) -> ModelShape:
    numbers: dict[str, Any] = {name: getattr(options, name) for name in NUMBERS}
    missing = [_flag(name) for name in NEEDED if numbers[name] is None]
    if missing:
        raise InputError(f"plain numbers need --num-layers, --hidden and --intermediate; --{missing[0]} is missing")
    for name, number in numbers.items():
        if number is not None and number < 1:
            raise InputError(f"--{_flag(name)} must be at least 1; got {number}")
    hidden = numbers["hidden"]
    heads = numbers["heads"] or (hidden // 128 if hidden % 128 == 0 else 1)
    if hidden % heads:
        raise InputError(f"--heads must divide --hidden; got {heads} and {hidden}")
    return ModelShape(
        DecoderShape(
            layers=numbers["num_layers"],
            hidden=hidden,
            intermediate=numbers["intermediate"],
            heads=heads,
            kv_heads=numbers["kv_heads"] or heads,
            head_dim=hidden // heads,
        )
    )


def _prompt(options: SizeOptions, visual: int | None) -> Prompt:
    visual = options.visual_tokens if options.visual_tokens is not None else visual
    if visual is None:
        raise InputError("say --visual-tokens: the sizes do not tell how many a picture has")
    text = options.text_tokens if options.text_tokens is not None else TEXT_TOKENS
    with user_input():
        return Prompt(visual, text, options.crops)


def _flag(name: str) -> str:
    return name.replace("_", "-")


@dataclass(frozen=True)
class MethodCost:
    """A method (None: vanilla), its label, and its cost."""

    label: str
    method: Method | None
    cost: CostBreakdown


def method_costs(specs: Sequence[str], shared: Mapping[str, str], sizes: Sizes) -> list[MethodCost]:
    """The costs of vanilla and of the methods in `specs`, each with its own options and the `shared` ones that it has.

    Raises:
        InputError: for an unknown method or option, a bad value, or a shared option that no method has.
    """
    with user_input():
        full = [with_defaults(spec, shared) for spec in specs]
    for option in shared:
        if not any(option in known for _, known in full):
            raise InputError(f"--{option} belongs to none of the methods {', '.join(specs)}")
    methods = [resolve_method(spec, sizes.name, sizes.shape.decoder.layers) for spec, _ in full]
    vanilla = MethodCost(VANILLA, None, estimate_cost(sizes.shape, sizes.prompt))
    return [vanilla, *(_method_cost(method, sizes) for method in methods if method is not None)]


def published_costs(
    specs: Sequence[str], shared: Mapping[str, str], sizes: Sizes
) -> tuple[list[MethodCost], list[str]]:
    """`method_costs` of default methods, without those that the model does not allow; and the reasons for these.

    Raises:
        InputError: if the model allows none of them.
    """
    found, errors = method_costs([], {}, sizes), dict[str, InputError]()
    for spec in specs:
        try:
            found += method_costs([spec], shared, sizes)[1:]
        except InputError as error:
            errors[spec] = error
    if len(found) == 1:
        raise next(iter(errors.values()))
    return found, [f"{NAMES[spec].__name__} is left out: {error}" for spec, error in errors.items()]


def _method_cost(method: Method, sizes: Sizes) -> MethodCost:
    shape = sizes.shape.decoder
    with user_input():
        attends = method.scorer().needs_attention
        schedule = method.schedule(shape.layers, shape.drop_layers(method.rank_layer, attends))
        shape.check_layers(schedule.layers, method.rank_layer, attends, sizes.prompt)
    cost = estimate_cost(sizes.shape, sizes.prompt, schedule, method.ranking_flops)
    return MethodCost(method_label(method), method, cost)
