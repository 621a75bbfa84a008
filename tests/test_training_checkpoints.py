"""The method travels: every way to save a patched model writes it, and a model is loaded with it."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import Trainer, TrainingArguments

import pyramiddrop
from pyramiddrop import FastV, Method, PyramidDrop, apply, remove
from pyramiddrop.hf import attachment_of
from tiny import Answer, collate, make_batch, make_rows, tiny_model

METHOD = PyramidDrop(layers=[2, 5], keep=[0.6, 0.3])
FILE = "pyramiddrop.json"


def saved(folder: Path) -> Method:
    return Method.from_pretrained(folder)


def kept_counts(model: Any) -> list[int]:
    """How many visual tokens each stage keeps of a picture's 16; nothing without a method."""
    attachment = attachment_of(model)
    if attachment is None:
        return []
    with torch.no_grad():
        model(**make_batch(tiny_model(), [[3, "image", 2]]))
    return [len(stage.kept[0]) for stage in attachment.trace.stages]


def test_a_patched_model_saves_its_method(tmp_path: Path) -> None:
    model = tiny_model()
    apply(model, METHOD)
    model.save_pretrained(tmp_path)
    assert saved(tmp_path) == METHOD


def test_a_model_is_loaded_with_its_method_unless_told_otherwise(tmp_path: Path) -> None:
    model = tiny_model()
    apply(model, METHOD)
    model.save_pretrained(tmp_path)
    assert kept_counts(pyramiddrop.load(tmp_path)) == [9, 4]
    assert kept_counts(pyramiddrop.load(tmp_path, None)) == []
    assert kept_counts(pyramiddrop.load(tmp_path, FastV(layer=3, keep=0.5))) == [8]
    with pytest.raises(ValueError, match="got 'vanilla'"):
        pyramiddrop.load(tmp_path, "vanilla")
    (tmp_path / FILE).unlink()
    assert kept_counts(pyramiddrop.load(tmp_path, dtype=torch.float64)) == []


def test_a_model_without_its_method_saves_none(tmp_path: Path) -> None:
    model = tiny_model()
    before = dict(model.__dict__)
    apply(model, METHOD)
    remove(model)
    assert model.__dict__.keys() == before.keys()
    model.save_pretrained(tmp_path / "removed")
    with METHOD(model):
        model.save_pretrained(tmp_path / "lent")
    assert not list(tmp_path.rglob(FILE))


def test_a_deep_copy_saves_itself(tmp_path: Path) -> None:
    model = tiny_model()
    apply(model, METHOD)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.lm_head.weight.fill_(0.5)
    twin.save_pretrained(tmp_path)
    assert saved(tmp_path) == METHOD
    assert bool((pyramiddrop.load(tmp_path).lm_head.weight == 0.5).all())


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    model = tiny_model()
    apply(model, METHOD)
    model.save_pretrained(tmp_path, is_main_process=False)
    assert not (tmp_path / FILE).exists()


@pytest.mark.parametrize("way", ["push_to_hub", "save_pretrained"])
def test_pushed_checkpoints_keep_it(way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pushed: dict[str, Any] = {}

    def upload(self: Any, working_dir: Any, repo_id: str, files_timestamps: dict[str, float], **_: Any) -> None:
        new = {path.name for path in Path(working_dir).iterdir()} - set(files_timestamps)
        pushed.update({"repository": repo_id, "files": new})

    class Hub:
        def create_repo(self, repo_id: str, **_: Any) -> Any:
            return SimpleNamespace(repo_id=repo_id)

    model = tiny_model()
    monkeypatch.setattr(type(model), "_upload_modified_files", upload)
    for module in ("transformers.utils.hub", "transformers.modeling_utils"):
        monkeypatch.setattr(f"{module}.hf_api", Hub)
        monkeypatch.setattr(f"{module}.create_and_tag_model_card", lambda *_, **__: ModelCard(""))
    apply(model, METHOD)
    if way == "push_to_hub":
        model.push_to_hub("me/model")
    else:
        model.save_pretrained(tmp_path / "model", push_to_hub=True, repo_id="me/model")
    assert pushed["repository"] == "me/model"
    assert {FILE, "config.json"} <= pushed["files"]


# --- Trainers and adapters ------------------------------------------------------------------------------------------


def train(model: Any, folder: Path, **options: Any) -> None:
    """Two steps of a Trainer, a checkpoint after each."""
    rows = make_rows(tiny_model(), [[3, "image", 4, Answer(2)], [5, Answer(2)]])
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=2,
        save_steps=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        per_device_train_batch_size=2,
        remove_unused_columns=False,
    )
    trainer = Trainer(
        model,
        arguments,
        train_dataset=[{"row": number} for number in range(2)],
        data_collator=lambda entries: collate([rows[entry["row"]] for entry in entries], "right", labels=True),
        **options,
    )
    trainer.train()
    trainer.save_model()


def test_every_checkpoint_of_a_trainer_has_it(tmp_path: Path) -> None:
    model = tiny_model()
    apply(model, METHOD)
    train(model, tmp_path)
    assert {path.parent.name for path in tmp_path.rglob(FILE)} == {"checkpoint-1", "checkpoint-2", tmp_path.name}
    assert kept_counts(pyramiddrop.load(tmp_path / "checkpoint-1")) == [9, 4]


def lora(model: Any) -> Any:
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))


def test_adapters_and_what_they_are_merged_into(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path / "base")
    base = pyramiddrop.load(tmp_path / "base")
    model = lora(base)
    apply(model, METHOD)
    model.save_pretrained(tmp_path / "adapter")
    assert kept_counts(pyramiddrop.load(tmp_path / "adapter")) == [9, 4]
    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    again = pyramiddrop.load(tmp_path / "merged")
    assert kept_counts(again) == [9, 4]
    inputs = make_batch(base, [[3, "image", 2]])
    adapted = pyramiddrop.load(tmp_path / "adapter")
    with torch.no_grad():
        torch.testing.assert_close(again(**inputs).logits, adapted(**inputs).logits, atol=1e-4, rtol=1e-4)


def test_adapters_that_came_after_the_method(tmp_path: Path) -> None:
    """PEFT wraps a patched model and saves the adapter alone: the trainer's callback writes the file."""
    pytest.importorskip("trl")
    from pyramiddrop.training.trainer import MethodCallback

    model = tiny_model()
    apply(model, METHOD)
    train(lora(model), tmp_path, callbacks=[MethodCallback(METHOD)])
    assert {path.parent.name for path in tmp_path.rglob(FILE)} >= {"checkpoint-1", "checkpoint-2"}
