"""A whole training: what each recipe trains, a run that stopped and went on, and what is said about bad requests."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText, TrainerCallback

from checkpoints import save_checkpoint, save_picture

pytest.importorskip("trl")

from datasets import Dataset
from huggingface_hub import ModelCard

import pyramiddrop
from pyramiddrop import Method, PyramidDrop, VisionDrop
from pyramiddrop.assets import digits_checkpoint, digits_images
from pyramiddrop.hf import attachment_of
from pyramiddrop.inference import InputError
from pyramiddrop.inference.checkpoint import load_processor
from pyramiddrop.schedule import Stage
from pyramiddrop.training.collate import AnswerCollator
from pyramiddrop.training.dataset import LENGTH, with_fillers
from pyramiddrop.training.model_card import TrainingFacts
from pyramiddrop.training.recipes import RECIPES
from pyramiddrop.training.run import TrainOptions, last_whole_checkpoint, prepare_training
from pyramiddrop.training.trainer import AnswerCheck, ConversationTrainer, SeededLengths

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # of Transformers, about its own new names

TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }} {% for p in m['content'] if p['type'] == 'image' %}<image> {% endfor %}"
    "{% for p in m['content'] if p['type'] == 'text' %}{{ p['text'] }} {% endfor %}"
    "{% if m['role'] == 'assistant' %}</s> {% endif %}{% endfor %}{% if add_generation_prompt %}assistant {% endif %}"
)


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose template ends its answers."""
    return save_checkpoint(tmp_path_factory.mktemp("start"), chat_template=TEMPLATE)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve samples of different lengths: with one picture, with two, and with none."""
    folder = tmp_path_factory.mktemp("data")
    save_picture(folder / "a.png")
    save_picture(folder / "b.png", 40, 90)
    records: list[dict[str, Any]] = []
    for number in range(12):
        images = ["a.png", "b.png"][: number % 3]
        question = "<image>" * len(images) + "\n" + " ".join(f"w{10 + number + word}" for word in range(2 + number))
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": f"w{30 + number} w{31 + number}"}]
        records.append({"conversations": turns} | ({"image": images} if images else {}))
    path = folder / "train.json"
    path.write_text(json.dumps(records))
    return path


@pytest.fixture
def options(start: Path, data: Path, tmp_path: Path) -> TrainOptions:
    return TrainOptions(
        model=str(start),
        data=str(data),
        output=tmp_path / "out",
        method="pyramiddrop:layers=2/4/6,keep=0.5/0.25/0.125",
        epochs=2,
        batch=4,
        device_batch=2,
        learning_rate=1e-3,
        log_every=1,
    )


def moved(before: Path, after: Any) -> set[str]:
    """The parts of the model whose weights are not what they were."""
    old = AutoModelForImageTextToText.from_pretrained(before).state_dict()
    names = [name for name, value in after.state_dict().items() if not torch.equal(value, old[name])]
    return {"head" if name.startswith("lm_head") else name.split(".")[1] for name in names}


PARTS = {
    "projector": {"multi_modal_projector"},
    "all": {"multi_modal_projector", "language_model", "head"},
    "lora": {"multi_modal_projector", "language_model"},
}


@pytest.mark.fast_cases(2)
@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes(recipe: str, options: TrainOptions, start: Path) -> None:
    """What is trained; and the folder holds a whole model with its processor, method and log."""
    job = prepare_training(replace(options, recipe=recipe, steps=2))
    figures = job.run()
    out = options.output
    trained = pyramiddrop.load(out)
    assert moved(start, trained) == PARTS[recipe]
    method = PyramidDrop(layers=[2, 4, 6], keep=[0.5, 0.25, 0.125], logits="kept")
    assert Method.from_pretrained(out) == job.method == method
    assert attachment_of(trained) is not None
    assert figures["train_loss"] > 0
    log = [entry for entry in job.trainer.state.log_history if "loss" in entry]
    assert all({"loss", "mean_token_accuracy", "train_tokens_per_second"} <= entry.keys() for entry in log)
    assert len(log) == 2
    assert {"processor_config.json", "trainer_state.json"} <= {path.name for path in out.iterdir()}
    assert list(out.rglob("events.out.tfevents.*"))


@pytest.mark.fast_cases(1)
@pytest.mark.parametrize("recipe", RECIPES)
def test_what_is_trained_is_in_full_precision(recipe: str, options: TrainOptions) -> None:
    """A step of 1e-3 is less than bfloat16 can tell apart: trained weights would stand still."""
    job = prepare_training(replace(options, recipe=recipe, dtype="bfloat16", steps=1))
    kinds = {parameter.dtype for parameter in job.trainer.model.parameters() if parameter.requires_grad}
    frozen = {parameter.dtype for parameter in job.trainer.model.parameters() if not parameter.requires_grad}
    assert (kinds, frozen) == ({torch.float32}, {torch.bfloat16})
    assert job.run()["train_loss"] > 0


@pytest.mark.fast_cases(1)
@pytest.mark.parametrize(
    ("method", "said", "unsaid"),
    [
        (
            "pyramiddrop:lam=0.6",
            ["PyramidDrop (arXiv 2410.17247)", "0.6 of them from layer 2 on", "PyramidDrop(logits='kept', lam=0.6)"],
            ["None"],
        ),
        (
            "vision:keep=0.5 | pyramiddrop:lam=0.6",
            [
                "VisionDrop (after VisionZip, arXiv 2412.04467), then PyramidDrop (arXiv 2410.17247)",
                "keeps 0.5 of them from layer 0 on, 0.3 of them from layer 2 on",
                "apply(model, VisionDrop(logits='kept') | PyramidDrop(logits='kept', lam=0.6))",
            ],
            ["None"],
        ),
        ("vanilla", ["trained with all of them", "Transformers alone loads it"], ["PyramidDrop("]),
    ],
)
def test_the_model_card(
    method: str, said: list[str], unsaid: list[str], options: TrainOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is true of checkpoints, too; its code runs."""
    prepare_training(replace(options, method=method, steps=3, save_every=2)).run()
    card = ModelCard.load(options.output / "README.md")
    assert card.data.pipeline_tag == "image-text-to-text"
    assert (card.data.base_model, card.data.license) == (None, None)  # a folder is no name on the hub
    trained = (
        "12 conversations of `",
        "3 steps of 4 conversations",
        "rate of 0.001 and seed 0",
        "but those of the vision",
    )
    for words in (*said, *trained, f"The model in `{options.model}`"):
        assert words in card.text
    assert not any(words in card.text.replace('", None)', "") for words in unsaid)
    monkeypatch.chdir(options.output.parent)
    first, *further = re.findall("```python\n(.*?)```", card.text, flags=re.DOTALL)
    names: dict[str, Any] = {}
    exec(first, names)
    assert (attachment_of(names["model"]) is None) == (method == "vanilla")
    for code in further:
        pyramiddrop.remove(names["model"])
        exec(code, names)
        assert attachment_of(names["model"]) is not None


