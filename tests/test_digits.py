"""The digits benchmark, the bundled model, and the script that trained it."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from pyramiddrop.assets import digits_checkpoint, digits_images, digits_questions, handwritten_digits
from pyramiddrop.evaluation.digits import (
    COLOUR_NAMES,
    EMPTY,
    KIND_NAMES,
    SPLITS,
    VARIANTS,
    DigitsBenchmark,
    DigitsSample,
    SceneGenerator,
    answer_text,
    digit_bank,
    draw_questions,
    question_text,
    split_indices,
)

EXAMPLE = Path(__file__).parents[1] / "examples" / "digits"


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The training script's modules can be imported, and are forgotten afterwards."""
    names = {file.stem for file in EXAMPLE.glob("*.py")}
    monkeypatch.syspath_prepend(str(EXAMPLE))
    yield
    for name in names & sys.modules.keys():
        del sys.modules[name]


# The benchmark


def read_off(digits: np.ndarray, colours: np.ndarray, kind: str, question: str) -> list[str]:
    """All answers that a scene gives to a question, read with plain loops from the words of the question."""
    things = [
        (row + 1, column + 1, str(digits[row, column]), COLOUR_NAMES[colours[row, column]])
        for row in range(8)
        for column in range(8)
        if digits[row, column] != EMPTY
    ]
    words = question.strip("?.").split()
    numbers = [int(word) for word in words if word.isdigit()]
    if kind == "digit_at":
        return [digit for row, column, digit, _ in things if [row, column] == numbers]
    if kind == "colour_at":
        return [colour for row, column, _, colour in things if [row, column] == numbers]
    if kind == "colour_of":
        return [colour for _, _, digit, colour in things if digit == words[-1]]
    if kind == "digit_of":
        return [digit for _, _, digit, colour in things if colour == words[-1]]
    if kind == "row_of":
        return [f"row {row}" for row, _, digit, _ in things if digit == words[-2]]
    return [" ".join(digit for row, _, digit, _ in things if row == numbers[0])]


def test_the_splits_share_no_digit_image() -> None:
    sets = [set(split_indices(split)) for split in SPLITS]
    assert sum(map(len, sets)) == len(set.union(*sets)) == 1797
    assert [len(part) for part in sets] == [1397, 200, 200]


def test_the_benchmark_is_the_same_each_time_and_does_not_depend_on_its_length() -> None:
    short, long = list(DigitsBenchmark("val", scenes=1, seed=3)), list(DigitsBenchmark("val", scenes=2, seed=3))
    assert len(DigitsBenchmark("val", scenes=2)) == len(long) == 32
    for a, b in zip(short, long, strict=False):
        assert (a.kind, a.question, a.answer, a.scene) == (b.kind, b.question, b.answer, b.scene)
        assert a.image.tobytes() == b.image.tobytes()
    assert long[0].image.size == (80, 80)


@pytest.mark.parametrize("other", [DigitsBenchmark("test", scenes=1), DigitsBenchmark("val", scenes=1, seed=1)])
def test_another_split_or_seed_is_another_scene(other: DigitsBenchmark) -> None:
    one = next(iter(DigitsBenchmark("val", scenes=1)))
    assert one.image.tobytes() != next(iter(other)).image.tobytes()


@pytest.mark.parametrize("seed", [0, 1])
def test_each_question_has_one_answer_and_it_is_the_given_one(seed: int) -> None:
    benchmark = DigitsBenchmark("test", scenes=12, seed=seed)
    for sample in benchmark:
        scenes, _ = benchmark.arrays(sample.scene)
        assert read_off(scenes.digits[0], scenes.colours[0], sample.kind, sample.question) == [sample.answer]


def test_questions_of_a_scene_differ_and_cover_all_kinds_evenly() -> None:
    samples = list(DigitsBenchmark("test", scenes=30))
    assert len({(sample.scene, sample.question) for sample in samples}) == len(samples)
    counts = Counter(sample.kind for sample in samples)
    assert set(counts) == set(KIND_NAMES)
    assert max(counts.values()) < 1.5 * min(counts.values())


def test_the_training_path_gives_right_answers_too() -> None:
    generator = SceneGenerator("val")
    rng = generator.rng(5)
    scenes = generator.scenes(rng, 4)
    batch = draw_questions(rng, scenes, 24, {"read_row": 3.0}, read_lengths=(1, 2, 3))
    for scene, slot in np.ndindex(*batch.kinds.shape):
        kind = KIND_NAMES[batch.kinds[scene, slot]]
        question = question_text(kind, int(batch.arguments[scene, slot]))
        expected = read_off(scenes.digits[scene], scenes.colours[scene], kind, question)
        assert expected == [answer_text(batch.answers[scene, slot])]


def test_errors_say_what_is_wrong() -> None:
    with pytest.raises(ValueError, match="split='dev' is not one of train, val, test"):
        next(iter(DigitsBenchmark("dev")))
    with pytest.raises(ValueError, match="questions_per_scene=500 is more than"):
        next(iter(DigitsBenchmark("val", questions_per_scene=500)))


def test_the_shipped_digits_are_those_of_scikit_learn() -> None:
    source = pytest.importorskip("sklearn.datasets").load_digits()
    images, labels = handwritten_digits()
    assert np.array_equal(images, source.images)
    assert np.array_equal(labels, source.target)


# The bundled model


