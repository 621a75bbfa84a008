"""TRL's SFTTrainer for conversations, which answers samples, with a vision tower that runs on every rank each time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from PIL import Image
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.utils import CONFIG_NAME
from trl import SFTConfig, SFTTrainer

from pyramiddrop.evaluation.tasks import exact
from pyramiddrop.hf import inspect_model
from pyramiddrop.hf.versions import cache_of
from pyramiddrop.inference.answer import answer_greedily
from pyramiddrop.inference.checkpoint import Checkpoint
from pyramiddrop.training.callbacks import LamCurriculum, MethodCallback
from pyramiddrop.training.collate import AnswerCollator
from pyramiddrop.training.model_card import TrainingFacts
from pyramiddrop.training.samples import Message, message_text

__all__ = ["ConversationTrainer", "MethodCallback", "SFTConfig", "SeededLengths"]

#: The logged name of the share of right answers.
EXACT_MATCH = "exact_match"
#: Tokens to generate beyond the longest right answer; longer answers are wrong anyway.
SPARE_TOKENS = 8


class AnswerCheck:
    """Generates a model's last answer of each conversation, and computes the share of exact matches.

    Answers are greedy, under the method that is applied to the model, if any. Case, surrounding space and a final full
    stop do not matter (`pyramiddrop.evaluation.tasks.exact`).

    At most `count` samples are answered, spread evenly over the table, `batch` in a forward.
    """

    def __init__(self, table: Dataset, collator: AnswerCollator, count: int, batch: int) -> None:
        count = min(count, len(table))
        self.table = table.select([number * len(table) // count for number in range(count)])
        self.collator, self.batch = collator, batch
        self.right = [message_text(messages[_last_answer(messages)]).strip() for messages in self.table["messages"][:]]
        tokenizer = collator.processor.tokenizer
        self.max_new_tokens = max(len(tokenizer(text)["input_ids"]) for text in self.right) + SPARE_TOKENS

    def answers(self, model: Any, rank: int = 0, ranks: int = 1) -> list[str]:
        """The answers to every `ranks`-th sample, from `rank` on; the model's mode and random state are restored."""
        rows, checkpoint = range(rank, len(self.table), ranks), Checkpoint(model, self.collator.processor, "")
        texts: list[str] = []
        was_training = model.training
        with keep_random_state():
            model.eval()
            try:
                for start in range(0, len(rows), self.batch):
                    batch = [self.table[row] for row in rows[start : start + self.batch]]
                    prompts = [{**row, "messages": row["messages"][: _last_answer(row["messages"])]} for row in batch]
                    texts += answer_greedily(checkpoint, self.collator.prompts(prompts), self.max_new_tokens)
            finally:
                model.train(was_training)
        return texts

    def exact_match(self, model: Any, rank: int, ranks: int, total: Callable[[float], float]) -> float:
        """The share of right answers, in [0, 1]; `total` sums a number over all ranks, each with its own samples."""
        texts = self.answers(model, rank, ranks)
        return total(sum(map(exact, texts, ([one] for one in self.right[rank::ranks])))) / len(self.table)


def _last_answer(messages: Sequence[Message]) -> int:
    return max(number for number, message in enumerate(messages) if message["role"] == "assistant")


@contextmanager
def keep_random_state() -> Iterator[None]:
    """Context manager that restores PyTorch's random state on the CPU and on this process's GPU."""
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices):
        yield


def holds_whole_model(checkpoint: str | Path) -> bool:
    """True if `from_pretrained` can load the weights of a checkpoint: neither adapters nor sharded weights."""
    return bool((Path(checkpoint) / CONFIG_NAME).is_file())


