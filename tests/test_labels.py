"""Which labels say who asks and what stays, which are scored, and what a training loop is told."""

from __future__ import annotations

import copy
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import LlavaForConditionalGeneration, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

import reference
from checks import HALVES, method_of, same_gradients
from pyramiddrop import PyramidDrop, VisionDrop
from pyramiddrop.assets import demo_images, digits_checkpoint
from tiny import Answer, collate, make_batch, make_rows, tiny_model

TURNS: list[Any] = [5, "image", 3, Answer(4), 2, Answer(3)]
VISUAL = slice(5, 21)


def labelled(*specs: list[Any], side: str = "right") -> dict[str, Tensor]:
    return make_batch(tiny_model(), list(specs), side, labels=True)


def all_supervised(inputs: dict[str, Tensor], images: bool = True) -> dict[str, Tensor]:
    """As TRL's collator does with `messages`."""
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    if not images:
        labels = labels.masked_fill(labels == tiny_model().config.image_token_id, -100)
    return inputs | {"labels": labels}


@contextmanager
def said(*expected: str) -> Iterator[None]:
    """The block warns of exactly these things, in this order."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    texts = [str(warning.message) for warning in caught if "pyramiddrop" in str(warning.message)]
    assert len(texts) == len(expected), texts
    for text, part in zip(texts, expected, strict=True):
        assert part in text


def outcome(model: PreTrainedModel, inputs: dict[str, Any], method: Any = None) -> tuple[Tensor, list[int]]:
    with torch.no_grad(), warnings.catch_warnings(), (method or method_of(HALVES))(model) as trace:
        warnings.simplefilter("ignore")
        return model(**inputs).loss, trace.stages[-1].kept[0].tolist()


# --- Labels of visual tokens ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("logits", ["full", "kept"])
def test_where_everything_is_supervised_the_images_last_token_asks_with_a_warning(logits: str) -> None:
    model = tiny_model()
    inputs = all_supervised(labelled(TURNS))
    asked = torch.zeros_like(inputs["labels"], dtype=torch.bool)
    asked[0, VISUAL.stop - 1] = True
    method = method_of(HALVES, logits=logits)
    text_alone = all_supervised(labelled(TURNS), images=False)
    with torch.no_grad(), method(model, query_mask=asked) as trace:
        expected = model(**text_alone).loss
        kept = trace.stages[-1].kept[0].tolist()
    with torch.no_grad(), said("ranks by visual tokens"), method(model) as trace:
        for _ in range(3):
            loss = model(**inputs).loss
    assert trace.stages[-1].kept[0].tolist() == kept
    assert VISUAL.stop - 1 in kept  # it predicts the first word of text
    assert torch.equal(loss, expected)


def test_labels_of_visual_tokens_change_nothing_beside_those_of_answers() -> None:
    inputs = labelled(TURNS)
    clean = outcome(tiny_model(), inputs)
    inputs["labels"][0, VISUAL] = inputs["input_ids"][0, VISUAL]
    assert outcome(tiny_model(), inputs) == clean
    model = tiny_model()
    with torch.no_grad(), said("ignores labels of visual tokens"), method_of(HALVES)(model):
        model(**inputs)
        model(**inputs)


def test_a_method_that_keeps_all_leaves_labels_and_users_alone() -> None:
    model, inputs = tiny_model(), all_supervised(labelled(TURNS))
    vanilla = model(**inputs).loss
    with said(), PyramidDrop(layers=[2, 4], keep=[1.0, 1.0])(model):
        assert torch.equal(model(**inputs).loss, vanilla)


# --- Labels at padding ----------------------------------------------------------------------------------------------


@pytest.mark.fast_cases(4)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("logits", ["full", "kept"])
@pytest.mark.parametrize("method", ["staged", "front"])
def test_labels_at_padding_are_not_scored(method: str, logits: str, side: str) -> None:
    model = tiny_model()
    inputs = labelled(TURNS, [4, "image", 30, Answer(2)], side=side)
    way = VisionDrop(keep=0.5, logits=logits) if method == "front" else method_of(HALVES, logits=logits)
    clean = outcome(model, inputs, way)
    padding = inputs["attention_mask"] == 0
    inner = padding & torch.nn.functional.pad(padding, (1, 0), value=True)[:, :-1]  # not the first behind the text
    dirty = inputs | {"labels": inputs["labels"].masked_fill(inner, 7)}
    assert outcome(model, dirty, way) == clean


def test_the_first_label_of_a_left_padded_row_is_predicted_by_nothing() -> None:
    """As on the right, where no row stands before it."""
    left, right = (
        outcome(tiny_model(), all_supervised(labelled(TURNS, [4, "image", 30, Answer(2)], side=side), images=False))[0]
        for side in ("left", "right")
    )
    torch.testing.assert_close(left, right)


def test_an_end_token_that_counts_as_padding_is_still_learned() -> None:
    """Where the end token is the padding token too, masks often hide it; the last word's row predicts it."""
    model, inputs = tiny_model(), labelled(TURNS, [4, "image", 30, Answer(2)])
    end = int(inputs["attention_mask"][0].sum())
    with_end = inputs | {"labels": inputs["labels"].clone()}
    with_end["labels"][0, end] = 7
    with torch.no_grad(), method_of(HALVES)(model) as trace:
        logits = model(**inputs).logits
        kept = trace.stages[-1].kept[0].tolist()
        loss = model(**with_end).loss
        assert trace.stages[-1].kept[0].tolist() == kept
    expected = model.loss_function(logits, with_end["labels"], vocab_size=logits.shape[-1])
    torch.testing.assert_close(loss, expected)