def test_the_card_of_a_model_on_the_hub() -> None:
    facts = TrainingFacts("some/model", "some/data", 7, "lora", 128, 2e-4, 3, VisionDrop(keep=0.25), (Stage(0, 0.25),))
    card = facts.card("mine", 9)
    assert card.data.base_model == "some/model"
    assert "[some/model](https://huggingface.co/some/model)" in card.text
    assert "VisionDrop(keep=0.25)" in card.text
    assert "keeps 0.25 of them from layer 0 on" in card.text


def test_vanilla(options: TrainOptions) -> None:
    job = prepare_training(replace(options, method="vanilla", steps=1))
    assert attachment_of(job.trainer.model) is None
    job.run()
    assert not list(options.output.rglob("pyramiddrop.json"))


def test_a_trained_model_is_trained_on_with_its_method(options: TrainOptions, tmp_path: Path) -> None:
    prepare_training(replace(options, steps=1)).run()
    again = replace(options, model=str(options.output), output=tmp_path / "again", method=None, steps=1)
    assert prepare_training(again).method == Method.from_pretrained(options.output)


def test_batches_hold_samples_of_like_length(options: TrainOptions) -> None:
    """What a step sees together is sorted; the order is the seed's, another one in each epoch."""
    sampler = SeededLengths(4, [5, 1, 9, 2, 8, 3, 7, 4, 6, 1, 2, 9] * 20, seed=3)
    orders = []
    for epoch in (0, 1, 0):
        sampler.set_epoch(epoch)
        torch.manual_seed(epoch)  # what else is random does not matter
        orders.append(list(sampler))
    assert orders[0] == orders[2] != orders[1]
    assert sorted(orders[0]) == list(range(240))
    spread = [
        max(sampler.lengths[i] for i in part) - min(sampler.lengths[i] for i in part) for part in batches(orders[0])
    ]
    assert sum(spread) / len(spread) < 1.5


