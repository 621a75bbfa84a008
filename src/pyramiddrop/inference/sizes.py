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


def choose_sizes(
    *,
    shape: str | None,
    model: str | None,
    visual_tokens: int | None,
    text_tokens: int | None,
    crops: int | None,
    dtype: str | None,
    **numbers: int | None,
) -> Sizes:
    """The sizes that the options describe, None for those that are not given. By default, those of `llava-1.5-7b`.
    Raises InputError for two sources of sizes, an unknown name, or missing or impossible numbers.

    Args:
        shape: a name in `pyramiddrop.cost.PRESETS`.
        model: a folder or a hub name; only its config.json is read.
        dtype: the dtype of the KV cache.
        numbers: the `NUMBERS` of a decoder with gated MLPs. Without heads, heads are 128 wide; without kv_heads, there
            are as many as heads.
    """
    given = [name for name in NUMBERS if numbers[name] is not None]
    sources = [name for name, value in (("shape", shape), ("model", model)) if value is not None]
    sources += [_flag(name) for name in given[:1]]
    if len(sources) > 1:
        raise InputError(f"the sizes come from one place; got --{' and --'.join(sources)}")
    if dtype is not None and dtype not in BYTES:
        raise InputError(f"dtype {dtype!r} is not one of {', '.join(BYTES)}")
    if given:
        name, sizes, visual = PLAIN, _plain(numbers), None
    elif model is not None:
        from pyramiddrop.cost.model_sizes import model_shape, visual_tokens_of
        from pyramiddrop.inference.checkpoint import read_any_config

        config = read_any_config(model)
        with user_input(f"cannot count {model}"):
            name, sizes, visual = model, model_shape(config), visual_tokens_of(config)
    else:
        name = shape or DEFAULT_SHAPE
        if name not in PRESETS:
            raise InputError(f"shape {name!r} is not one of {', '.join(PRESETS)}")
        sizes, visual = PRESETS[name].shape, PRESETS[name].visual_tokens
    if dtype is not None:
        sizes = replace(sizes, decoder=replace(sizes.decoder, bytes_per_value=BYTES[dtype]))
    visual = visual if visual_tokens is None else visual_tokens
    if visual is None:
        raise InputError("say --visual-tokens: the sizes do not tell how many a picture has")
    with user_input():
        return Sizes(name, sizes, Prompt(visual, TEXT_TOKENS if text_tokens is None else text_tokens, crops))


def _plain(numbers: Mapping[str, Any]) -> ModelShape:
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
    kv_heads = numbers["kv_heads"] or heads
    layers, intermediate = numbers["num_layers"], numbers["intermediate"]
    return ModelShape(DecoderShape(layers, hidden, intermediate, heads, kv_heads, head_dim=hidden // heads))


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
    Raises InputError for an unknown method or option, a bad value, or a shared option that no method has."""
    with user_input():
        full = [with_defaults(spec, shared) for spec in specs]
    for option in shared:
        if not any(option in known for _, known in full):
            raise InputError(f"--{option} belongs to none of the methods {', '.join(specs)}")
    shape = sizes.shape.decoder
    methods = [resolve_method(spec, sizes.name, shape.layers) for spec, _ in full]
    found = [MethodCost(VANILLA, None, estimate_cost(sizes.shape, sizes.prompt))]
    for method in filter(None, methods):
        with user_input():
            scorer = method.scorer()
            ranks = method.rank_layer, scorer.needs_attention, scorer.needs_previous_hidden
            schedule = method.schedule(shape.layers, shape.drop_layers(*ranks))
            shape.check_layers(schedule.layers, *ranks, sizes.prompt)
        cost = estimate_cost(sizes.shape, sizes.prompt, schedule, method.ranking_flops)
        found.append(MethodCost(method_label(method), method, cost))
    return found


def published_costs(
    specs: Sequence[str], shared: Mapping[str, str], sizes: Sizes
) -> tuple[list[MethodCost], list[str]]:
    """`method_costs` of default methods, without those that the model does not allow; and the reasons for these. Raises
    InputError if the model allows none of them."""
    found, errors = method_costs([], {}, sizes), dict[str, InputError]()
    for spec in specs:
        try:
            found += method_costs([spec], shared, sizes)[1:]
        except InputError as error:
            errors[spec] = error
    if len(found) == 1:
        raise next(iter(errors.values()))
    return found, [f"{NAMES[spec].__name__} is left out: {error}" for spec, error in errors.items()]
