"""TRL's trainers with a reference model: it drops as the trained model does, or one warning names it."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText

from pyramiddrop import PyramidDrop, VisionDrop, apply
from pyramiddrop.assets import demo_images, digits_checkpoint
from pyramiddrop.inference.checkpoint import load_processor

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # of Transformers and TRL, about their own new names

USER = [{"role": "user", "content": "Read row 6."}]
ANSWERS = [[{"role": "assistant", "content": words}] for words in ("7 0", "3 3 2")]


def new_model() -> Any:
    return AutoModelForImageTextToText.from_pretrained(digits_checkpoint())


def rows(**columns: Any) -> Any:
    with Image.open(demo_images()[0]) as picture:
        image = picture.convert("RGB")
    return datasets.Dataset.from_list([{"images": [image], "prompt": USER, **columns}] * 4)


def arguments(kind: type, folder: Path, **changes: Any) -> Any:
    quiet = {"report_to": [], "save_strategy": "no", "disable_tqdm": True, "logging_steps": 1}
    small = {"max_steps": 1, "per_device_train_batch_size": 2, "use_cpu": True, "bf16": False}
    return kind(str(folder), **({"gradient_checkpointing": False} | quiet | small | changes))


def dpo(model: Any, folder: Path, ref_model: Any = None, **changes: Any) -> Any:
    config = arguments(trl.DPOConfig, folder, max_length=None)
    data = rows(chosen=ANSWERS[0], rejected=ANSWERS[1])
    processor = load_processor(digits_checkpoint())
    return trl.DPOTrainer(model, ref_model, config, train_dataset=data, processing_class=processor, **changes)


def kto(model: Any, folder: Path) -> Any:
    config = arguments(trl.KTOConfig, folder, max_length=None)
    data = datasets.concatenate_datasets([rows(completion=ANSWERS[n], label=n == 0) for n in (0, 1)])
    return trl.KTOTrainer(model, args=config, train_dataset=data, processing_class=load_processor(digits_checkpoint()))


def by_reward(trainer: type, config: type) -> Callable[[Any, Path], Any]:
    def make(model: Any, folder: Path) -> Any:
        changes = {"num_generations": 2, "max_completion_length": 4, "beta": 0.1}
        return trainer(
            model,
            reward_funcs=lambda completions, **_: [float(number) for number in range(len(completions))],
            args=arguments(config, folder, **changes),
            train_dataset=rows(),
            processing_class=load_processor(digits_checkpoint()),
        )

    return make


TRAINERS: dict[str, Callable[[Any, Path], Any]] = {
    "DPOTrainer": dpo,
    "KTOTrainer": kto,
    "GRPOTrainer": by_reward(trl.GRPOTrainer, trl.GRPOConfig),
    "RLOOTrainer": by_reward(trl.RLOOTrainer, trl.RLOOConfig),
}


def train(trainer: Any) -> tuple[float, list[str]]:
    """The loss of the first step, and what was said of the reference model."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.train()
    said = [str(warning.message) for warning in caught if "reference model" in str(warning.message)]
    return trainer.state.log_history[0]["loss"], said


@pytest.mark.fast_cases(2)
@pytest.mark.parametrize("name", TRAINERS)
def test_a_reference_model_without_the_method_is_named(name: str, tmp_path: Path) -> None:
    model = new_model()
    apply(model, PyramidDrop())
    _, said = train(TRAINERS[name](model, tmp_path))
    assert len(said) == 1
    assert f"reference model of {name} does not drop" in said[0]
    assert "pyramiddrop.apply(trainer.ref_model, method)" in said[0]


@pytest.mark.fast_cases(2)
@pytest.mark.parametrize("name", TRAINERS)
def test_the_way_out(name: str, tmp_path: Path) -> None:
    model = new_model()
    apply(model, PyramidDrop())
    trainer = TRAINERS[name](model, tmp_path)
    apply(trainer.ref_model, PyramidDrop())
    loss, said = train(trainer)
    assert said == []
    if name == "DPOTrainer":
        assert loss == pytest.approx(math.log(2), abs=1e-6)


@pytest.mark.parametrize("method", [PyramidDrop(), VisionDrop()])
def test_the_reference_of_adapters_drops_alike(method: Any, tmp_path: Path) -> None:
    """It is the same model with its adapters off."""
    peft = pytest.importorskip("peft")
    model = new_model()
    trace = apply(model, method)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    loss, said = train(dpo(model, tmp_path, peft_config=config))
    assert (loss, said) == (pytest.approx(math.log(2), abs=1e-6), [])
    assert trace.lengths[-1] < trace.visual_tokens[0]


def test_a_reference_that_was_given(tmp_path: Path) -> None:
    """Without a method, or with another one."""
    for number, method in enumerate([None, PyramidDrop(lam=0.4), PyramidDrop()]):
        model, reference = new_model(), new_model()
        apply(model, PyramidDrop())
        if method is not None:
            apply(reference, method)
        _, said = train(dpo(model, tmp_path / str(number), reference))
        assert len(said) == (method != PyramidDrop())