def batches(order: list[int]) -> list[list[int]]:
    return [order[start : start + 4] for start in range(0, len(order), 4)]


@pytest.mark.parametrize("samples", [1, 5, 8, 11])
@pytest.mark.parametrize("ranks", [2, 3])
def test_accelerate_gives_each_sample_to_one_rank(samples: int, ranks: int, start: Path) -> None:
    """It repeats an epoch's first samples where the last batch is not full for all ranks; fillers make it full."""
    from accelerate.data_loader import prepare_data_loader

    collator = AnswerCollator(load_processor(start))
    part = {"type": "text", "text": "w5"}
    turns = [{"role": role, "content": [part]} for role in ("user", "assistant")]
    rows = {"messages": [turns] * samples, "images": [[]] * samples, LENGTH: [3 + n % 4 for n in range(samples)]}
    table = with_fillers(Dataset.from_dict(rows), 2 * ranks)
    assert table[:samples] == rows
    seen: list[int] = []
    for rank in range(ranks):
        sampler = SeededLengths(2 * ranks, table[LENGTH][:], seed=3)
        loader = torch.utils.data.DataLoader(range(len(table)), batch_size=2, sampler=sampler)
        shard = prepare_data_loader(loader, num_processes=ranks, process_index=rank, use_seedable_sampler=False)
        seen += [int(index) for batch in shard.batch_sampler for index in batch]
    assert sorted(seen) == list(range(len(table)))
    fillers = [table[index] for index in range(samples, len(table))]
    assert len(fillers) == -samples % (2 * ranks)
    assert not fillers or bool((collator(fillers)["labels"] == -100).all())


# --- Stopped and resumed --------------------------------------------------------------------------------------------


class Stop(TrainerCallback):
    """Pulls the plug after a step, before anything of it is saved."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


def curve(job: Any) -> list[tuple[float, ...]]:
    log = [entry for entry in job.trainer.state.log_history if "loss" in entry]
    return [(entry["step"], entry["loss"], entry["grad_norm"], entry["learning_rate"]) for entry in log]


@pytest.mark.fast_cases(1)
@pytest.mark.parametrize("recipe", ["all", "lora"])
def test_a_run_that_was_stopped_ends_as_one_that_was_not(recipe: str, options: TrainOptions, tmp_path: Path) -> None:
    """Stopped in the second epoch; the last checkpoint was torn. LoRA's dropout draws on as well."""
    options = replace(options, recipe=recipe, save_every=1)
    whole = prepare_training(replace(options, output=tmp_path / "whole"))
    whole.run()
    stopped = prepare_training(options)
    stopped.trainer.add_callback(Stop(6))
    with pytest.raises(KeyboardInterrupt):
        stopped.run()
    (options.output / "checkpoint-5" / "trainer_state.json").unlink()
    assert last_whole_checkpoint(options.output) == str(options.output / "checkpoint-4")
    torch.manual_seed(99)
    resumed = prepare_training(replace(options, resume=True))
    resumed.run()
    assert curve(resumed) == curve(whole)
    assert len(curve(whole)) == 6
    seen = [entry["num_input_tokens_seen"] for entry in whole.trainer.state.log_history if "loss" in entry]
    sizes = [after - before for before, after in pairwise([0, *seen])]
    assert sizes[:3] != sizes[3:]  # the epochs have orders of their own, or the stop would prove little
    one, two = (pyramiddrop.load(folder, None).state_dict() for folder in (tmp_path / "whole", options.output))
    assert all(torch.equal(value, two[name]) for name, value in one.items())


