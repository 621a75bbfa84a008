"""Plug-in for ms-swift 4: apply the method to the trained model, and write `pyramiddrop.json` into its checkpoints.

    swift sft --external_plugins "$(python -m pyramiddrop.training.plugins.ms_swift)" --callbacks pyramiddrop ...

The method is the one saved beside the checkpoint, or PyramidDrop; the environment variable PYRAMIDDROP_METHOD specifies
another one, such as `pyramiddrop:lam=0.6`. ms-swift puts the folder of a plug-in first on Python's path. This file
therefore has a folder of its own, in which no other module can hide a package.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from pyramiddrop.hf import inspect_model
from pyramiddrop.hf.prompt_masks import IGNORED_LABEL
from pyramiddrop.inference.resolve import resolve_method
from pyramiddrop.methods import apply
from pyramiddrop.training.callbacks import MethodCallback

METHOD_VARIABLE = "PYRAMIDDROP_METHOD"


class PyramidDropCallback(TrainerCallback):  # type: ignore[misc]
    """Applies the method when training begins, around any adapters, and saves it with each checkpoint."""

    def __init__(self, args: TrainingArguments, trainer: Any) -> None:
        self.trainer = trainer
        self.saver: MethodCallback | None = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Apply the method to the model; InputError if it is unknown or does not fit."""
        model = self.trainer.accelerator.unwrap_model(self.trainer.model)
        reference = getattr(self.trainer, "ref_model", None)
        num_layers = len(inspect_model(model).layers)
        method = resolve_method(os.environ.get(METHOD_VARIABLE), self.trainer.model_info.model_dir, num_layers)
        if method is None:
            return
        self.saver = MethodCallback(method)
        models = [model] if reference is None else [model, self.trainer.accelerator.unwrap_model(reference)]
        labels = HiddenLabels(self.trainer)
        for one in models:
            one.register_forward_pre_hook(labels.add, with_kwargs=True)  # before the hooks of the method
            apply(one, method)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Write the method beside the new checkpoint."""
        if self.saver is not None:
            self.saver.on_save(args, state, control)


class HiddenLabels:
    """Passes labels to the model that ms-swift's preference trainers withhold, so that it finds its query tokens.

    DPO, CPO, ORPO and KTO remove them from a batch before the model's forward, and GRPO has none: there the tokens of a
    completion serve as labels. Trainers that pass labels to the model are unchanged.
    """

    labels: Tensor | None

    def __init__(self, trainer: Any) -> None:
        self.trainer, self.labels = trainer, None
        for name, wrapper in (
            ("concatenated_forward", self._of_pairs),
            ("prepare_logits_to_keep", self._of_cut),
            ("_get_model_kwargs", self._of_prefix),
            ("_get_logps_via_local_forward", self._of_completions),
        ):
            method = getattr(trainer, name, None)
            if method is not None:
                setattr(trainer, name, partial(wrapper, method))

    def add(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A pre-hook that passes the labels to forwards of a model that have none."""
        if kwargs.get("labels") is not None or self.labels is None:
            return None
        return args, {**kwargs, "labels": self.labels}

    def _of_pairs(self, method: Any, model: Any, batch: Any, *args: Any, **kwargs: Any) -> Any:
        with self._shown(batch.get("labels")):
            return method(model, batch, *args, **kwargs)

    def _of_cut(self, method: Any, inputs: Any) -> Any:
        """Follow the labels that `concatenated_forward` cuts to the columns of `logits_to_keep`."""
        found = method(inputs)
        if self.labels is not None:
            self.labels = inputs["labels"]
        return found

    def _of_prefix(self, method: Any, *args: Any, **kwargs: Any) -> Any:
        model_kwargs, labels = method(*args, **kwargs)
        return {**model_kwargs, "labels": labels}, labels

    def _of_completions(self, method: Any, model: Any, inputs: Any, keep: Any, ids: Tensor, **kwargs: Any) -> Any:
        labels = ids.masked_fill(inputs["attention_mask"] == 0, IGNORED_LABEL)
        labels[:, :-keep] = IGNORED_LABEL
        if "logits_to_keep" in self.trainer.model_kwarg_keys:
            labels = labels[:, -keep - 1 :]  # the columns whose logits it wants
        with self._shown(labels):
            return method(model, inputs, keep, ids, **kwargs)

    @contextmanager
    def _shown(self, labels: Tensor | None) -> Iterator[None]:
        self.labels = labels
        try:
            yield
        finally:
            self.labels = None


if __name__ == "__main__":
    print(__file__)
else:
    from swift.callbacks import callbacks_map

    callbacks_map["pyramiddrop"] = PyramidDropCallback