def test_labels_at_padding_ask_nothing() -> None:
    model, inputs = tiny_model(), labelled([5, "image", 3], [4, "image", 30, Answer(2)])
    inputs["labels"][0, 24:] = 7
    with torch.no_grad(), method_of(HALVES)(model) as trace:
        model(**inputs)
    assert [len(kept) for kept in trace.stages[-1].kept] == [16, 2]


# --- One warning where nothing is dropped ---------------------------------------------------------------------------


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        ([5, "image", 7], "no label of its text is supervised"),
        ([Answer(3), "image", 4], "supervised from the first token on"),
    ],
)
def test_a_labelled_forward_that_drops_nothing_says_so_once(spec: list[Any], reason: str, training: bool) -> None:
    model, inputs = tiny_model().train(training), labelled(spec)
    with said("drops nothing in this forward"), method_of(HALVES)(model):
        for _ in range(3):
            model(**inputs)
    with said(reason), method_of(HALVES)(model):
        model(**inputs)


def test_other_reasons_for_dropping_nothing() -> None:
    model, inputs = tiny_model().train(), labelled(TURNS)
    nobody = torch.zeros_like(inputs["labels"], dtype=torch.bool)
    with said("query_mask marks no token"), method_of(HALVES)(model, query_mask=nobody):
        model(**inputs)
    with (
        said("so few visual tokens"),
        PyramidDrop(layers=[2], keep=[0.99], per_image=True)(
            model, visual_mask=torch.arange(nobody.shape[1])[None] == 7
        ),
    ):
        model(**inputs)
    with said("it has no labels"), method_of(HALVES)(model):
        for _ in range(2):
            model(**{name: value for name, value in inputs.items() if name != "labels"})


def test_nobody_is_warned_without_a_reason() -> None:
    model = tiny_model().train()
    with said(), method_of(HALVES)(model):
        model(**labelled(TURNS, [9, Answer(3)], [4, "image", 3]))  # one sample asks
        model(**labelled([9, Answer(3)]))  # no image
        model.eval()
        model(**make_batch(model, [TURNS]))  # no labels


# --- A forward that names its arguments -----------------------------------------------------------------------------


class Named(LlavaForConditionalGeneration):  # type: ignore[misc]
    """A user's subclass."""

    def forward(  # type: ignore[override]
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        return_dict: bool = True,
        fail: bool = False,
    ) -> CausalLMOutputWithPast:
        if fail:
            raise RuntimeError("on purpose")
        return super().forward(
            input_ids=input_ids, pixel_values=pixel_values, attention_mask=attention_mask, labels=labels
        )


def named() -> PreTrainedModel:
    model = tiny_model()
    own = Named(model.config)
    own.load_state_dict(model.state_dict())
    return own.eval()


@pytest.mark.fast_cases(4)
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("positional", [False, True])
@pytest.mark.parametrize("reentrant", [None, False, True])
def test_a_subclass_drops_as_transformers_class_does(training: bool, positional: bool, reentrant: bool | None) -> None:
    inputs = labelled(TURNS, [4, "image", 30, Answer(2)])
    losses, kept, gradients = [], [], []
    for model in (tiny_model(), named()):
        model.train(training)
        if reentrant is not None and training:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        names = ("input_ids", "pixel_values", "attention_mask", "labels")
        with said(), method_of(HALVES)(model) as trace:
            loss = model(*(inputs[name] for name in names)).loss if positional and kept else model(**inputs).loss
            loss.backward()
        losses.append(loss.detach())
        kept.append([columns.tolist() for stage in trace.stages for columns in stage.kept])
        gradients.append(model.model.language_model.layers[1].mlp.up_proj.weight.grad)
    assert torch.equal(*losses)
    assert kept[0] == kept[1]
    assert torch.equal(*gradients)