class ConversationTrainer(SFTTrainer):  # type: ignore[misc]
    """TRL's trainer with an order of batches that a resumed run repeats.

    To resume from a checkpoint with a whole model, construct it with the model loaded from there.
    """

    facts: TrainingFacts | None = None  # on the model card; None: TRL's own card, without pictures and method
    curriculum: LamCurriculum | None = None  # changes λ over the steps, see `follow`
    check: AnswerCheck | None = None  # answers at each evaluation; the share of exact matches is logged

    def follow(self, curriculum: LamCurriculum) -> None:
        """Train with a changing λ; all evaluations use the last one, so that their losses are comparable."""
        self.curriculum = curriculum
        self.add_callback(curriculum)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate with the method that the trained model will have, without effect on the training."""
        if self.curriculum is not None:
            self.curriculum.finish()
        with keep_random_state():
            figures: dict[str, float] = super().evaluate(*args, **kwargs)
        return figures

    def evaluation_loop(
        self, dataloader: Any, description: str, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any
    ) -> Any:
        """Transformers' own evaluation, with the share of right answers among its metrics."""
        found = super().evaluation_loop(dataloader, description, *args, metric_key_prefix=metric_key_prefix, **kwargs)
        if self.check is not None:
            model, ranks = self.accelerator.unwrap_model(self.model), self.args.world_size
            with self.compute_loss_context_manager():
                share = self.check.exact_match(model, self.args.process_index, ranks, self._total)
            found.metrics[f"{metric_key_prefix}_{EXACT_MATCH}"] = share
        return found

    def _total(self, number: float) -> float:
        return float(self.accelerator.reduce(torch.tensor(number, device=self.accelerator.device), reduction="sum"))

    def create_model_card(self, model_name: str | None = None, *args: Any, **kwargs: Any) -> None:
        """Write the model card into the output folder; called with each checkpoint, and by `push_to_hub`."""
        if self.facts is None:
            super().create_model_card(model_name, *args, **kwargs)
        elif self.is_world_process_zero():
            folder = Path(self.args.output_dir)
            self.facts.card(model_name or folder.name, self.state.global_step).save(folder / "README.md")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Do not restore weights of a whole model: they were loaded from the checkpoint before.

        Transformers restores weights by module names. Families with other names on disk, such as LLaVA, would silently
        keep their initial weights; `from_pretrained` maps the names.
        """
        if self.is_fsdp_enabled or not holds_whole_model(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        """Load the best checkpoint at the end of training by its names on disk; see `_load_from_checkpoint`."""
        best = self.state.best_model_checkpoint
        if best is None or self.is_fsdp_enabled or self.is_deepspeed_enabled or not holds_whole_model(best):
            super()._load_best_model()
        else:
            loaded = type(self.model).from_pretrained(best, dtype=torch.float32)
            self.model.load_state_dict(loaded.state_dict())

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(train_dataset)
        dataset = train_dataset if train_dataset is not None else self.train_dataset
        grouped = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        return SeededLengths(grouped, list(dataset[self.args.length_column_name]), self.args.seed)


class SeededLengths(LengthGroupedSampler):  # type: ignore[misc]
    """A sampler of samples grouped by length, whose order depends on the seed and the epoch alone.

    Transformers' own sampler draws from the global generator, so that ranks may disagree and a run resumed in its
    second epoch would see other batches. Samples of length 0, the fillers of `with_fillers`, stay at the end.

    Args:
        batch_size: number of samples in a step, over all ranks.
    """

    def __init__(self, batch_size: int, lengths: list[int], seed: int) -> None:
        samples = [length for length in lengths if length]
        super().__init__(batch_size, lengths=samples, generator=torch.Generator())
        self.seed, self.epoch, self.fillers = seed, 0, range(len(samples), len(lengths))

    def set_epoch(self, epoch: int) -> None:
        """Called by the trainer before each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths) + len(self.fillers)

    def __iter__(self) -> Iterator[int]:
        self.generator.manual_seed(self.seed + self.epoch)
        return chain(super().__iter__(), self.fillers)


def name_layers_to_shard(model: nn.Module) -> None:
    """Remove missing layers from the names of layers that FSDP shards, because accelerate stops at them.

    LLaVA's class names the layers of CLIP's text model (in Transformers 5.24), which no LLaVA has.
    """
    named = set(getattr(model, "_no_split_modules", None) or ())
    setattr(model, "_no_split_modules", named & {type(module).__name__ for module in model.modules()})  # noqa: B010


def dummy_pixels(processor: Any) -> dict[str, Tensor]:
    """The model's arguments for one blank image, of which any size will do."""
    return dict(processor.image_processor(images=[Image.new("RGB", (64, 64))], return_tensors="pt"))


class DummyImage:
    """Runs the vision tower on a blank image in batches without images, with its features multiplied by zero.

    With sharded weights (FSDP, ZeRO-3), a module that one rank calls and another does not would wait forever, and all
    ranks of DDP need a gradient for each trained weight. LLaVA's own code does the same.

    Args:
        model: a vision-language model of Transformers, or a wrapper of one, before it is sharded; the hooks stay on it.
        pixels: the result of `dummy_pixels`.
    """

    def __init__(self, model: nn.Module, pixels: dict[str, Tensor]) -> None:
        info = inspect_model(model)
        self.pixels = pixels
        self.core: Any = next(module for module in reversed(info.wrappers) if hasattr(module, "get_image_features"))
        self.embeddings: Any = info.text.get_input_embeddings()
        self._hook: RemovableHandle | None = None
        self.core.register_forward_pre_hook(self._look, with_kwargs=True)

    def _look(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Add the blank image to batches without images, except in `generate` (with a cache), where ranks are
        independent anyway.

        The hook is installed again each time, so that it comes after FSDP's own: FSDP2 prefetches weights for the
        backward pass in the order in which modules ended their forward, and with images the embeddings end before the
        tower.
        """
        self._remove_hook()
        if kwargs.get("pixel_values") is None and cache_of(kwargs) is None:
            self._hook = self.embeddings.register_forward_hook(self._add_nothing)

    def _remove_hook(self) -> None:
        if self._hook is not None:
            self._hook.remove()
        self._hook = None

    def _add_nothing(self, module: nn.Module, args: tuple[Any, ...], embedded: Tensor) -> Tensor:
        self._remove_hook()
        inputs = {name: value.to(embedded.device) for name, value in self.pixels.items()}
        inputs["pixel_values"] = inputs["pixel_values"].to(embedded.dtype)
        features = self.core.get_image_features(**inputs, return_dict=True).pooler_output
        nothing: Tensor = torch.stack([part.sum() for part in features]).sum() * 0
        return embedded + nothing.to(embedded.dtype)