@pytest.mark.fast_cases(2)
@pytest.mark.parametrize("name", TRAINERS)
@pytest.mark.parametrize("method", [PyramidDrop(logits="kept"), VisionDrop(logits="kept")])
def test_kept_logits_are_refused(method: Any, name: str, tmp_path: Path) -> None:
    model = new_model()
    apply(model, method)
    with pytest.raises(ValueError, match=rf'logits="kept" is not supported under {name}, .*; use logits="full"'):
        TRAINERS[name](model, tmp_path).train()


def test_other_trainings_hear_nothing(tmp_path: Path) -> None:
    model = new_model().train()
    apply(model, PyramidDrop(logits="kept"))
    inputs = load_processor(digits_checkpoint())(
        images=[Image.new("RGB", (64, 64))], text="<image> a b c", return_tensors="pt"
    )
    labels = torch.full_like(inputs["input_ids"], -100)
    labels[:, -1] = 5
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(**inputs, labels=labels)


# --- GRPO -----------------------------------------------------------------------------------------------------------


Row = tuple[int, ...]  # the tokens of a prompt and its completion, without padding


class Scored:
    """What GRPOTrainer generates and scores, by row: the kept columns, and the log-probability of each new token."""

    def __init__(self, model: Any, trainer: Any, trace: Any, reference: Any) -> None:
        self.generated: dict[Row, Any] = {}
        self.trained: dict[Row, Any] = {}
        self.reference: dict[Row, Any] = {}
        generate, score = model.generate, trainer._get_per_token_logps_and_entropies
        padding = model.config.pad_token_id

        def note(found: dict[Row, Any], columns: Any, ids: Any, logps: Any) -> None:
            for number, row in enumerate(ids.tolist()):
                tokens = tuple(token for token in row if token != padding)
                new = len([token for token in row[-logps.shape[1] :] if token != padding])
                found[tokens] = ([stage[number] for stage in columns], logps[number, :new].detach())

        def generating(generation_config: Any, **inputs: Any) -> Any:
            generation_config.output_logits = generation_config.return_dict_in_generate = True
            output = generate(**inputs, generation_config=generation_config)
            tokens = output.sequences[:, inputs["input_ids"].shape[1] :]
            logits = torch.stack(output.logits, 1).log_softmax(-1)
            note(self.generated, kept(trace), output.sequences, logits.gather(-1, tokens[..., None])[..., 0])
            return output.sequences

        def scoring(scorer: Any, ids: Any, *rest: Any, **others: Any) -> Any:
            result = score(scorer, ids, *rest, **others)
            if scorer is trainer.ref_model:
                note(self.reference, kept(reference), ids, result[0])
            else:
                note(self.trained, kept(trace), ids, result[0])
            return result

        model.generate, trainer._get_per_token_logps_and_entropies = generating, scoring


def kept(trace: Any) -> list[list[list[int]]]:
    """The picture's tokens that each stage keeps, counted from the picture's first."""
    firsts = [int(columns[0]) for columns in trace.visual_columns]
    return [
        [(columns - first).tolist() for columns, first in zip(stage.kept, firsts, strict=True)]
        for stage in trace.stages
    ]


@pytest.mark.parametrize("alike", [True, False])
def test_grpo_generates_and_trains_with_the_same_rows(alike: bool, tmp_path: Path) -> None:
    """Log-probabilities of training are those of generation, and at the first step, to the bit, the reference's; not so
    for a reference that drops otherwise. Prompts of two lengths; the reward function sees the pictures."""
    model, seen = new_model(), []
    torch.manual_seed(1)
    with torch.no_grad():
        model.model.language_model.norm.weight *= 0.3  # flatter: completions of several tokens
    model.save_pretrained(tmp_path / "start")
    model.config._name_or_path = str(tmp_path / "start")
    trace = apply(model, PyramidDrop())

    def reward(completions: Any, images: Any, **_: Any) -> list[float]:
        seen.extend(images)
        return [float(number) for number in range(len(completions))]

    other = [{"role": "user", "content": "Which digit is red, and at which row?"}]
    trainer = trl.GRPOTrainer(
        model,
        reward_funcs=reward,
        args=arguments(
            trl.GRPOConfig,
            tmp_path,
            num_generations=2,
            max_completion_length=6,
            beta=0.1,
            per_device_train_batch_size=4,
        ),
        train_dataset=datasets.concatenate_datasets([rows(), rows().map(lambda row: {"prompt": other})]),
        processing_class=load_processor(digits_checkpoint()),
    )
    reference = apply(trainer.ref_model, PyramidDrop(lam=0.5 if alike else 0.3))
    found = Scored(model, trainer, trace, reference)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.train()
    assert len(seen) == 4
    assert all(isinstance(pictures[0], Image.Image) for pictures in seen)
    assert found.generated.keys() == found.trained.keys() == found.reference.keys()
    assert max(len(logps) for _, logps in found.generated.values()) > 1
    for row, (columns, logps) in found.trained.items():
        generated, by_reference = found.generated[row], found.reference[row]
        assert columns == generated[0]
        assert torch.allclose(logps, generated[1], atol=1e-5)
        assert (columns == by_reference[0]) == alike
        assert torch.equal(logps, by_reference[1]) == alike
