"""Any trainer, one result: after some steps the weights are those that the slow reference's gradients lead to."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer, TrainingArguments

import reference
from checks import HALVES, method_of
from pyramiddrop import apply
from tiny import Answer, collate, make_rows, tiny_model

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")
accelerate = pytest.importorskip("accelerate")

TURNS = [3, "image", 4, Answer(3), 5, Answer(2)]
SPECS: list[list[Any]] = [
    TURNS,
    [2, "image", 1, "image", 2, Answer(4)],
    [6, "image", 3, Answer(1)],
    [4, Answer(2)],
    [1, "image", 9, Answer(5)],
    TURNS,
    [5, Answer(3)],
    [2, "image", 2, Answer(1), 2, Answer(1)],
]
BATCH, ACCUMULATED, RATE = 2, 2, 0.05

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # of Transformers, about its own new names


class Rows:
    """The samples as a table, which trainers want, and as the batches that they make of it."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.rows = make_rows(model, SPECS)
        self.table = datasets.Dataset.from_dict({"images": [0] * len(SPECS), "number": list(range(len(SPECS)))})

    def collate(self, entries: list[dict[str, Any]]) -> dict[str, Tensor]:
        return collate([self.rows[entry["number"]] for entry in entries], "right", labels=True)

    def steps(self) -> list[dict[str, Tensor]]:
        """All that one step of the optimizer sees, as one batch."""
        size = BATCH * ACCUMULATED
        return [self.collate([{"number": n} for n in range(i, i + size)]) for i in range(0, len(SPECS), size)]


def arguments(kind: type, folder: Path, **changes: Any) -> Any:
    return kind(
        output_dir=str(folder),
        max_steps=len(SPECS) // (BATCH * ACCUMULATED),
        per_device_train_batch_size=BATCH,
        gradient_accumulation_steps=ACCUMULATED,
        learning_rate=RATE,
        lr_scheduler_type="constant",
        optim="sgd",
        max_grad_norm=0.0,
        train_sampling_strategy="sequential",
        remove_unused_columns=False,
        report_to=[],
        logging_steps=1,
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        **({"bf16": False, "gradient_checkpointing": False} | changes),
    )


def by_reference(model: PreTrainedModel, rows: Rows, dropping: bool = True) -> list[float]:
    """Plain SGD on the gradients of the reference, or of the untouched model; returns each step's loss."""
    losses = []
    for inputs in rows.steps():
        model.zero_grad()
        loss = reference.train(model, HALVES, inputs).loss if dropping else model(**inputs).loss
        loss.backward()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter -= RATE * parameter.grad
        losses.append(loss.item())
    return losses