def test_a_subclass_inside_lora_is_called_without_its_call() -> None:
    """PEFT calls `forward` itself: the labels are those of the model around it."""
    peft = pytest.importorskip("peft")
    inputs = labelled(TURNS)
    expected = outcome(tiny_model(), inputs)
    model = peft.get_peft_model(named(), peft.LoraConfig(target_modules=["q_proj"], r=2))
    loss, kept = outcome(model, inputs)
    assert kept == expected[1]
    torch.testing.assert_close(loss, expected[0])


def test_labels_of_a_forward_that_failed_are_forgotten() -> None:
    model, inputs = named(), labelled(TURNS)
    prompt = {name: value for name, value in inputs.items() if name != "labels"}
    with torch.no_grad(), method_of(HALVES)(model) as trace:
        model(**prompt)
        expected = trace.stages[-1].kept[0].tolist()
        with pytest.raises(RuntimeError, match="on purpose"):
            model(**inputs, fail=True)
        model.model(**prompt)
        assert trace.stages[-1].kept[0].tolist() == expected


def test_threads_do_not_see_each_others_labels() -> None:
    model, inputs = named(), labelled(TURNS)
    other = copy.deepcopy(inputs)
    other["labels"] = torch.full_like(other["labels"], -100).index_fill(1, torch.tensor([23]), 7)
    expected = [outcome(model, batch)[0] for batch in (inputs, other)]
    wrong: list[float] = []

    def run(number: int) -> None:
        for _ in range(5):
            loss = model(**(inputs, other)[number]).loss
            if not torch.equal(loss, expected[number]):
                wrong.append(loss.item())

    with torch.no_grad(), method_of(HALVES)(model):
        threads = [threading.Thread(target=run, args=(number,)) for number in (0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert wrong == []


def test_what_a_subclass_cannot_be_told_is_refused() -> None:
    model, inputs = named(), labelled(TURNS)
    with method_of(HALVES, logits="kept")(model), pytest.raises(ValueError, match=r'logits="kept".*Named'):
        model(**inputs)
    with method_of(HALVES)(model), pytest.raises(ValueError, match="Named would score labels of visual tokens"):
        model(**all_supervised(inputs))


def test_labels_that_are_no_tokens_labels_ask_nothing() -> None:
    """A classifier's, say."""

    class Classifier(Named):
        def forward(self, input_ids: Any = None, pixel_values: Any = None, labels: Any = None) -> Any:  # type: ignore
            return LlavaForConditionalGeneration.forward(self, input_ids=input_ids, pixel_values=pixel_values)

    model = Classifier(tiny_model().config).train()
    inputs = collate(make_rows(model, [[4, "image", 3]]))
    del inputs["attention_mask"]
    with said("it has no labels"), method_of(HALVES)(model):
        model(**inputs, labels=torch.tensor([1]))


# --- Labels of some columns alone -----------------------------------------------------------------------------------


def cut_to_the_last(inputs: dict[str, Any]) -> dict[str, Any]:
    """As ms-swift does: the columns from the one that predicts the first answer on."""
    labels = inputs["labels"]
    count = labels.shape[1] - int((labels != -100).int().argmax(-1).min()) + 1
    return inputs | {"labels": labels[:, -count:], "logits_to_keep": count}


def cut_to_a_mask(inputs: dict[str, Any]) -> dict[str, Any]:
    """As ms-swift does with one sample: the columns that predict an answer, and the last one."""
    scored = inputs["labels"][0] != -100
    kept = torch.cat([scored[1:], torch.tensor([True])])
    return inputs | {"labels": pad(inputs["labels"][:, scored], (1, 0), value=-100), "logits_to_keep": kept}


def cut_to_indices(inputs: dict[str, Any]) -> dict[str, Any]:
    cut = cut_to_a_mask(inputs)
    return cut | {"logits_to_keep": cut["logits_to_keep"].nonzero()[:, 0]}


CUTS: list[Any] = [
    (cut_to_the_last, [TURNS, [2, "image", 1, "image", 2, Answer(4)], [4, Answer(2)]]),
    (cut_to_a_mask, [TURNS]),
    (cut_to_indices, [TURNS]),
]


@pytest.mark.fast_cases(3)
@pytest.mark.parametrize("logits", ["auto", "full", "kept"])
@pytest.mark.parametrize(("cut", "specs"), CUTS)
def test_labels_of_some_columns_alone_give_the_loss_of_all(cut: Any, specs: list[Any], logits: str) -> None:
    """Against the reference with the labels of all tokens; the logits are those that were asked for."""
    expected_model, inputs = tiny_model().train(), labelled(*specs)
    expected = reference.train(expected_model, HALVES, inputs)
    expected.loss.backward()
    model, short = tiny_model().train(), cut(inputs)
    with said(), method_of(HALVES, logits=logits)(model) as trace:
        output = model(**short)
        output.loss.backward()
    assert max(trace.lengths) > min(trace.lengths)
    assert output.logits.shape[:2] == short["labels"].shape
    assert output.loss.item() == pytest.approx(expected.loss.item(), rel=1e-5)
    same_gradients(
        {name: one.grad for name, one in model.named_parameters() if one.grad is not None},
        {name: one.grad for name, one in expected_model.named_parameters() if one.grad is not None},
    )


@pytest.mark.parametrize("cut", [cut_to_the_last, cut_to_a_mask])
def test_labels_of_some_columns_at_keep_one(cut: Any) -> None:
    model, inputs = tiny_model().train(), cut(labelled(TURNS))
    vanilla = model(**inputs)
    with PyramidDrop(layers=[2, 4], keep=[1.0, 1.0])(model):
        output = model(**inputs)
    assert torch.equal(output.loss, vanilla.loss)
    assert torch.equal(output.logits, vanilla.logits)


def test_labels_of_visual_tokens_are_ignored_in_some_columns_alone() -> None:
    """The last ten visual tokens and the text behind them are supervised, as if a collator had not masked them."""
    inputs = labelled(TURNS)
    clean = outcome(tiny_model(), cut_to_a_mask(inputs))
    inputs["labels"][0, VISUAL.stop - 10 : VISUAL.stop] = inputs["input_ids"][0, VISUAL.stop - 10 : VISUAL.stop]
    for cut in (cut_to_the_last, cut_to_a_mask):
        loss, kept = outcome(tiny_model(), cut(inputs))
        assert (loss.item(), kept) == (pytest.approx(clean[0].item(), rel=1e-6), clean[1])


def test_labels_that_do_not_fit_the_columns_ask_nothing() -> None:
    model, inputs = tiny_model().train(), labelled(TURNS)
    short = inputs | {"labels": inputs["labels"][:, -6:], "logits_to_keep": 5}
    with said("it has no labels"), method_of(HALVES)(model), pytest.raises(ValueError, match="batch"):
        model(**short)


# --- TRL's own collator ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("answers_alone", [False, True])
def test_trls_collator_of_messages_and_images(answers_alone: bool, training: bool) -> None:
    """It supervises all tokens of `messages`, the image's too: they are dropped all the same, with one warning."""
    pytest.importorskip("trl")
    from PIL import Image
    from transformers import AutoModelForImageTextToText, AutoProcessor
    from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

    folder = digits_checkpoint()
    model = AutoModelForImageTextToText.from_pretrained(folder).train(training)
    picture = Image.open(demo_images()[0])

    def example() -> dict[str, Any]:  # TRL writes into it
        user, answer = {"role": "user", "content": "Read row 6."}, {"role": "assistant", "content": "7 0"}
        talk = {"prompt": [user], "completion": [answer]} if answers_alone else {"messages": [user, answer]}
        return {"images": [picture], **talk}

    collator = DataCollatorForVisionLanguageModeling(
        AutoProcessor.from_pretrained(folder), completion_only_loss=answers_alone
    )
    batch = collator([example(), example()])
    visual = batch["input_ids"] == model.config.image_token_id
    assert bool((batch["labels"][visual] == -100).all()) == answers_alone
    expected = [] if answers_alone else ["ranks by visual tokens in this forward"]
    with said(*expected), PyramidDrop()(model) as trace:
        for _ in range(2):
            loss = model(**batch).loss
    assert trace.lengths[-1] < trace.lengths[0] == batch["input_ids"].shape[1]
    assert bool(loss.isfinite())
