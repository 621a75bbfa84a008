"""Callbacks for any Hugging Face trainer: save the method with each checkpoint, and change λ over the steps."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from pyramiddrop.inference import InputError
from pyramiddrop.methods import Method, StagedMethod, apply, current_method, remove


class MethodCallback(TrainerCallback):  # type: ignore[misc]
    """Writes `pyramiddrop.json` into every checkpoint of any Hugging Face trainer: `Trainer(callbacks=[...])`.

    A patched model writes the file itself when it is saved. This callback is for checkpoints that the model does not
    save: adapters that were added after the method, and sharded weights.
    """

    def __init__(self, method: Method) -> None:
        self.method = method

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write the method beside the new checkpoint."""
        if state.is_world_process_zero:
            self.method.save_pretrained(Path(str(args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")


class LamCurriculum(TrainerCallback):  # type: ignore[misc]
    """Changes λ linearly from `first` at the first step (1 drops nothing) to that of `method` at the last.

    `method` is already applied to `model`. λ is rounded to hundredths, so that it is applied again at most a hundred
    times. After training, and after a call of `finish`, the model has the method with its own λ.
    """

    def __init__(self, model: nn.Module, method: StagedMethod, first: float) -> None:
        check_first_lam(method, first)
        self.model, self.method, self.first = model, method, first

    def lam(self, step: int, steps: int) -> float:
        """λ of the 0-based `step` of `steps`."""
        share = step / (steps - 1) if steps > 1 else 1.0
        return round(self.first + share * (self.method.lam - self.first), 2) if share < 1 else self.method.lam

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Apply the method with the λ of the step that begins."""
        self._use(replace(self.method, lam=self.lam(state.global_step, state.max_steps)))

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        """Apply the method with its own λ, with which the model is saved."""
        self.finish()

    def finish(self) -> None:
        """Apply the method with its own λ, to evaluate or to save; the next step changes it back."""
        self._use(self.method)

    def _use(self, method: Method) -> None:
        if current_method(self.model) != method:
            remove(self.model)
            apply(self.model, method)


def check_first_lam(method: Method | None, first: float) -> None:
    """Raise InputError if λ cannot change from `first` to that of `method`."""
    if not isinstance(method, StagedMethod) or method.keep is not None:
        name = "vanilla" if method is None else repr(method)
        raise InputError(
            f"--lam {first:g}:... changes λ over the steps, and {name} has no λ; give a pyramiddrop, random or uniform "
            "method without --keep"
        )
    if not 0 < first <= 1:
        raise InputError(f"λ of the first step must be in (0, 1]; got {first:g}")
