"""What comes to the front door that is no method or no model: words, pipelines, classes, exporters."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AttentionInterface, AutoModelForImageTextToText, AutoProcessor, pipeline
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from pyramiddrop import FastV, PyramidDrop, RandomDrop, UniformDrop, VisionDrop, apply, current_method, remove, trace_of
from pyramiddrop.assets import digits_checkpoint, digits_images
from pyramiddrop.hf import query_key
from pyramiddrop.scoring import RandomScorer, TopHeadsScorer
from tiny import make_batch, tiny_model

MIXED: list[list[Any]] = [[5, "image", 7], [3, "image", 2, "image", 1], [9]]


def test_the_current_method() -> None:
    model = tiny_model()
    assert current_method(model) is None
    method = PyramidDrop(lam=0.4)
    trace = apply(model, method)
    assert current_method(model) is method
    assert trace_of(model) is trace
    remove(model)
    assert current_method(model) is None
    with method(model) as trace:
        assert current_method(model) is method
        assert trace_of(model) is trace


def test_a_method_in_words() -> None:
    model = tiny_model()
    apply(model, "pyramiddrop:lam=0.4,stages=2")
    assert current_method(model) == PyramidDrop(lam=0.4, stages=2)
    remove(model)
    for words, message in (
        ("pyramid", "method 'pyramid' is not one of pyramiddrop, fastv, random"),
        ("fastv:lam=0.5", "lam does not belong to the method 'fastv'"),
        ("pyramiddrop:lam=2", "method 'pyramiddrop:lam=2': lam must be"),
        ("vanilla", "method 'vanilla' drops nothing: leave the model as it is"),
    ):
        with pytest.raises(ValueError, match=message):
            apply(model, words)
    assert current_method(model) is None


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (lambda model: apply(model, PyramidDrop), r"method must be a method, not its class: write PyramidDrop\(\)"),
        (lambda model: apply(model, None), r"method must be a method such as PyramidDrop\(\); got NoneType"),
        (lambda model: apply(PyramidDrop(), model), r"the model comes first: apply\(model, PyramidDrop\(\)\)"),
        (
            lambda model: apply("pyramiddrop", model),
            "model must be a PyTorch module or a Transformers pipeline; got str",
        ),
        (lambda model: FastV()(FastV()).__enter__(), r"the model comes first: apply\(model, FastV\(\)\)"),
        (lambda model: PyramidDrop().view(None), "model must be a PyTorch module"),
        (lambda model: remove(PyramidDrop()), "the model comes first"),
    ],
)
def test_what_is_no_model_or_no_method_is_named(use: Any, message: str) -> None:
    model = tiny_model()
    with pytest.raises(TypeError, match=message):
        use(model)
    assert current_method(model) is None


def test_a_pipeline() -> None:
    model = AutoModelForImageTextToText.from_pretrained(digits_checkpoint())
    processor = AutoProcessor.from_pretrained(digits_checkpoint())
    pipe = pipeline("image-text-to-text", model=model, processor=processor)
    content = [{"type": "image", "image": str(digits_images()[0])}, {"type": "text", "text": "Read row 6."}]

    def ask() -> Any:
        return pipe(text=[{"role": "user", "content": content}], max_new_tokens=4, do_sample=False)

    vanilla = ask()
    with PyramidDrop()(pipe) as trace:
        ask()
    assert trace.lengths[-1] < trace.lengths[0]
    apply(pipe, "uniform")
    assert current_method(pipe) == current_method(model) == UniformDrop()
    ask()
    assert trace_of(pipe).lengths == trace.lengths
    remove(pipe)
    assert ask() == vanilla
    assert current_method(FastV().view(pipe)) == FastV()


@pytest.mark.parametrize(
    ("method", "shown"),
    [
        (PyramidDrop(), "PyramidDrop()"),
        (PyramidDrop(keep=[0.5]), "PyramidDrop(keep=(0.5,))"),
        (PyramidDrop(lam=0.6, positions="compact"), "PyramidDrop(positions='compact', lam=0.6)"),
        (RandomDrop(layers=[2, 4], seed=None), "RandomDrop(layers=(2, 4), seed=None)"),
        (FastV(keep=0.3, score="key_norm"), "FastV(score='key_norm', keep=0.3)"),
        (FastV(score=TopHeadsScorer(share=0.5)), "FastV(score={'name': 'top_heads', 'share': 0.5})"),
        (VisionDrop(per_image=True), "VisionDrop(per_image=True)"),
    ],
)
def test_a_method_shows_what_differs_from_the_default(method: Any, shown: str) -> None:
    assert repr(method) == shown
    assert eval(shown) == method


def test_a_method_with_an_unregistered_scorer_shows_it() -> None:
    class OwnScorer(RandomScorer):
        pass

    assert repr(PyramidDrop(score=OwnScorer())) == f"PyramidDrop(score={OwnScorer()!r})"


# --- Other libraries and exporters ----------------------------------------------------------------------------------


def test_the_attention_functions_may_be_wrapped_and_called_by_position() -> None:
    """kvpress wraps all of them, and calls them by the positions of Transformers' own `sdpa_attention_forward`."""
    model = tiny_model("llava-gqa")
    inputs, methods = make_batch(model, MIXED), (PyramidDrop(), FastV(), VisionDrop())
    functions, seen = dict(AttentionInterface._global_mapping), list[str]()

    def wrapped(name: str) -> Any:
        def attend(
            module: nn.Module, query: Any, key: Any, value: Any, attention_mask: Any, dropout: Any, **kw: Any
        ) -> Any:
            seen.append(name)
            return functions[name](module, query, key, value, attention_mask, dropout, **kw)

        return attend

    with torch.no_grad():
        expected = []
        for method in methods:
            with method(model):
                expected.append(model(**inputs).logits)
        try:
            for name in ("sdpa", query_key._STOP):
                AttentionInterface.register(name, wrapped(name))
            for method, logits in zip(methods, expected, strict=True):
                with method(model):
                    assert torch.equal(model(**inputs).logits, logits)
        finally:
            for name in ("sdpa", query_key._STOP):
                AttentionInterface.register(name, functions[name])
    assert {"sdpa", query_key._STOP} <= set(seen)


