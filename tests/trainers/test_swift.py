"""ms-swift's own `swift sft` and `swift rlhf` with the plug-in, on the bundled checkpoint."""

from __future__ import annotations

import json
import os
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from swift.callbacks import TrainerCallback, callbacks_map
from swift.pipelines import rlhf_main, sft_main
from transformers import AutoModelForImageTextToText

import pyramiddrop
from pyramiddrop import Method, PyramidDrop
from pyramiddrop.assets import digits_checkpoint, digits_images
from pyramiddrop.training import plugins

#: Rows in the four stages: 64, 32, 16 and 8 visual ones, and the text; a batch of two is padded to the longer.
SHORT, LONG = [72, 40, 24, 16], [73, 41, 25, 17]
DROPPED = {1: [SHORT, LONG], 2: [LONG, LONG]}
PLUGIN = Path(plugins.__file__).with_name("ms_swift.py")


class Watch(TrainerCallback):  # type: ignore[misc]
    """Notes the rows that each layer got in each step, and how many columns had labels."""

    lengths: list[list[int]]
    labelled: list[int]
    first: dict[str, Any]
    reference: list[list[int]]

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """The plug-in has put its method on the model before."""
        Watch.lengths, Watch.labelled, Watch.first, Watch.reference = [], [], {}, []
        model = self.trainer.accelerator.unwrap_model(self.trainer.model)
        self.trace = pyramiddrop.trace_of(model)
        model.register_forward_pre_hook(self.note, with_kwargs=True)

    def note(self, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        """The first forward, and the columns of labels in each that has some (a step of `generate` has none)."""
        if kwargs.get("labels") is not None:
            Watch.first = Watch.first or kwargs
            Watch.labelled.append(kwargs["labels"].shape[1])

    def on_step_end(self, *_: Any, **__: Any) -> None:
        Watch.lengths.append(sorted(set(self.trace.lengths), reverse=True))
        if getattr(self.trainer, "ref_model", None) is not None:
            lengths = pyramiddrop.trace_of(self.trainer.ref_model).lengths
            Watch.reference.append(sorted(set(lengths), reverse=True))


callbacks_map["watch"] = Watch


@pytest.fixture(autouse=True)
def method_by_default() -> None:
    """The variable that one test sets is there again in the next, though pytest takes it away."""
    os.environ.pop("PYRAMIDDROP_METHOD", None)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight questions about bundled pictures."""
    images, rows = [str(path) for path in digits_images()], []
    for number in range(8):
        asked, told = f"<image>What digit is at row {number + 1} column 2?", "7 0" if number % 2 else "7"
        turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": told}]
        rows.append({"messages": turns, "images": [images[number % len(images)]]})
    path = tmp_path_factory.mktemp("data") / "train.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def sft(data: Path, output: Path, batch: int, main: Any = sft_main, **changes: Any) -> list[dict[str, Any]]:
    """The log of two steps of `swift sft`, or of another `main`."""
    options = {
        "model": digits_checkpoint(),
        "check_model": False,
        "model_type": "llava1_5_hf",
        "template": "llava1_5_hf",
        "dataset": data,
        "torch_dtype": "float32",
        "output_dir": output,
        "add_version": False,
        "max_steps": 2,
        "per_device_train_batch_size": batch,
        "gradient_accumulation_steps": 1,
        "learning_rate": 1e-3,
        "save_steps": 2,
        "logging_steps": 1,
        "report_to": "none",
        "dataset_shuffle": False,
        "train_dataloader_shuffle": False,
        "dataset_num_proc": 1,
        "dataloader_num_workers": 0,
        "load_from_cache_file": False,
        "external_plugins": PLUGIN,
    } | changes
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    main([*words, "--callbacks", "pyramiddrop", "watch"])
    log = [json.loads(line) for line in (output / "logging.jsonl").read_text().splitlines()]
    return [entry for entry in log if "loss" in entry]


@pytest.mark.parametrize("batch", [1, 2])
def test_full_training(batch: int, data: Path, tmp_path: Path) -> None:
    """Labels are cut to what `logits_to_keep` says, a mask or a count: losses are those of the whole labels."""
    cut = sft(data, tmp_path / "cut", batch, tuner_type="full")
    assert max(Watch.labelled) < 10
    assert Watch.lengths == DROPPED[batch]
    whole = sft(data, tmp_path / "whole", batch, tuner_type="full", use_logits_to_keep=False)
    assert min(Watch.labelled) > 64
    assert Watch.lengths == DROPPED[batch]
    for name in ("loss", "grad_norm"):
        assert [entry[name] for entry in cut] == pytest.approx([entry[name] for entry in whole], rel=1e-4)
    assert cut[0]["loss"] > 0
    folder = tmp_path / "cut" / "checkpoint-2"
    assert Method.from_pretrained(folder) == PyramidDrop()
    before, after = pyramiddrop.load(digits_checkpoint()).state_dict(), pyramiddrop.load(folder).state_dict()
    assert not torch.equal(
        before["model.language_model.layers.0.mlp.up_proj.weight"],
        after["model.language_model.layers.0.mlp.up_proj.weight"],
    )
    assert pyramiddrop.current_method(pyramiddrop.load(folder)) == PyramidDrop()


def test_lora(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a method of the user's choice, which is on the model that its adapters are loaded with."""
    monkeypatch.setenv("PYRAMIDDROP_METHOD", "pyramiddrop:lam=0.4")
    log = sft(data, tmp_path / "lora", 2, tuner_type="lora", lora_rank=4)
    assert len(log) == 2
    assert Watch.lengths == [[73, 34, 19, 13]] * 2
    folder = tmp_path / "lora" / "checkpoint-2"
    assert (folder / "adapter_config.json").exists()
    assert Method.from_pretrained(folder) == PyramidDrop(lam=0.4)
    assert pyramiddrop.current_method(pyramiddrop.load(folder)) == PyramidDrop(lam=0.4)


def test_vanilla(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYRAMIDDROP_METHOD", "vanilla")
    monkeypatch.setattr(Watch, "on_train_begin", lambda *_, **__: None)
    monkeypatch.setattr(Watch, "on_step_end", lambda *_, **__: None)
    assert len(sft(data, tmp_path / "vanilla", 2, tuner_type="full")) == 2
    assert (tmp_path / "vanilla" / "checkpoint-2").exists()
    assert not list(tmp_path.rglob("pyramiddrop.json"))


# --- Preferences ----------------------------------------------------------------------------------------------------


def answer_logps(kwargs: dict[str, Any], lengths: list[int]) -> list[float]:
    """The log-probability of the answer at the end of each row, of so many tokens, asked for one by one with whole
    labels."""
    model = AutoModelForImageTextToText.from_pretrained(digits_checkpoint()).train()
    pyramiddrop.apply(model, PyramidDrop(logits="full"))
    found = []
    for row, length in enumerate(lengths):
        ids = kwargs["input_ids"][row][kwargs["attention_mask"][row].bool()][None]
        labels = torch.full_like(ids, -100)
        labels[:, -length:] = ids[:, -length:]
        with torch.no_grad():
            logits = model(input_ids=ids, labels=labels, pixel_values=kwargs["pixel_values"][row][None]).logits
        scores = logits.log_softmax(-1)[0, -length - 1 : -1].gather(-1, ids[0, -length:, None])
        found.append(float(scores.sum()))
    return found


@pytest.mark.parametrize("tuner", ["full", "lora"])
@pytest.mark.parametrize("cut", [True, False])
def test_dpo(tuner: str, cut: bool, data: Path, tmp_path: Path) -> None:
    """The labels that ms-swift takes out before the forward say who asks, and the reference drops alike."""
    pairs = [json.loads(line) | {"rejected_response": "8 0 1"} for line in data.read_text().splitlines()]
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(map(json.dumps, pairs)))
    changes = {"rlhf_type": "dpo", "tuner_type": tuner, "use_logits_to_keep": cut, "max_steps": 1, "save_steps": 1}
    log = sft(path, tmp_path / "dpo", 2, rlhf_main, **changes)
    rows = [[74, 42, 26, 18]]  # the longest of the answers has two tokens more than the shortest
    assert rows == Watch.lengths
    assert Watch.reference == (rows if tuner == "full" else [])
    assert max(Watch.labelled) < 10 if cut else min(Watch.labelled) > 64
    assert log[0]["loss"] == pytest.approx(0.6931472, abs=1e-6)
    chosen = answer_logps(Watch.first, [2, 3])
    assert log[0]["logps/chosen"] == pytest.approx(sum(chosen) / 2, abs=1e-4)
    assert Method.from_pretrained(tmp_path / "dpo" / "checkpoint-1") == PyramidDrop()


def test_grpo(data: Path, tmp_path: Path) -> None:
    """Generated and scored with the same rows, by the reference as well; the reward sees the picture."""
    pytest.importorskip("msgspec")
    from swift.rewards import ORM, orms

    class Reward(ORM):  # type: ignore[misc]
        def __call__(self, completions: list[str], images: Any, **_: Any) -> list[float]:
            seen.extend(images)
            return [float(number) for number in range(len(completions))]

    seen: list[Any] = []
    orms["seen"] = Reward
    changes = {"rlhf_type": "grpo", "tuner_type": "full", "reward_funcs": "seen", "num_generations": 2, "beta": 0.1}
    short = {"max_completion_length": 6, "use_vllm": False, "max_steps": 1, "save_steps": 1}
    log = sft(data, tmp_path / "grpo", 2, rlhf_main, **changes, **short)
    assert len(seen) == 2
    assert Watch.lengths == Watch.reference
    assert [before - after for before, after in pairwise(Watch.lengths[0])] == [32, 16, 8]
    assert log[0]["kl"] == pytest.approx(0, abs=1e-6)


def test_packing_is_refused_by_swift_itself_without_flash_attention(data: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="requires a flash attention implementation"):
        sft(data, tmp_path / "packed", 2, tuner_type="full", packing=True)
