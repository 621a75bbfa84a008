"""TRL's SFTTrainer with the method on the model, and the vision tower run on every rank in every forward."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.utils import CONFIG_NAME
from trl import SFTConfig, SFTTrainer

from pyramiddrop.hf import inspect_model
from pyramiddrop.hf.versions import cache_of
from pyramiddrop.training.answers import EXACT_MATCH, AnswerCheck, keep_random_state
from pyramiddrop.training.callbacks import LamCurriculum, MethodCallback
from pyramiddrop.training.model_card import TrainingFacts


def holds_whole_model(checkpoint: str | Path) -> bool:
    """Whether `from_pretrained` can load the weights of a checkpoint: not those of adapters, nor sharded ones."""
    return bool((Path(checkpoint) / CONFIG_NAME).is_file())


class ConversationTrainer(SFTTrainer):  # type: ignore[misc]
    """TRL's trainer, ordered so that a resumed run sees the same batches.

    To be resumed from a checkpoint that holds a whole model, it must be given the model loaded from there.

    Attributes:
        facts: what the model card says; TRL's own, where None, knows of no pictures and no method.
        curriculum: what changes λ over the steps, see `follow`.
        check: generates answers at each evaluation, of which the share that is right is logged.
    """

    facts: TrainingFacts | None = None
    curriculum: LamCurriculum | None = None
    check: AnswerCheck | None = None

    def follow(self, curriculum: LamCurriculum) -> None:
        """Train with a λ that changes; every evaluation drops with the last one, so that losses can be compared."""
        self.curriculum = curriculum
        self.add_callback(curriculum)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate with the method that the trained model will have; training goes on as if nothing had been."""
        if self.curriculum is not None:
            self.curriculum.finish()
        with keep_random_state():
            figures: dict[str, float] = super().evaluate(*args, **kwargs)
        return figures

    def evaluation_loop(
        self, dataloader: Any, description: str, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any
    ) -> Any:
        """Transformers' own, and the share of right answers among what it finds."""
        found = super().evaluation_loop(dataloader, description, *args, metric_key_prefix=metric_key_prefix, **kwargs)
        if self.check is not None:
            with self.compute_loss_context_manager():
                share = self.check.exact_match(
                    self.accelerator.unwrap_model(self.model),
                    self.args.process_index,
                    self.args.world_size,
                    self._total,
                )
            found.metrics[f"{metric_key_prefix}_{EXACT_MATCH}"] = share
        return found

    def _total(self, number: float) -> float:
        """The sum over all ranks."""
        return float(self.accelerator.reduce(torch.tensor(number, device=self.accelerator.device), reduction="sum"))

    def create_model_card(self, model_name: str | None = None, *args: Any, **kwargs: Any) -> None:
        """Write the model card into the output folder; called with each checkpoint, and by `push_to_hub`."""
        if self.facts is None:
            super().create_model_card(model_name, *args, **kwargs)
        elif self.is_world_process_zero():
            folder = Path(self.args.output_dir)
            self.facts.card(model_name or folder.name, self.state.global_step).save(folder / "README.md")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Transformers restores weights by the names that modules have. Families whose names on disk are others, LLaVA
        for one, would silently go on from the weights that they began with; `from_pretrained` knows the names.
        """
        if self.is_fsdp_enabled or not holds_whole_model(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        """Load the best checkpoint at the end of training, by the names on disk: see `_load_from_checkpoint`."""
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
    """Samples of like length together, in an order that depends on the seed and the epoch alone.

    Transformers' own sampler draws from the global generator: ranks would have to be lucky to agree, and a run that was
    resumed in its second epoch would see other batches than one that was not.

    Args:
        batch_size: samples of a step, over all ranks.
        lengths: of all samples. Those of length 0, the fillers of `with_fillers`, stand at the end and stay there.
        seed: of the order.
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


__all__ = ["ConversationTrainer", "MethodCallback", "SFTConfig", "SeededLengths"]


def name_layers_to_shard(model: nn.Module) -> None:
    """Let FSDP find the layers to shard: accelerate stops at one that a model's class names and the model has not.

    LLaVA's class names the layers of CLIP's text model (seen in Transformers 5.24), which no LLaVA holds.
    """
    named = set(getattr(model, "_no_split_modules", None) or ())
    setattr(model, "_no_split_modules", named & {type(module).__name__ for module in model.modules()})  # noqa: B010


def dummy_pixels(processor: Any) -> dict[str, Tensor]:
    """A model's arguments for one blank image."""
    any_size = (64, 64)  # the processor makes of it what the model takes
    return dict(processor.image_processor(images=[Image.new("RGB", any_size)], return_tensors="pt"))


class DummyImage:
    """Lets a batch without images run the vision tower on a blank one, whose features are multiplied by zero.

    Where weights are sharded over ranks (FSDP, ZeRO-3), a module that one rank calls and another does not waits for
    ever; and DDP's ranks must all have a gradient for what any of them trains. LLaVA's own code does likewise.

    Args:
        model: a vision-language model of Transformers, or what has wrapped one; to be given before it is sharded. The
            hooks stay on it.
        pixels: what `dummy_pixels` makes.
    """

    def __init__(self, model: nn.Module, pixels: dict[str, Tensor]) -> None:
        info = inspect_model(model)
        self.pixels = pixels
        self.core: Any = next(module for module in reversed(info.wrappers) if hasattr(module, "get_image_features"))
        self.embeddings: Any = info.text.get_input_embeddings()
        self._hook: RemovableHandle | None = None
        self.core.register_forward_pre_hook(self._look, with_kwargs=True)

    def _look(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Add the blank image where there is none; with a cache it is a step of `generate`, or its prefill, where ranks
        go their own ways anyway.

        The hook is put on anew each time, so that it comes after FSDP's own: FSDP2 fetches weights for the backward
        pass in the order in which modules ended their forward, and with images the embeddings end before the tower.
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
