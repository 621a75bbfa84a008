"""Plug-in for ms-swift 4: put the method on the model that it trains, and `pyramiddrop.json` into its checkpoints.

    swift sft --external_plugins "$(python -m pyramiddrop.training.plugins.ms_swift)" --callbacks pyramiddrop ...

The method is the one saved beside the checkpoint, or PyramidDrop; the variable PYRAMIDDROP_METHOD names another in
words, such as `pyramiddrop:lam=0.6`. ms-swift puts the folder of a plug-in first on Python's path, and so this one has
a folder of its own: no other module in it can stand in the place of somebody's package.
"""

from __future__ import annotations

import os
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from pyramiddrop.hf import inspect_model
from pyramiddrop.inference.resolve import resolve_method
from pyramiddrop.methods import apply
from pyramiddrop.training.callbacks import MethodCallback

METHOD_VARIABLE = "PYRAMIDDROP_METHOD"


class PyramidDropCallback(TrainerCallback):  # type: ignore[misc]
    """Applies the method when training begins, around the adapters if there are any, and saves it with each checkpoint.

    Args:
        args: of the trainer; ms-swift gives them to every callback.
        trainer: whose model is trained.
    """

    def __init__(self, args: TrainingArguments, trainer: Any) -> None:
        self.trainer = trainer
        self.saver: MethodCallback | None = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Put the method on the model; InputError for one that is not known or does not fit."""
        model = self.trainer.accelerator.unwrap_model(self.trainer.model)
        num_layers = len(inspect_model(model).layers)
        method = resolve_method(os.environ.get(METHOD_VARIABLE), self.trainer.model_info.model_dir, num_layers)
        if method is not None:
            apply(model, method)
            self.saver = MethodCallback(method)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Write the method beside the checkpoint that was just saved."""
        if self.saver is not None:
            self.saver.on_save(args, state, control)


if __name__ == "__main__":
    print(__file__)
else:
    from swift.callbacks import callbacks_map

    callbacks_map["pyramiddrop"] = PyramidDropCallback