@pytest.mark.slow
def test_the_command_survives_a_kill(options: TrainOptions, tmp_path: Path) -> None:
    def command(folder: Path, *more: str) -> list[str]:
        settings = ["--model", options.model, "--data", options.data, "--output", str(folder), "--save-every", "2"]
        size = ["--batch", "4", "--device-batch", "2", "--epochs", "8", "--log-every", "1", "--learning-rate", "1e-3"]
        return [sys.executable, "-m", "pyramiddrop", "train", *settings, *size, *more]

    subprocess.run(command(tmp_path / "whole"), check=True, capture_output=True)
    killed = subprocess.Popen(
        command(options.output), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    while last_whole_checkpoint(options.output) is None and killed.poll() is None:
        time.sleep(0.05)
    os.killpg(killed.pid, signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    subprocess.run(command(options.output, "--resume"), check=True, capture_output=True)
    curves = []
    for folder in (tmp_path / "whole", options.output):
        log = json.loads((folder / "trainer_state.json").read_text())["log_history"]
        curves.append([(entry["step"], entry["loss"]) for entry in log if "loss" in entry])
    assert curves[0] == curves[1]
    assert len(curves[0]) == 24


# --- Evaluated while training ---------------------------------------------------------------------------------------


@pytest.fixture
def other_answers(data: Path) -> Path:
    """The same questions with other answers: what is learned from `data` makes their loss grow."""
    records = json.loads(data.read_text())
    for number, record in enumerate(records):
        record["conversations"][1]["value"] = f"w{60 + number} w{61 + number}"
    path = data.with_name("eval.json")
    path.write_text(json.dumps(records))
    return path


@pytest.mark.fast_cases(2)
@pytest.mark.parametrize("recipe", ["all", "projector"])
def test_the_best_weights_are_those_at_the_end(
    recipe: str, options: TrainOptions, other_answers: Path, tmp_path: Path
) -> None:
    """They are, to the bit, those of a training that ends at the best step."""
    options = replace(options, recipe=recipe, lr_schedule="constant", warmup=0, learning_rate=0.02, steps=5)
    job = prepare_training(replace(options, eval_data=str(other_answers), eval_every=1))
    figures = job.run()
    losses = {e["step"]: e["eval_loss"] for e in job.trainer.state.log_history if "eval_loss" in e}
    best = min(losses, key=lambda step: losses[step])
    assert (len(losses), figures["best_step"], figures["best_eval_loss"]) == (5, best, losses[best])
    assert best < 5  # or nothing would show that they are loaded
    assert [path.name for path in options.output.glob("checkpoint-*")] == [f"checkpoint-{best}"]
    short = prepare_training(replace(options, output=tmp_path / "short", steps=best))
    short.run()
    one, two = (pyramiddrop.load(folder, None).state_dict() for folder in (options.output, tmp_path / "short"))
    assert all(torch.equal(value, two[name]) for name, value in one.items())
    assert short.trainer.evaluate(short.trainer.train_dataset)["eval_loss"] != pytest.approx(losses[best], rel=0.01)
    assert short.trainer.evaluate(job.trainer.eval_dataset)["eval_loss"] == pytest.approx(losses[best], rel=1e-5)


def test_the_best_adapters_are_those_at_the_end(options: TrainOptions, other_answers: Path, start: Path) -> None:
    from peft import PeftModel

    job = prepare_training(
        replace(
            options,
            recipe="lora",
            lora_rank=4,
            eval_data=str(other_answers),
            eval_every=1,
            learning_rate=0.05,
            lr_schedule="constant",
            weight_decay=0.1,
            steps=4,
        )
    )
    best = job.run()["best_step"]
    assert best < 4
    base = AutoModelForImageTextToText.from_pretrained(start)
    expected = PeftModel.from_pretrained(base, options.output / f"checkpoint-{best}").merge_and_unload().state_dict()
    found = pyramiddrop.load(options.output, None).state_dict()
    assert all(torch.equal(value, found[name]) for name, value in expected.items())
    settings = json.loads((options.output / f"checkpoint-{best}" / "adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"]) == (4, 8)
    assert (job.trainer.args.weight_decay, job.trainer.optimizer.param_groups[0]["weight_decay"]) == (0.1, 0.1)


def asked_alone(folder: Path, records: list[dict[str, Any]], method: Method) -> list[str]:
    """The last answer of each conversation, one by one, by Transformers' own template and `generate`."""
    processor = load_processor(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder)
    texts = []
    for record in records:
        turns = [
            {"role": turn["role"], "content": [{"type": "text", "text": turn["content"].removeprefix("<image>")}]}
            for turn in record["messages"][:-1]
        ]
        if "images" in record:
            turns[0]["content"].insert(0, {"type": "image", "path": record["images"][0]})
        made = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
        inputs = processor.apply_chat_template(turns, **made)
        with torch.no_grad(), method(model):
            ids = model.generate(**inputs, max_new_tokens=20, do_sample=False)
        texts.append(processor.tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
    return [text.strip() for text in texts]


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six conversations about bundled pictures: every other answer is the one that the digits model gives."""
    images = [str(path) for path in digits_images()]
    records: list[dict[str, Any]] = []
    for number in range(6):
        turns = [f"<image>Read row {number + 1}.", "7 0", "Read row 1 again, and then all of the others.", "3 3 2"]
        roles = ("user", "assistant", "user", "assistant")
        messages = [{"role": role, "content": words} for role, words in zip(roles, turns, strict=True)]
        records.append({"messages": messages[: 2 + 2 * (number == 2)], "images": [images[number % len(images)]]})
    records[4] = {"messages": [{"role": "user", "content": "Which digit?"}, {"role": "assistant", "content": "1"}]}
    told = asked_alone(digits_checkpoint(), records, PyramidDrop(lam=0.4))
    for number, record in enumerate(records):
        record["messages"][-1]["content"] = f"{told[number].upper()}." if number % 2 else f"{told[number]} more"
    path = tmp_path_factory.mktemp("questions") / "eval.json"
    path.write_text(json.dumps(records))
    return path


def test_answers_are_generated_and_counted(options: TrainOptions, questions: Path) -> None:
    """In batches and by ranks they are those that Transformers generates for each sample alone, under the method."""
    options = replace(options, model=str(digits_checkpoint()), data=str(questions), method="pyramiddrop:lam=0.4")
    still = replace(
        options, eval_data=str(questions), eval_every=1, learning_rate=0.0, steps=2, batch=2, device_batch=2
    )
    job = prepare_training(replace(still, eval_answers=6))
    job.run()
    assert [e["eval_exact_match"] for e in job.trainer.state.log_history if "eval_loss" in e] == [0.5, 0.5]
    check, model = job.trainer.check, job.trainer.model
    assert check is not None
    expected = asked_alone(digits_checkpoint(), json.loads(questions.read_text()), PyramidDrop(lam=0.4))
    assert check.answers(model.train()) == expected
    assert len(set(expected)) > 2
    assert model.training
    parts = [check.exact_match(model, rank, 4, lambda right: right) for rank in range(4)]
    assert sum(parts) == pytest.approx(0.5)
    few = AnswerCheck(job.trainer.eval_dataset, AnswerCollator(load_processor(digits_checkpoint())), 3, batch=2)
    assert few.answers(model) == expected[::2]


@pytest.mark.fast_cases(1)
@pytest.mark.parametrize("recipe", ["lora", "all"])
def test_answers_leave_training_as_it_is(
    recipe: str, options: TrainOptions, other_answers: Path, tmp_path: Path
) -> None:
    """To the bit, though LoRA's dropout draws in each step, and a score draws at random."""
    options = replace(options, recipe=recipe, method="random", steps=3, save_every=None)
    plain = prepare_training(options)
    plain.run()
    asked = replace(options, output=tmp_path / "asked", eval_data=str(other_answers), eval_every=1, eval_answers=5)
    job = prepare_training(replace(asked, save_every=1))
    job.trainer.args.load_best_model_at_end = False
    job.run()
    shares = [entry["eval_exact_match"] for entry in job.trainer.state.log_history if "eval_loss" in entry]
    assert len(shares) == 3
    assert curve(job) == curve(plain)
    one, two = (pyramiddrop.load(folder, None).state_dict() for folder in (options.output, tmp_path / "asked"))
    assert all(torch.equal(value, two[name]) for name, value in one.items())


@pytest.mark.slow
def test_the_best_by_right_answers(options: TrainOptions, other_answers: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shares = iter((0.2, 0.8, 0.8, 0.4))
    monkeypatch.setattr(AnswerCheck, "exact_match", lambda *_: next(shares))
    asked = replace(options, eval_data=str(other_answers), eval_every=1, eval_answers=5, best_by="exact_match", steps=4)
    figures = prepare_training(asked).run()
    assert (figures["best_step"], figures["best_eval_exact_match"]) == (2, 0.8)
    assert [path.name for path in options.output.glob("checkpoint-*")] == ["checkpoint-2"]


def test_sharded_weights_do_not_answer(options: TrainOptions, other_answers: Path, monkeypatch: Any) -> None:
    def sharded(self: Any, *args: Any, **kwargs: Any) -> None:
        made(self, *args, **kwargs)
        self.is_fsdp_enabled = True

    made = ConversationTrainer.__init__
    monkeypatch.setattr(ConversationTrainer, "__init__", sharded)
    with pytest.raises(InputError, match="--eval-answers 5 is not supported where weights are sharded"):
        prepare_training(replace(options, eval_data=str(other_answers), eval_every=1, eval_answers=5))


# --- λ that changes over the steps ----------------------------------------------------------------------------------


class Kept(TrainerCallback):
    """Notes λ and how many rows the last layer got in each step; asks nothing in evaluations."""

    def __init__(self, model: Any) -> None:
        self.model, self.lams, self.counts = model, [], []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.lams.append(pyramiddrop.current_method(self.model).lam)
        self.counts.append([int(one.numel()) for one in pyramiddrop.trace_of(self.model).stages[-1].kept])


def test_lam_changes_over_the_steps(options: TrainOptions, other_answers: Path) -> None:
    """By the rule, in what is dropped, and what is evaluated and saved has the last one."""
    options = replace(options, method="pyramiddrop:lam=0.5", first_lam=1.0, epochs=2, batch=2)
    job = prepare_training(replace(options, eval_data=str(other_answers), eval_every=5))
    model, evaluated = job.trainer.model, []
    kept = Kept(model)
    job.trainer.add_callback(kept)
    evaluating = job.trainer.prediction_step

    def noting(*args: Any, **kwargs: Any) -> Any:
        evaluated.append(pyramiddrop.current_method(model).lam)
        return evaluating(*args, **kwargs)

    job.trainer.prediction_step = noting
    job.run()
    assert kept.lams == [round(1 - 0.5 * step / 11, 2) for step in range(12)]
    for lam, counts in zip(kept.lams, kept.counts, strict=True):
        assert all(count in {0, int(16 * lam**3), int(32 * lam**3)} for count in counts)
    assert max(kept.counts[0]) >= 16 > max(kept.counts[-1]) > 0
    assert set(evaluated) == {0.5}
    saved = [Method.from_pretrained(folder) for folder in (options.output, *options.output.glob("checkpoint-*"))]
    assert len(saved) > 1
    assert set(saved) == {PyramidDrop(lam=0.5, logits="kept")}
    assert "λ began at 1 and went to this" in ModelCard.load(options.output / "README.md").text


# --- What is refused, and what is said ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"recipe": "some"}, "recipe 'some' is not one of projector, all, lora"),
        ({"batch": 3}, "--batch 3 is no multiple of 2 samples on each of 1 devices"),
        ({"method": "pyramiddrop:layers=9,keep=0.5"}, "layers must be in 1..7"),
        ({"method": "some"}, "method 'some' is not one of"),
        ({"data": "missing.json"}, "no such file: missing.json"),
        ({"model": "./nowhere"}, "no such folder"),
        ({"resume": True}, "nothing to resume"),
        ({"chat_template": Path("missing.jinja")}, "cannot read missing.jinja"),
        ({"eval_data": "a.json"}, "--eval-data and --eval-every go together"),
        ({"eval_data": "a.json", "eval_every": 2, "save_every": 4}, "--save-every 4 must be --eval-every 2"),
        ({"eval_data": "gone.json", "eval_every": 2}, "no such file: gone.json"),
        ({"eval_answers": 5}, "--eval-answers 5 needs --eval-data"),
        ({"best_by": "luck"}, "--best-by 'luck' is not one of loss, exact_match"),
        ({"best_by": "exact_match"}, "--best-by exact_match needs answers; give --eval-answers N"),
        ({"report_to": ["papers"]}, "--report-to papers is not installed"),
        ({"lr_schedule": "steep"}, "--lr-schedule 'steep' is not one of linear, cosine"),
        ({"first_lam": 0.9}, r"--lam 0.9:... changes λ over the steps, and PyramidDrop\(layers="),
        ({"first_lam": 1.5, "method": "random"}, r"λ of the first step must be in \(0, 1\]; got 1.5"),
        ({"first_lam": 1.0, "method": "fastv"}, r"and FastV\(\) has no λ; give a pyramiddrop, random or uniform"),
        ({"max_length": 10}, r"train\.json\[1\]: .* more than --max-length 10"),
    ],
)
def test_requests_that_cannot_be_met(changes: dict[str, Any], reason: str, options: TrainOptions) -> None:
    with pytest.raises(InputError, match=reason):
        prepare_training(replace(options, **changes))


def test_checkpoints_are_not_written_over(options: TrainOptions) -> None:
    prepare_training(replace(options, steps=1, save_every=1)).run()
    with pytest.raises(InputError, match="holds checkpoints already; give --resume"):
        prepare_training(options)


def test_a_checkpoint_without_a_template(options: TrainOptions, llava_folder: Path, tmp_path: Path) -> None:
    bare = save_checkpoint(tmp_path / "bare", chat_template=None)
    with pytest.raises(InputError, match="has no chat template; give one: --chat-template FILE"):
        prepare_training(replace(options, model=str(bare)))
    (tmp_path / "given.jinja").write_text(TEMPLATE)
    job = prepare_training(replace(options, model=str(bare), chat_template=tmp_path / "given.jinja"))
    assert job.remarks == []
    unending = prepare_training(replace(options, model=str(llava_folder), output=tmp_path / "other"))
    assert "will not learn to stop" in unending.remarks[0]


def test_broken_samples_are_listed(options: TrainOptions, data: Path, tmp_path: Path) -> None:
    shutil.copytree(data.parent, tmp_path / "data")
    path = tmp_path / "data" / "train.json"
    records = json.loads(path.read_text())
    records[5]["image"] = ["gone.png", "a.png"]
    path.write_text(json.dumps(records))
    job = prepare_training(replace(options, data=str(path), skip_broken=True))
    assert (job.report.good, len(job.report.broken)) == (11, 1)
    assert job.broken_list.read_text().startswith("train.json[5]: no such picture")