def ask(samples: list[DigitsSample], questions: list[str] | None = None) -> list[str]:
    """The bundled model's greedy answers, in one batch."""
    model = AutoModelForImageTextToText.from_pretrained(digits_checkpoint())
    processor = AutoProcessor.from_pretrained(digits_checkpoint())
    prompts = [
        processor.apply_chat_template(
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}],
            add_generation_prompt=True,
        )
        for question in questions or [sample.question for sample in samples]
    ]
    images = [sample.image for sample in samples]
    inputs = processor(images=images, text=prompts, padding=True, return_tensors="pt")
    with torch.inference_mode():
        output = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    return processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def test_the_bundled_model_is_small_and_answers_held_out_questions() -> None:
    assert sum(file.stat().st_size for file in digits_checkpoint().iterdir()) <= 12e6
    samples = list(DigitsBenchmark("test", scenes=6, seed=99))
    right = [answer == sample.answer for answer, sample in zip(ask(samples), samples, strict=True)]
    assert np.mean(right) >= 0.85


def test_case_punctuation_and_small_words_do_not_matter() -> None:
    tokenizer = AutoProcessor.from_pretrained(digits_checkpoint()).tokenizer
    plain = tokenizer.encode("colour 7")
    for question in (
        "What colour is the 7?",
        "what color is the 7",
        "Which COLOUR has the 7 ?",
        "The colour of the 7, please.",
    ):
        assert tokenizer.encode(question) == plain
    assert tokenizer.unk_token_id not in tokenizer.encode("Read row 3. Which digit is at row  2, column 4?")


def test_the_chat_template_speaks_llava() -> None:
    processor = AutoProcessor.from_pretrained(digits_checkpoint())
    turns = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Read row 3."}]},
        {"role": "assistant", "content": [{"type": "text", "text": "1 2"}]},
        {"role": "user", "content": [{"type": "text", "text": "What colour is the 7?"}]},
    ]
    expected = "USER: <image>\nRead row 3. ASSISTANT: 1 2</s>USER: What colour is the 7? ASSISTANT:"
    assert processor.apply_chat_template(turns, add_generation_prompt=True) == expected
    ids = processor.tokenizer.encode(expected)
    assert ids.count(processor.tokenizer.eos_token_id) == 1
    assert ids.count(processor.image_token_id) == 1


def test_the_demo_pictures_have_true_questions() -> None:
    questions = digits_questions()
    assert [image.name for image in digits_images()] == sorted(questions)
    assert len(questions) >= 2
    samples = islice(DigitsBenchmark("test", scenes=len(questions), questions_per_scene=6, seed=2024), 6)
    truth = [{"kind": s.kind, "question": s.question, "answer": s.answer} for s in samples]
    assert questions[digits_images()[0].name] == truth


# The training script


@pytest.mark.usefixtures("example")
def test_the_training_model_equals_its_export() -> None:
    from export import largest_difference, to_hugging_face
    from model import ModelConfig, PackedLlava
    from text import BOS, TOKEN_ID, USER, VOCABULARY

    torch.manual_seed(0)
    config = ModelConfig(len(VOCABULARY), hidden=32, layers=3, heads=2, inner=48, vision_hidden=24, vision_layers=2)
    model = PackedLlava(config, start=[TOKEN_ID[BOS], TOKEN_ID[USER]])
    for parameter in model.parameters():  # norms and biases too
        parameter.data += 0.1 * torch.randn_like(parameter)
    assert largest_difference(model, to_hugging_face(model)) < 1e-4


@pytest.mark.usefixtures("example")
@pytest.mark.parametrize("stop", [1, 2, 4])
def test_a_resumed_training_ends_where_an_unbroken_one_does(
    stop: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from model import ModelConfig
    from text import VOCABULARY
    from train import Recipe, Trainer

    monkeypatch.setitem(VARIANTS, "train", 1)  # few renderings are soon made
    digit_bank.cache_clear()
    recipe = Recipe(align_steps=2, align_scenes=2, steps=4, scenes=2, questions=4)
    config = ModelConfig(len(VOCABULARY), hidden=32, layers=2, heads=2, inner=48, vision_hidden=24, vision_layers=1)
    unbroken = Trainer(recipe, config)
    for _ in range(stop):
        unbroken.advance()
    unbroken.save(tmp_path / "state.pt")
    resumed = Trainer(recipe, config)
    resumed.load(tmp_path / "state.pt")
    while unbroken.step < unbroken.total_steps:
        assert unbroken.advance() == resumed.advance()
    for name, value in unbroken.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name
    digit_bank.cache_clear()


@pytest.mark.usefixtures("example")
def test_the_tables_of_tokens_say_what_the_tokenizer_says() -> None:
    from text import ASSISTANT, IGNORE, VOCABULARY, QuestionTokens, make_tokenizer

    generator = SceneGenerator("val")
    rng = generator.rng(6)
    batch = draw_questions(rng, generator.scenes(rng, 2), 24)
    ids, labels = QuestionTokens()(batch)
    tokenizer = make_tokenizer()
    for scene, slot in np.ndindex(*batch.kinds.shape):
        text = question_text(KIND_NAMES[batch.kinds[scene, slot]], int(batch.arguments[scene, slot]))
        question = tokenizer.encode(f"{text} {ASSISTANT}", add_special_tokens=False)
        answer = [VOCABULARY.index(w) for w in _words(answer_text(batch.answers[scene, slot]))] + [
            tokenizer.eos_token_id
        ]
        whole = question + answer
        assert ids[scene, slot, : len(whole) - 1].tolist() == whole[:-1]
        labelled = labels[scene, slot] != IGNORE
        assert labels[scene, slot, labelled].tolist() == answer
        assert int(labelled.argmax()) == len(question) - 1


def _words(answer: str) -> list[str]:
    return [answer] if answer.startswith("row") else answer.split()
