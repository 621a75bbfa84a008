"""Run a training: from the user's options to a folder that the other verbs load as a model."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForImageTextToText, set_seed
from transformers.integrations import get_available_reporting_integrations, is_deepspeed_zero3_enabled
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, SchedulerType

from pyramiddrop.hf import UnsupportedModelError, attachment_of
from pyramiddrop.inference import InputError, user_input
from pyramiddrop.inference.checkpoint import decoder_layers, load_processor, pick_dtype, read_config
from pyramiddrop.inference.resolve import resolve_method, with_logits
from pyramiddrop.methods import Logits, Method, StagedMethod, apply
from pyramiddrop.training.callbacks import LamCurriculum, check_first_lam
from pyramiddrop.training.collate import AnswerCollator
from pyramiddrop.training.dataset import Report, load_samples, with_fillers
from pyramiddrop.training.model_card import TrainingFacts
from pyramiddrop.training.recipes import LORA_RANK, RECIPES, Recipe, prepare_weights
from pyramiddrop.training.trainer import (
    EXACT_MATCH,
    AnswerCheck,
    ConversationTrainer,
    DummyImage,
    MethodCallback,
    SFTConfig,
    dummy_pixels,
    holds_whole_model,
    name_layers_to_shard,
)

BROKEN_LIST = "broken.txt"
ENDLESS = (
    "the chat template ends no answer with an end-of-text token, so that the model will not learn to stop; "
    "--chat-template takes one that does"
)


@dataclass(frozen=True)
class TrainOptions:
    """The options of `train`; None: the default of the recipe or the library."""

    model: str
    data: str  # like `images`: see `load_samples`
    output: Path  # folder of checkpoints, logs and the trained model
    images: Path | None = None
    recipe: str = "all"  # or "projector" or "lora"
    method: str | None = None  # a specification; None: the method saved beside the checkpoint, or PyramidDrop
    first_lam: float | None = None  # λ at the first step, which changes linearly to the method's own at the last
    epochs: float = 1.0
    steps: int | None = None  # None: those of `epochs`
    batch: int | None = None  # samples in a step, over all devices and accumulated ones
    device_batch: int = 1  # samples that a device runs at once
    learning_rate: float | None = None
    lr_schedule: str = "cosine"  # a name of Transformers' `lr_scheduler_type`, such as "linear"
    warmup: float | None = None  # steps until the peak; below 1, a share of all steps
    weight_decay: float = 0.0
    lora_rank: int = LORA_RANK  # of the recipe "lora"; α is twice as much
    eval_data: str | None = None  # like `data`; its loss is logged, and the best weights are kept
    eval_every: int | None = None  # steps between two evaluations; the last step is always evaluated
    eval_answers: int | None = None  # samples of `eval_data` to answer at each evaluation; the right ones are counted
    best_by: str = "loss"  # how weights are compared; "exact_match": by the share of right answers
    max_length: int | None = None
    logits: Logits = "kept"  # see `Method`
    checkpointing: bool = True
    skip_broken: bool = False  # leave out broken samples instead of stopping at the first one
    resume: bool = False  # continue from the last complete checkpoint in `output`
    save_every: int | None = None  # steps; None: only at the end, or the best checkpoint with `eval_data`
    log_every: int = 10
    report_to: Sequence[str] = ("tensorboard",)  # Transformers' reporting integrations, or "none"
    seed: int = 0
    workers: int = 0
    dtype: str | None = None
    chat_template: Path | None = None  # a file that replaces the checkpoint's


@dataclass(frozen=True)
class TrainingJob:
    """A training that is ready to run, under `method` (None: vanilla), with `remarks` to the user, a line each."""

    options: TrainOptions
    trainer: ConversationTrainer
    method: Method | None
    report: Report
    remarks: Sequence[str] = ()

    @property
    def broken_list(self) -> Path:
        """The file that lists broken samples, if there are any."""
        return self.options.output / BROKEN_LIST

    def run(self) -> dict[str, float]:
        """Train, save the trained model into `options.output`, and return the trainer's figures.

        LoRA is merged into its base, so that the folder contains a whole model. Checkpoints contain the adapters; with
        sharded weights the folder does too, because no process has all weights.
        """
        trainer = self.trainer
        resumed = last_whole_checkpoint(self.options.output) if self.options.resume else None
        figures: dict[str, float] = trainer.train(resume_from_checkpoint=resumed).metrics
        if trainer.state.best_metric is not None:
            best = {f"best_eval_{self.options.best_by}": trainer.state.best_metric}
            figures |= {"best_step": trainer.state.best_global_step, **best}
        trainer.save_state()
        trainer.save_model()
        trainer.create_model_card()
        sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
        if self.options.recipe == "lora" and not sharded and trainer.is_world_process_zero():
            for path in self.options.output.glob("adapter_*"):
                path.unlink()
            model = trainer.accelerator.unwrap_model(trainer.model)
            model.merge_and_unload().save_pretrained(self.options.output)
        return figures


def prepare_training(options: TrainOptions, progress: Callable[[str], None] = lambda step: None) -> TrainingJob:
    """Check the options, data and weights, cheap checks first, and build the trainer; InputError for a bad option.

    `progress` is called with the name of each phase.
    """
    _check_options(options)
    recipe = RECIPES[options.recipe]
    method = resolve_method(options.method, options.model, decoder_layers(read_config(options.model)))
    if options.first_lam is not None:
        check_first_lam(method, options.first_lam)
    arguments = _training_arguments(options, recipe)
    processor = _processor(options)
    collator = AnswerCollator(processor)
    tables, report = _load_tables(options, collator, arguments, progress)
    progress(f"loading {options.model}")
    set_seed(options.seed)
    model = prepare_weights(_load_weights(options, recipe), recipe, options.lora_rank)
    if method is not None:
        method = with_logits(method, options.logits)
        with user_input(caught=(UnsupportedModelError,)):
            apply(model, method)
    if arguments.world_size > 1:
        DummyImage(model, dummy_pixels(processor))
        name_layers_to_shard(model)
        if not is_deepspeed_zero3_enabled():  # a rank with a batch of fillers only would not rank
            tables["train"] = with_fillers(tables["train"], options.device_batch * arguments.world_size)
    trainer = ConversationTrainer(
        model=model,
        args=arguments,
        data_collator=collator,
        train_dataset=tables["train"],
        eval_dataset=tables.get("eval"),
        processing_class=processor,
        callbacks=[MethodCallback(method)] if method is not None else None,
    )
    if isinstance(method, StagedMethod) and options.first_lam is not None:
        trainer.follow(LamCurriculum(model, method, options.first_lam))
    if options.eval_answers:
        trainer.check = _answer_check(trainer, collator, tables["eval"], options.eval_answers)
    trainer.facts = _facts(options, arguments, report, model, method)
    if report.broken and trainer.is_world_process_zero():
        options.output.mkdir(parents=True, exist_ok=True)
        (options.output / BROKEN_LIST).write_text("\n".join(report.broken) + "\n", encoding="utf-8")
    return TrainingJob(options, trainer, method, report, [] if collator.ends_answers else [ENDLESS])


def _answer_check(trainer: ConversationTrainer, collator: AnswerCollator, table: Dataset, count: int) -> AnswerCheck:
    if trainer.is_fsdp_enabled or is_deepspeed_zero3_enabled():
        raise InputError(  # no process holds all weights, so that none can generate on its own
            f"--eval-answers {count} is not supported where weights are sharded (FSDP, ZeRO-3); leave it out, and ask "
            "the trained model with pyramiddrop eval"
        )
    return AnswerCheck(table, collator, count, trainer.args.per_device_eval_batch_size)


def _load_tables(
    options: TrainOptions, collator: AnswerCollator, arguments: SFTConfig, progress: Callable[[str], None]
) -> tuple[dict[str, Dataset], Report]:
    tables, broken, good = {}, [], 0
    for name, source in (("train", options.data), ("eval", options.eval_data)):
        if source is None:
            continue
        progress(f"checking {source}")
        with arguments.main_process_first():  # the other ranks find the results in the cache
            limits = options.images, options.max_length, options.skip_broken
            tables[name], found = load_samples(source, collator, *limits)
        broken += found.broken
        good += found.good if name == "train" else 0
    return tables, Report(good, broken)


def _training_arguments(options: TrainOptions, recipe: Recipe) -> SFTConfig:
    """The trainer's arguments, with the recipe's defaults."""
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    batch, cuda = options.batch or recipe.batch, torch.cuda.is_available()
    accumulated, rest = divmod(batch, ranks * options.device_batch)
    if rest:
        raise InputError(
            f"--batch {batch} is no multiple of {options.device_batch} samples on each of {ranks} devices; change "
            "--batch or --device-batch"
        )
    with warnings.catch_warnings():
        # Checkpointing has two names, of which the oldest supported Transformers has only the deprecated one.
        warnings.simplefilter("ignore", FutureWarning)
        return SFTConfig(
            output_dir=str(options.output),
            num_train_epochs=options.epochs,
            max_steps=options.steps or -1,
            per_device_train_batch_size=options.device_batch,
            gradient_accumulation_steps=accumulated,
            learning_rate=recipe.learning_rate if options.learning_rate is None else options.learning_rate,
            lr_scheduler_type=options.lr_schedule,
            warmup_steps=recipe.warmup if options.warmup is None else options.warmup,
            weight_decay=options.weight_decay,
            bf16=(cuda and torch.cuda.is_bf16_supported()) or options.dtype == "bfloat16",
            use_cpu=not cuda,
            gradient_checkpointing=options.checkpointing,
            max_length=None,  # truncation could remove image tokens: long samples count as broken instead
            packing=False,
            train_sampling_strategy="group_by_length",
            remove_unused_columns=False,
            dataloader_num_workers=options.workers,
            include_num_input_tokens_seen="non_padding",
            logging_steps=options.log_every,
            logging_first_step=True,
            report_to=list(options.report_to),
            save_steps=options.save_every or 500,
            seed=options.seed,
            **_saving(options),
        )


def _facts(
    options: TrainOptions, arguments: SFTConfig, report: Report, model: Any, method: Method | None
) -> TrainingFacts:
    attachment = attachment_of(model)
    return TrainingFacts(
        base=options.model,
        data=options.data,
        samples=report.good,
        recipe=options.recipe,
        batch=options.batch or RECIPES[options.recipe].batch,
        learning_rate=arguments.learning_rate,
        seed=options.seed,
        method=method,
        first_lam=options.first_lam,
        stages=attachment.rules.schedule.stages if attachment is not None else (),
    )


def _saving(options: TrainOptions) -> dict[str, Any]:
    """The arguments for saving and evaluation; with `eval_data`, the best weights are loaded at the end."""
    saving: dict[str, Any] = {"save_strategy": "steps" if options.save_every else "no"}
    if options.eval_data is None:
        return saving
    if not options.save_every:
        saving = {"save_strategy": "best", "save_total_limit": 1}
    return {
        **saving,
        "eval_strategy": "steps",
        "eval_steps": options.eval_every,
        "per_device_eval_batch_size": options.device_batch,
        "metric_for_best_model": f"eval_{options.best_by}",
        "greater_is_better": options.best_by == EXACT_MATCH,
        "load_best_model_at_end": True,
    }


def last_whole_checkpoint(folder: Path) -> str | None:
    """The last complete checkpoint (a trainer writes its state last), or None."""
    whole = {}
    for state in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*/{TRAINER_STATE_NAME}"):
        with suppress(ValueError):
            json.loads(state.read_text(encoding="utf-8"))
            whole[int(state.parent.name.rpartition("-")[2])] = state.parent
    return str(whole[max(whole)]) if whole else None


def _check_options(options: TrainOptions) -> None:
    if options.recipe not in RECIPES:
        raise InputError(f"recipe {options.recipe!r} is not one of {', '.join(RECIPES)}")
    there = last_whole_checkpoint(options.output) is not None
    if options.resume and not there:
        raise InputError(f"nothing to resume: {options.output} holds no whole checkpoint (--save-every writes them)")
    if there and not options.resume:
        raise InputError(f"{options.output} holds checkpoints already; give --resume, or another --output")
    if (options.eval_data is None) != (options.eval_every is None):
        raise InputError("--eval-data and --eval-every go together; give both, or neither")
    if options.eval_answers is not None and options.eval_data is None:
        raise InputError(f"--eval-answers {options.eval_answers} needs --eval-data, whose samples are answered")
    if options.best_by not in ("loss", EXACT_MATCH):
        raise InputError(f"--best-by {options.best_by!r} is not one of loss, {EXACT_MATCH}")
    if options.best_by == EXACT_MATCH and not options.eval_answers:
        raise InputError(f"--best-by {EXACT_MATCH} needs answers; give --eval-answers N with --eval-data")
    if options.eval_every and options.save_every not in (None, options.eval_every):
        raise InputError(
            f"--save-every {options.save_every} must be --eval-every {options.eval_every}, so that the best checkpoint "
            "is among those that were saved; or leave it out, to keep the best one alone"
        )
    schedules = [one.value for one in SchedulerType]
    if options.lr_schedule not in schedules:
        raise InputError(f"--lr-schedule {options.lr_schedule!r} is not one of {', '.join(schedules)}")
    reports = [*get_available_reporting_integrations(), "none"]
    for name in options.report_to:
        if name not in reports:
            known = ", ".join(reports)
            raise InputError(f"--report-to {name} is not installed, or not known to Transformers; there is {known}")


def _processor(options: TrainOptions) -> Any:
    with user_input(f"cannot load the processor of {options.model}", (OSError, ValueError, ImportError)):
        processor = load_processor(options.model)
    if options.chat_template is not None:
        with user_input(f"cannot read {options.chat_template}", (OSError, ValueError)):
            processor.chat_template = options.chat_template.read_text(encoding="utf-8")
    if getattr(processor, "chat_template", None) is None:
        raise InputError(f"{options.model} has no chat template; give one: --chat-template FILE")
    return processor


def _load_weights(options: TrainOptions, recipe: Recipe) -> Any:
    """Load the weights, in the device's own dtype if the language model is frozen.

    Those of a resumed run are in its checkpoint, if that contains a whole model.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = pick_dtype(device, options.dtype) if options.dtype or recipe.language != "all" else torch.float32
    checkpoint = last_whole_checkpoint(options.output) if options.resume else None
    source = checkpoint if checkpoint is not None and holds_whole_model(checkpoint) else options.model
    with user_input(f"cannot load the weights of {source}", (OSError, ValueError)):
        return AutoModelForImageTextToText.from_pretrained(source, dtype=dtype)
