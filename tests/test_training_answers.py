"""Batches: the answers alone are supervised, token by token, whatever the template and however many images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from checkpoints import save_checkpoint
from pyramiddrop.assets import digits_checkpoint
from pyramiddrop.inference.checkpoint import load_processor
from tiny import IMAGE_TOKEN

pytest.importorskip("datasets")

from pyramiddrop.training.collate import IGNORED_LABEL, AnswerCollator
from pyramiddrop.training.samples import BrokenSampleError

HEAD = "{% for m in messages %}{{ m['role'] }} {% for p in m['content'] if p['type'] == 'image' %}<image> {% endfor %}"
WORDS = "{% for p in m['content'] if p['type'] == 'text' %}{{ p['text'] }} {% endfor %}"
PROMPT = "{% if add_generation_prompt %}assistant {% endif %}"
MARKED_WORDS = (
    "{% if m['role'] == 'assistant' %}{% generation %}"
    + WORDS
    + "</s> {% endgeneration %}{% else %}"
    + WORDS
    + "{% endif %}"
)
TEMPLATES = {
    "by prompt": HEAD + WORDS + "{% if m['role'] == 'assistant' %}</s> {% endif %}{% endfor %}" + PROMPT,
    "marked": HEAD + MARKED_WORDS + "{% endfor %}" + PROMPT,
    "with its own <s>": "<s> "
    + HEAD
    + WORDS
    + "{% if m['role'] == 'assistant' %}</s> {% endif %}{% endfor %}"
    + PROMPT,
}
TURNED_ROUND = HEAD + WORDS + "{% endfor %}" + "w9 {{ messages | length }}" + PROMPT


def picture(colour: str = "red") -> Image.Image:
    return Image.new("RGB", (60, 40), colour)


def row(*turns: tuple[str, str], images: int = 0) -> dict[str, Any]:
    """A sample; an `*` before the words of a turn is an image's place."""
    messages = []
    for role, words in turns:
        places: list[dict[str, str]] = [{"type": "image"}] * words.count("*")
        content = [*places, {"type": "text", "text": words.replace("*", "").strip()}]
        messages.append({"role": role, "content": content})
    return {"messages": messages, "images": [picture()] * images}


TALK = row(
    ("system", "w4"),
    ("user", "* w5 w6"),
    ("assistant", "w7 w8"),
    ("user", "** w9"),
    ("assistant", "w10"),
    images=3,
)
TEXT_ONLY = row(("user", "w5"), ("assistant", "w7 w8 w9"))


def collator_of(folder: Path, template: str) -> AnswerCollator:
    processor = load_processor(folder)
    processor.chat_template = template
    return AnswerCollator(processor)


def shown(collator: AnswerCollator, ids: torch.Tensor) -> str:
    """Tokens as words; a run of visual tokens as their number."""
    words: list[str] = []
    for token in ids.tolist():
        if token == IMAGE_TOKEN and words and words[-1].isdecimal():
            words[-1] = str(int(words[-1]) + 1)
        else:
            words.append("1" if token == IMAGE_TOKEN else collator.processor.tokenizer.convert_ids_to_tokens(token))
    return " ".join(words)


@pytest.mark.parametrize("template", TEMPLATES)
def test_the_answers_of_every_turn_and_nothing_else(template: str, llava_folder: Path) -> None:
    """The tiny tokenizer has no word for the roles: they are <unk>."""
    collator = collator_of(llava_folder, TEMPLATES[template])
    batch = collator([TALK, TEXT_ONLY])
    ids, labels = batch["input_ids"], batch["labels"]
    assert shown(collator, ids[0]) == "<s> <unk> w4 <unk> 16 w5 w6 <unk> w7 w8 </s> <unk> 32 w9 <unk> w10 </s>"
    assert shown(collator, ids[1][:8]) == "<s> <unk> w5 <unk> w7 w8 w9 </s>"
    supervised = labels != IGNORED_LABEL
    assert torch.equal(labels[supervised], ids[supervised])
    assert shown(collator, ids[0][supervised[0]]) == "w7 w8 </s> w10 </s>"
    assert shown(collator, ids[1][supervised[1]]) == "w7 w8 w9 </s>"
    assert batch["attention_mask"].sum(1).tolist() == [63, 8]
    assert not supervised[1, 8:].any()  # padding, on the right
    assert batch["pixel_values"].shape[0] == 3