def by_loop(model: PreTrainedModel, rows: Rows, folder: Path, **changes: Any) -> list[float]:
    """What anyone would write."""
    if changes.get("gradient_checkpointing"):
        model.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer, losses = torch.optim.SGD(model.parameters(), lr=RATE), []
    for step in range(len(SPECS) // (BATCH * ACCUMULATED)):
        parts = [[{"number": 4 * step + 2 * part + n} for n in range(BATCH)] for part in range(ACCUMULATED)]
        batches = [rows.collate(part) for part in parts]
        count = sum((batch["labels"][:, 1:] != -100).sum() for batch in batches)
        total = 0.0
        for batch in batches:
            loss = model(**batch, num_items_in_batch=count).loss
            loss.backward()
            total += loss.item()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return losses


def by_accelerate(model: PreTrainedModel, rows: Rows, folder: Path, **changes: Any) -> list[float]:
    """accelerate's loop, as its documentation writes it, with its accumulation."""
    if changes.get("gradient_checkpointing"):
        model.gradient_checkpointing_enable({"use_reentrant": False})
    accelerator = accelerate.Accelerator(gradient_accumulation_steps=ACCUMULATED, cpu=True)
    loader = torch.utils.data.DataLoader(rows.table, batch_size=BATCH, collate_fn=rows.collate)
    prepared, optimizer, batches = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=RATE), loader)
    counts, losses, total = [(step["labels"][:, 1:] != -100).sum() for step in rows.steps()], [], 0.0
    for number, batch in enumerate(batches):
        with accelerator.accumulate(prepared):
            loss = prepared(**batch, num_items_in_batch=counts[number // ACCUMULATED]).loss
            accelerator.backward(loss * ACCUMULATED)
            optimizer.step()
            optimizer.zero_grad()
        total += loss.item()
        if number % ACCUMULATED == ACCUMULATED - 1:
            losses, total = [*losses, total], 0.0
    return losses


def by_trainer(model: PreTrainedModel, rows: Rows, folder: Path, **changes: Any) -> list[float]:
    trainer = Trainer(
        model, arguments(TrainingArguments, folder, **changes), data_collator=rows.collate, train_dataset=rows.table
    )
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def by_trl(model: PreTrainedModel, rows: Rows, folder: Path, llava: Path, **changes: Any) -> Any:
    """The log of TRL's trainer."""
    from pyramiddrop.inference.checkpoint import load_processor

    trainer = trl.SFTTrainer(
        model,
        arguments(trl.SFTConfig, folder, max_length=None, **changes),
        data_collator=rows.collate,
        train_dataset=rows.table,
        processing_class=load_processor(llava),
    )
    trainer.train()
    return trainer.state.log_history


@pytest.fixture(scope="module")
def expected() -> tuple[list[float], PreTrainedModel]:
    """Losses and weights of the reference."""
    model = tiny_model("llava-gqa").train()
    return by_reference(model, Rows(model)), model


def assert_same_weights(ours: nn.Module, theirs: nn.Module) -> None:
    for (name, parameter), wanted in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(parameter, wanted, atol=2e-6, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.fast_cases(4)
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("logits", ["full", "kept"])
@pytest.mark.parametrize("run", [by_loop, by_accelerate, by_trainer])
def test_loops_and_trainers(
    run: Callable[..., list[float]], logits: str, checkpointing: bool, expected: Any, tmp_path: Path
) -> None:
    losses, weights = expected
    model = tiny_model("llava-gqa").train()
    apply(model, method_of(HALVES, logits=logits))
    found = run(model, Rows(model), tmp_path, gradient_checkpointing=checkpointing)
    assert found == pytest.approx(losses, rel=1e-4)
    assert_same_weights(model, weights)


@pytest.mark.fast_cases(2)
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("logits", ["full", "kept"])
def test_trl(logits: str, checkpointing: bool, expected: Any, tmp_path: Path, llava_folder: Path) -> None:
    losses, weights = expected
    model = tiny_model("llava-gqa").train()
    apply(model, method_of(HALVES, logits=logits))
    rows = Rows(model)
    log = by_trl(model, rows, tmp_path, llava_folder, gradient_checkpointing=checkpointing)
    assert [entry["loss"] for entry in log if "loss" in entry] == pytest.approx(losses, rel=1e-4)
    assert_same_weights(model, weights)


def test_dropping_leads_elsewhere(expected: Any) -> None:
    """The tests above would prove nothing if a trainer that forgot the method ended with the same weights."""
    model = tiny_model("llava-gqa").train()
    losses = by_reference(model, Rows(model), dropping=False)
    assert losses != pytest.approx(expected[0], rel=1e-2)
    with pytest.raises(AssertionError):
        assert_same_weights(model, expected[1])


@pytest.mark.parametrize("logits", ["full", "kept"])
def test_the_accuracy_and_the_entropy_of_trl(logits: str, tmp_path: Path, llava_folder: Path) -> None:
    """Each of TRL's parts of a step counts its own mean; they are logged as the mean of the parts."""
    model = tiny_model("llava-gqa").train()
    rows = Rows(model)
    accuracy, entropy = [], []
    for start in (0, BATCH):
        inputs = rows.collate([{"number": start + n} for n in range(BATCH)])
        with torch.no_grad():
            logits_there = reference.train(model, HALVES, inputs).logits[:, :-1]
        labels = inputs["labels"][:, 1:]
        supervised = labels != -100
        rows_there = logits_there[supervised].float().log_softmax(-1)
        accuracy.append(float((rows_there.argmax(-1) == labels[supervised]).float().mean()))
        entropy.append(float(-(rows_there.exp() * rows_there).sum(-1).mean()))
    apply(model, method_of(HALVES, logits=logits))
    log = by_trl(model, rows, tmp_path, llava_folder)[0]
    assert log["mean_token_accuracy"] == pytest.approx(sum(accuracy) / 2, abs=1e-6)
    assert log["entropy"] == pytest.approx(sum(entropy) / 2, rel=1e-4)


def test_older_code_that_reads_the_logits(tmp_path: Path) -> None:
    """TRL before its fused head, and anyone's own loss: with `logits="full"` they stand beside the labels."""
    model = tiny_model("llava-gqa").train()
    inputs = Rows(model).steps()[0]
    wanted = reference.train(model, HALVES, inputs).logits[:, :-1].argmax(-1)
    apply(model, method_of(HALVES, logits="full"))
    labels = inputs["labels"][:, 1:]
    supervised = labels != -100
    output = model(**inputs, use_cache=False)
    assert torch.equal(output.logits[:, :-1].argmax(-1)[supervised], wanted[supervised])


def test_a_trainer_that_evaluates(expected: Any, tmp_path: Path) -> None:
    """By default training computes the logits of kept rows alone, and evaluation gives metrics all of them."""
    losses, weights = expected
    model = tiny_model("llava-gqa").train()
    rows, shapes, trained = Rows(model), list[tuple[tuple[int, ...], ...]](), list[int]()
    model.lm_head.register_forward_pre_hook(lambda head, given: trained.append(given[0].shape[1]) or None)

    def metrics(prediction: Any) -> dict[str, float]:
        shapes.append((prediction.predictions.shape[:2], prediction.label_ids.shape))
        return {}

    apply(model, method_of(HALVES))
    trainer = Trainer(
        model,
        arguments(TrainingArguments, tmp_path, per_device_eval_batch_size=BATCH),
        data_collator=rows.collate,
        train_dataset=rows.table,
        eval_dataset=rows.table,
        compute_metrics=metrics,
    )
    trainer.train()
    assert [entry["loss"] for entry in trainer.state.log_history if "loss" in entry] == pytest.approx(losses, rel=1e-4)
    assert_same_weights(model, weights)
    columns = rows.steps()[0]["labels"].shape[1]
    assert max(trained) < columns, "training needs no logits of dropped rows"
    # Transformers 5.24 cannot put such outputs of LLaVA together, whether tokens are dropped or not.
    trainer.evaluate(ignore_keys=["cache", "past_key_values", "image_outputs", "image_hidden_states"])
    assert [predictions == labels for predictions, labels in shapes] == [True]


# --- Precisions and layers ------------------------------------------------------------------------------------------


def flat_gradients(model: nn.Module, loss: Tensor) -> Tensor:
    model.zero_grad()
    loss.backward()
    found = torch.cat([p.grad.flatten().float() for p in model.parameters() if p.grad is not None])
    model.zero_grad()
    return found


@pytest.mark.parametrize("logits", ["full", "kept"])
def test_bf16_autocast(logits: str) -> None:
    """Scores are softmaxed in fp32, but the queries and keys behind them are rounded: near, not equal."""
    model = tiny_model("llava-gqa").train()
    inputs = Rows(model).steps()[0]
    wanted = reference.train(model, HALVES, inputs)
    gradients = flat_gradients(model, wanted.loss)
    apply(model, method_of(HALVES, logits=logits))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(**inputs).loss
    ours = flat_gradients(model, loss)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, wanted.loss, rtol=0.01, atol=0)
    assert torch.cosine_similarity(ours, gradients, dim=0) > 0.99


class PackedLinear(nn.Linear):
    """A linear layer as QLoRA has them: its weight is two numbers of 4 bits a byte, in a shape that means nothing."""

    def __init__(self, source: nn.Linear) -> None:
        super().__init__(source.in_features, source.out_features, source.bias is not None)
        if source.bias is not None:
            self.bias = source.bias
        self.scale = source.weight.abs().max().item() / 7
        numbers = (source.weight / self.scale).round().clamp(-8, 7).to(torch.int8).flatten() + 8
        packed = (numbers[::2] * 16 + numbers[1::2]).to(torch.uint8)[:, None]
        self.weight = nn.Parameter(packed, requires_grad=False)

    def forward(self, input: Tensor) -> Tensor:
        packed = self.weight[:, 0].int()
        numbers = torch.stack([packed // 16, packed % 16], 1).to(input.dtype) - 8
        weight = (numbers * self.scale).view(self.out_features, self.in_features)
        return nn.functional.linear(input, weight, self.bias)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_qlora(checkpointing: bool) -> None:
    peft = pytest.importorskip("peft")
    base = tiny_model("llava-gqa")
    for layer in base.model.language_model.layers:
        for parent in (layer.self_attn, layer.mlp):
            for name, module in list(parent.named_children()):
                if isinstance(module, nn.Linear):
                    setattr(parent, name, PackedLinear(module))
    torch.manual_seed(3)
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj"]
    targets = rf".*language_model\.layers\.\d+\.\w+\.({'|'.join(names)})"
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False)).train()
    inputs = Rows(base).steps()[0]
    wanted = reference.train(base, HALVES, inputs)
    gradients = flat_gradients(model, wanted.loss)
    assert gradients.abs().max() > 0
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    apply(model, method_of(HALVES))
    loss = model(**inputs).loss
    torch.testing.assert_close(loss, wanted.loss, atol=1e-5, rtol=1e-5)
    tolerance = 1e-4 * float(gradients.abs().max())
    torch.testing.assert_close(flat_gradients(model, loss), gradients, atol=tolerance, rtol=0)


@pytest.mark.slow
def test_compiled_layers() -> None:
    model = tiny_model("llava-gqa").train()
    inputs = Rows(model).steps()[0]
    wanted = reference.train(model, HALVES, inputs)
    gradients = flat_gradients(model, wanted.loss)
    apply(model, method_of(HALVES, logits="kept"))
    for layer in model.model.language_model.layers:
        layer.forward = torch.compile(layer.forward, backend="aot_eager")
    loss = model(**inputs).loss
    torch.testing.assert_close(loss, wanted.loss, atol=1e-5, rtol=1e-5)
    tolerance = 1e-4 * float(gradients.abs().max())
    torch.testing.assert_close(flat_gradients(model, loss), gradients, atol=tolerance, rtol=0)
