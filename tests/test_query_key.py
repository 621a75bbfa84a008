"""The queries and keys of a layer are those that its own attention kernel is given, and taking them leaves no trace."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from pyramiddrop import PyramidDrop
from pyramiddrop.hf import query_key
from pyramiddrop.hf.layer_inputs import take_tokens
from pyramiddrop.hf.model_info import inspect_model
from pyramiddrop.hf.query_key import NoAttentionError, QueryKey, extract
from tiny import Answer, make_batch, tiny_model

Given = dict[int, dict[str, Any]]
SPY = "test_projections_spy"
seen_by_kernel: Given = {}


def spy(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **options: Any
) -> tuple[Tensor, None]:
    """SDPA that writes down what it is given, by layer."""
    seen_by_kernel[module.layer_idx] = {"query": query, "key": key, **options}
    return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, attention_mask, **options)


AttentionInterface.register(SPY, spy)
AttentionMaskInterface.register(SPY, sdpa_mask)


class Case:
    """A model, a call, and what each decoder layer and its kernel are given in it."""

    def __init__(self, model: PreTrainedModel, inputs: dict[str, Any]) -> None:
        self.model, self.inputs = model, inputs
        parts = inspect_model(model)
        self.layers, self.calls = parts.layers, dict[int, tuple[Tensor, dict[str, Any]]]()
        before = parts.text.config._attn_implementation_internal
        handles = [
            layer.register_forward_pre_hook(self._note(index), with_kwargs=True)
            for index, layer in enumerate(self.layers)
        ]
        configs = {id(m.config): m.config for m in parts.text.modules() if hasattr(m, "config")}
        seen_by_kernel.clear()
        for config in configs.values():
            config._attn_implementation_internal = SPY
        with torch.no_grad():
            model(**inputs, use_cache=False)
        for config in configs.values():
            config._attn_implementation_internal = before
        for handle in handles:
            handle.remove()
        self.given: Given = dict(seen_by_kernel)

    def _note(self, index: int) -> Callable[..., None]:
        def note(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self.calls[index] = (args[0], kwargs)

        return note

    def arguments(self, index: int) -> Callable[[Tensor | None], dict[str, Any]]:
        """What the layer is called with beside some of its rows."""
        kwargs = self.calls[index][1]
        tokens = {name: kwargs[name] for name in ("position_ids", "position_embeddings") if name in kwargs}
        fixed = {name: value for name, value in kwargs.items() if name not in tokens} | {"attention_mask": None}
        return lambda rows: fixed | (tokens if rows is None else take_tokens(tokens, rows))

    @torch.no_grad()
    def project(self, index: int, asking: Tensor | None) -> QueryKey:
        found: QueryKey = extract(self.layers[index], self.calls[index][0], asking, self.arguments(index))
        return found

    def check(self, index: int) -> None:
        """The projection of a few rows of each sample is what the kernel was given."""
        given, count = self.given[index], self.calls[index][0].shape[1]
        asking = torch.tensor([[count - 1, 2], [0, count // 2]])[: len(self.calls[index][0])]
        found = self.project(index, asking)
        queries = given["query"].transpose(1, 2)
        expected = torch.stack([row[some] for row, some in zip(queries, asking, strict=True)]).transpose(1, 2)
        torch.testing.assert_close(found.queries, expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(found.keys, given["key"], atol=1e-5, rtol=1e-5)
        width: float = found.queries.shape[-1]
        assert found.scale == (given["scaling"] if given.get("scaling") is not None else width**-0.5)
        assert found.softcap == given.get("softcap")
        assert (found.sinks is None) == (given.get("s_aux") is None)


def llava_case(family: str = "llava-gqa", change: Callable[[PreTrainedModel], Any] | None = None) -> Case:
    model = tiny_model(family)
    if change is not None:
        change(model)
    return Case(model, make_batch(model, [[3, "image", 5], [8]]))


@pytest.mark.parametrize("family", ["llava", "llava-gqa", "llava-mistral", "llava-qwen2", "llava-qwen3"])
def test_text_models_of_llava(family: str) -> None:
    case = llava_case(family)
    for index in (0, 3, 7):
        case.check(index)


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("qwen2_5_vl", (0, 4)),  # positions of three axes
        ("qwen3_vl", (5,)),  # norms of queries and keys
        ("cohere2_vision", (0, 3, 7)),  # rotary embeddings on the windowed layers alone
        ("kimi_k25", (0, 2, 6)),  # latent attention
        ("fuyu", (0, 4)),  # Persimmon: one matrix for queries, keys and values
        ("qwen3_5", (3, 7)),  # gates beside the queries
        ("gemma3", (0, 3)),  # two sorts of rotary embeddings
        ("lfm2_vl", (2, 5)),  # convolutions between
        ("llama4", (3,)),
        ("llama4", (0,)),
    ],
)
def test_families(name: str, layers: tuple[int, ...]) -> None:
    pytest.importorskip("transformers", minversion="5.23")
    from zoo import MEMBERS, make_batch

    model = MEMBERS[name].build(0)
    specs = [[3, "image", 7]] if "batch" in MEMBERS[name].cannot else [[3, "image", 7], [12]]
    case = Case(model, make_batch(MEMBERS[name], model, specs))
    for index in layers:
        for _ in range(2):  # the second time it knows how the layer may be asked
            case.check(index)


def test_scale_softcap_and_sinks_come_from_the_layer() -> None:
    case = llava_case()
    case.layers[2].self_attn.scaling = 0.3
    attention = type(case.layers[2].self_attn)

    def capped(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return attention.forward(module, *args, **kwargs, softcap=30.0, s_aux=torch.ones(4))

    case.layers[2].self_attn.__class__ = type("Capped", (attention,), {"forward": capped})
    found = case.project(2, torch.tensor([[1], [1]]))
    assert (found.scale, found.softcap) == (0.3, 30.0)
    assert found.sinks is not None
    assert found.sinks.tolist() == [1.0] * 4


def test_lora() -> None:
    peft = pytest.importorskip("peft")
    model = tiny_model("llava-gqa")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "k_proj", "v_proj"], init_lora_weights=False)
    plain = llava_case()
    case = Case(peft.get_peft_model(model, config).eval(), plain.inputs)
    assert not torch.allclose(case.given[4]["key"], plain.given[4]["key"])
    for index in (0, 4):
        case.check(index)


# --- What it costs --------------------------------------------------------------------------------------------------


def rows_seen(case: Case, index: int) -> dict[str, list[int]]:
    """How many rows each linear module of the layer computes while two tokens ask."""
    seen: dict[str, list[int]] = {}
    handles = [
        module.register_forward_hook(
            lambda module, args, output, name=name: seen.setdefault(name.split(".")[-1], []).append(args[0].shape[1])
        )
        for name, module in case.layers[index].named_modules()
        if isinstance(module, nn.Linear)
    ]
    case.project(index, torch.tensor([[1, 2]] * 2))
    for handle in handles:
        handle.remove()
    return seen


def test_only_the_keys_are_computed_for_all_rows() -> None:
    case = llava_case()
    count = case.calls[3][0].shape[1]
    case.check(3)
    assert rows_seen(case, 3) == {"q_proj": [2], "k_proj": [count]}


def test_a_layer_that_reads_more_than_llamas_is_asked_twice() -> None:
    """`position_ids`, say, by which some scale their queries in long prompts alone."""
    case = llava_case(change=scale_by_position)
    count = case.calls[3][0].shape[1]
    case.check(3)
    case.check(3)
    assert rows_seen(case, 3) == {"q_proj": [2], "k_proj": [2, count], "v_proj": [2]}


def scale_by_position(model: PreTrainedModel) -> None:
    """Queries that depend on their position behind column 8 (Ministral 3, Llama 4)."""
    attention = model.model.language_model.layers[3].self_attn
    own = type(attention)

    def forward(self: Any, hidden_states: Tensor, position_embeddings: Any, position_ids: Tensor, **kwargs: Any) -> Any:
        scale = 1 + (position_ids > 8).to(hidden_states.dtype)
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        queries, keys, values = (
            project(hidden_states).view(shape).transpose(1, 2) for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        queries, keys = apply_rotary_pos_emb(queries, keys, *position_embeddings)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, None)
        output, weights = attend(
            self, queries * scale[:, None, :, None], keys, values, kwargs["attention_mask"], scaling=self.scaling
        )
        return self.o_proj(output.flatten(2)), weights

    attention.__class__ = type("Scaled", (own,), {"forward": forward})


def entangle(model: PreTrainedModel) -> None:
    """Keys that depend on what `q_proj` gives."""
    attention = model.model.language_model.layers[3].self_attn
    own = type(attention)

    def forward(self: Any, hidden_states: Tensor, position_embeddings: Any, attention_mask: Any, **kwargs: Any) -> Any:
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        queries, keys, values = (
            project(hidden_states).view(shape).transpose(1, 2) for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        keys = keys + queries[:, : keys.shape[1]]
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, None)
        output, weights = attend(self, queries, keys, values, attention_mask, scaling=self.scaling)
        return self.o_proj(output.flatten(2)), weights

    attention.__class__ = type("Entangled", (own,), {"forward": forward})


def test_whether_keys_may_be_had_alone_is_asked_once_a_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """The answer is a number that the host waits for: on a GPU everything queued has to be done first."""
    asked, agree = [], query_key._agree
    monkeypatch.setattr(query_key, "_agree", lambda *given: asked.append(given) or agree(*given))
    case = llava_case()
    for index in (3, 3, 2, 3):
        case.project(index, torch.tensor([[1, 2]] * 2))
    assert len(asked) == 2


def test_keys_that_need_the_queries_make_it_ask_the_whole_layer() -> None:
    case = llava_case(change=entangle)
    count = case.calls[3][0].shape[1]
    case.check(3)
    case.check(3)
    assert rows_seen(case, 3) == {"q_proj": [count], "k_proj": [count], "v_proj": [count]}
    case.check(2)
    assert rows_seen(case, 2)["q_proj"] == [2], "what is known of one layer says nothing of another"


# --- No trace -------------------------------------------------------------------------------------------------------


def state(model: nn.Module) -> dict[str, Any]:
    """What a probe could leave behind: objects, hooks, configuration, weights."""
    modules = dict(model.named_modules())
    return {
        "modules": {name: (id(module), type(module)) for name, module in modules.items()},
        "attributes": {
            name: {key: id(value) for key, value in vars(module).items()} for name, module in modules.items()
        },
        "hooks": {name: (list(m._forward_hooks), list(m._forward_pre_hooks)) for name, m in modules.items()},
        "implementations": {name: m.config._attn_implementation for name, m in modules.items() if hasattr(m, "config")},
        "config": model.config.to_dict(),
        "weights": {name: (id(p), p.requires_grad, p._version) for name, p in model.named_parameters()},
        "training": {name: module.training for name, module in modules.items()},
    }


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    before = state(model)
    try:
        yield
    finally:
        after = state(model)
        for name, value in before.items():
            assert after[name] == value, name


def test_nothing_is_left_behind() -> None:
    case = llava_case()
    with untouched(case.model):
        case.project(3, torch.tensor([[1], [2]]))
    with untouched(case.model), pytest.raises(TypeError):
        extract(case.layers[3], case.calls[3][0], torch.tensor([[1], [2]]), lambda rows: {"no": 1})
    case.check(3)


def test_an_error_inside_the_layer_is_the_callers_and_leaves_nothing() -> None:
    case = llava_case()

    def fail(module: nn.Module, args: Any) -> None:
        raise KeyError("mine")

    handle = case.layers[3].self_attn.k_proj.register_forward_pre_hook(fail)
    with untouched(case.model), pytest.raises(KeyError, match="mine"):
        case.project(3, torch.tensor([[1], [2]]))
    handle.remove()


def test_hooks_on_layers_and_attention_see_real_calls_alone() -> None:
    model = tiny_model()
    inputs = make_batch(model, [[3, "image", 5]])
    calls: list[str] = []
    for layer in model.model.language_model.layers:
        for module in (layer, layer.self_attn):
            module.register_forward_pre_hook(lambda module, args: calls.append("before"))
            module.register_forward_hook(lambda module, args, output: calls.append("after"))
    with torch.no_grad(), PyramidDrop(layers=[2, 4, 6], keep=[0.5, 0.25, 0.125])(model):
        model(**inputs)
    assert len(calls) == 4 * 8


def test_an_instances_own_forward_is_not_bypassed_in_the_model_and_not_run_in_the_twin() -> None:
    """As accelerate wraps a module's forward to move weights."""
    case, calls = llava_case(), list[str]()
    layer = case.layers[3]

    def wrapped(own: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            calls.append("forward")
            return own(*args, **kwargs)

        return forward

    for module in (layer, layer.self_attn):
        module.forward = wrapped(module.forward)
    with untouched(case.model):
        case.check(3)
    assert not calls
    with torch.no_grad():
        case.model(**case.inputs)
    assert len(calls) == 2


def test_ranking_in_training_touches_no_live_module(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not for a moment: another thread may run it."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, lora_dropout=0.9, target_modules=["q_proj", "k_proj"], init_lora_weights=False)
    model = peft.get_peft_model(tiny_model("llava-gqa"), config)
    inputs = make_batch(model.base_model.model, [[3, "image", 5, Answer(3)]], labels=True)
    method = PyramidDrop(layers=[2, 4, 6], keep=[0.5, 0.25, 0.125])
    with torch.no_grad(), method(model.eval()) as trace:
        model(**inputs)
        expected = [stage.scores for stage in trace.stages[:1]]
    model.base_model.model.model.language_model.layers[2:].train()  # what they are given is no matter of chance
    live, touched = {id(module) for module in model.modules()}, list[str]()

    def note(module: nn.Module, key: str, value: Any) -> None:
        if id(module) in live:
            touched.append(f"{type(module).__name__}.{key}")
        own(module, key, value)

    own = nn.Module.__setattr__
    with torch.no_grad(), method(model) as trace:
        monkeypatch.setattr(nn.Module, "__setattr__", note)
        model(**inputs)
        monkeypatch.undo()
    assert touched == []
    assert trace.stages[0].scores is not None
    for found, scores in zip(trace.stages[0].scores, expected[0] or [], strict=True):
        torch.testing.assert_close(found, scores)


def test_projecting_twice_gives_the_same_bits() -> None:
    case = llava_case()
    first, second = (case.project(3, torch.tensor([[5, 1], [2, 2]])) for _ in range(2))
    assert torch.equal(first.queries, second.queries)
    assert torch.equal(first.keys, second.keys)


def test_what_the_layer_makes_on_the_way_is_let_go_at_once() -> None:
    case, normed = llava_case(), list[weakref.ref[Tensor]]()
    norm = case.layers[2].input_layernorm
    handle = norm.register_forward_hook(lambda module, given, output: normed.append(weakref.ref(output)))
    gc.disable()  # it must not need a collection of cycles
    projection = case.project(2, torch.tensor([[1, 2]] * 2))
    gc.enable()
    handle.remove()
    assert projection.keys.shape[2] == case.calls[2][0].shape[1]
    assert normed
    assert [reference() for reference in normed] == [None] * len(normed)


def test_a_layer_that_never_attends_is_named() -> None:
    class Mixing(nn.Module):
        def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
            return hidden_states

    with pytest.raises(NoAttentionError, match="Mixing does not reach Transformers' attention interface"):
        extract(Mixing(), torch.zeros(1, 4, 8), torch.tensor([[3]]), lambda rows: {})