def test_the_query_is_the_token_that_asks_in_inference(llava_folder: Path) -> None:
    """What stands before an answer span in training is the last token of the prompt in inference."""
    collator = collator_of(llava_folder, TEMPLATES["by prompt"])
    batch = collator([TALK])
    first = int((batch["labels"][0] != IGNORED_LABEL).nonzero()[0])
    prompt = collator.processor(
        text=[collator.processor.apply_chat_template(TALK["messages"][:2], add_generation_prompt=True)],
        images=[picture()],
        return_tensors="pt",
    )
    assert torch.equal(batch["input_ids"][0, :first], prompt["input_ids"][0])


def test_the_bundled_template(tmp_path: Path) -> None:
    collator = AnswerCollator(load_processor(digits_checkpoint()))
    talk = row(("user", "*What colour is the 7?"), ("assistant", "red"), ("user", "Read row 2."), ("assistant", "1 2"))
    batch = collator([{**talk, "images": [picture()]}])
    labels = batch["labels"][0]
    decode = collator.processor.tokenizer.convert_ids_to_tokens
    assert decode(labels[labels != IGNORED_LABEL].tolist()) == ["red", "</s>", "1", "2", "</s>"]
    assert decode(batch["input_ids"][0][labels.roll(-1) != IGNORED_LABEL].tolist())[0] == "ASSISTANT:"


def test_tiled_images_of_several_sizes(next_folder: Path) -> None:
    collator = collator_of(next_folder, TEMPLATES["by prompt"])
    talk = {**TALK, "images": [Image.new("RGB", size) for size in ((30, 90), (90, 30), (50, 50))]}
    batch = collator([TEXT_ONLY, talk])
    ids, supervised = batch["input_ids"], batch["labels"] != IGNORED_LABEL
    assert shown(collator, ids[1][supervised[1]]) == "w7 w8 </s> w10 </s>"
    assert batch["image_sizes"].tolist() == [[90, 30], [30, 90], [50, 50]]


def test_a_batch_of_words_alone(llava_folder: Path) -> None:
    collator = collator_of(llava_folder, TEMPLATES["by prompt"])
    batch = collator([TEXT_ONLY, TEXT_ONLY])
    assert set(batch) == {"input_ids", "attention_mask", "labels"}
    assert (batch["labels"] != IGNORED_LABEL).sum(1).tolist() == [4, 4]


def test_an_answer_that_repeats_the_question_is_no_question(llava_folder: Path) -> None:
    """Answers are found where they stand, not by their words."""
    collator = collator_of(llava_folder, TEMPLATES["by prompt"])
    batch = collator([row(("user", "w5 w7"), ("assistant", "w7"), ("user", "w7"), ("assistant", "w5 w7"))])
    columns = (batch["labels"][0] != IGNORED_LABEL).nonzero()[:, 0].tolist()
    assert columns == [5, 6, 10, 11, 12]


def test_a_template_that_writes_earlier_turns_anew_is_refused(llava_folder: Path) -> None:
    with pytest.raises(BrokenSampleError, match="writes earlier turns anew"):
        collator_of(llava_folder, TURNED_ROUND)([TALK])


def test_a_template_that_refuses_a_conversation_says_why(llava_folder: Path) -> None:
    refusing = (
        "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}{% endfor %}"
    )
    with pytest.raises(BrokenSampleError, match="no system"):
        collator_of(llava_folder, refusing)([TALK])


@pytest.mark.parametrize("template", ["by prompt", "marked"])
def test_templates_that_end_their_answers(template: str, llava_folder: Path) -> None:
    ending = TEMPLATES[template]
    assert collator_of(llava_folder, ending).ends_answers
    assert not collator_of(llava_folder, ending.replace("</s> ", "")).ends_answers


def test_a_checkpoint_on_disk_is_enough(tmp_path: Path) -> None:
    collator = AnswerCollator(load_processor(save_checkpoint(tmp_path, chat_template=TEMPLATES["marked"])))
    assert (collator([TEXT_ONLY])["labels"] != IGNORED_LABEL).sum() == 4