def test_the_probe_takes_what_sdpa_takes_in_its_order() -> None:
    query, key = torch.rand(1, 2, 3, 4), torch.rand(1, 2, 3, 4)
    given = (nn.Module(), query, key, key, None, 0.1, 0.25, True)
    sdpa_attention_forward(*given)
    with pytest.raises(query_key._ReachedError) as stopped:
        query_key._stop(*given)
    assert stopped.value.found.queries is query
    assert stopped.value.found.keys is key
    assert stopped.value.found.scale == 0.25


class Logits(nn.Module):
    """What exporters can take: tensors in, one tensor out."""

    def __init__(self, model: nn.Module, pixels: torch.Tensor) -> None:
        super().__init__()
        self.model, self.pixels = model, pixels

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.model(input_ids=input_ids, pixel_values=self.pixels, use_cache=False).logits
        return logits


@pytest.mark.fast_cases(4)
@pytest.mark.parametrize("method", [PyramidDrop(), VisionDrop()], ids=lambda method: type(method).__name__)
@pytest.mark.parametrize("exporter", ["export", "strict export", "trace", "onnx"])
def test_exporters_are_refused_in_one_line(exporter: str, method: Any) -> None:
    model = tiny_model("llava-gqa")
    inputs = make_batch(model, MIXED[:1])
    module, given = Logits(model, inputs["pixel_values"]).eval(), (inputs["input_ids"],)
    exporters: dict[str, Any] = {
        "export": lambda: torch.export.export(module, given),
        "strict export": lambda: torch.export.export(module, given, strict=True),
        "trace": lambda: torch.jit.trace(module, given),
        "onnx": lambda: torch.onnx.export(module, given, io.BytesIO(), dynamo=False),
    }
    if exporter == "onnx":
        pytest.importorskip("onnx")
    apply(model, method)
    with torch.no_grad(), pytest.raises(Exception, match="cannot be exported") as refused:
        exporters[exporter]()
    assert "cannot be exported (torch.export, torch.jit.trace, ONNX)" in str(refused.value)
