"""Write the model card of a training: data, settings, and how to load the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import transformers
import trl
from huggingface_hub import ModelCard, ModelCardData

from pyramiddrop import __version__
from pyramiddrop.methods import Compose, Method
from pyramiddrop.schedule import Stage

TRAINED = {
    "projector": "the projector alone",
    "all": "all weights but those of the vision tower",
    "lora": "LoRA on the decoder, and the projector",
}
CARD = """# {name}

{base}, trained with [pyramiddrop](https://arxiv.org/abs/2410.17247) on conversations about images.

## Dropped visual tokens

{dropping}

## How to use

```python
import pyramiddrop
from transformers import AutoProcessor

model = pyramiddrop.load("{name}")  # the path of this folder, or its name on the hub
processor = AutoProcessor.from_pretrained("{name}")
```

{loading}

## Training

- Data: {samples} conversations of `{data}`; their answers alone were supervised.
- Trained were {trained}.
- {steps} steps of {batch} conversations, with a peak learning rate of {learning_rate:g} and seed {seed}.
- pyramiddrop {version}, TRL {trl.__version__}, Transformers {transformers.__version__}.

How well the model answers was not measured in this training.
"""


@dataclass(frozen=True)
class TrainingFacts:
    """The facts on the card of a training."""

    base: str  # folder or hub name of the initial checkpoint
    data: str  # file, folder or hub name
    samples: int  # for training
    recipe: str
    batch: int  # conversations in a step, over all devices
    learning_rate: float  # the peak
    seed: int
    method: Method | None
    stages: Sequence[Stage]  # the method's drops in this model
    first_lam: float | None = None  # λ at the first step, if it changed over the steps

    def card(self, name: str, steps: int) -> ModelCard:
        """The card of the model `name` after `steps` steps, without a licence, which is the user's choice."""
        on_hub = not Path(self.base).exists()
        data = ModelCardData(
            base_model=self.base if on_hub else None,
            library_name="transformers",
            pipeline_tag="image-text-to-text",
            tags=["pyramiddrop", "trl", "sft"],
        )
        base = f"[{self.base}](https://huggingface.co/{self.base})" if on_hub else f"The model in `{self.base}`"
        told = {"name": name, "base": base, "dropping": self._dropping(), "loading": self._loading(name)}
        told |= {"trained": TRAINED[self.recipe], "version": __version__}
        text = CARD.format(**{**vars(self), **told}, steps=steps, trl=trl, transformers=transformers)
        return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}")

    def _dropping(self) -> str:
        if self.method is None:
            return "None: the model was trained with all of them."
        shares = [(f"{stage.keep:.4g}" if stage.keep else "none", stage.layer) for stage in self.stages]
        drops = ", ".join(f"{share} of them from layer {layer} on" for share, layer in shares)
        first = "all at first, " if self.stages[0].layer else ""
        parts = self.method.parts if isinstance(self.method, Compose) else (self.method,)
        names = [f"{type(part).__name__}{f' ({part.source})' if part.source else ''}" for part in parts]
        changed = f" λ began at {self.first_lam:g} and went to this over the steps." if self.first_lam else ""
        return (
            f"The model was trained with {', then '.join(names)}: of an image's visual tokens the decoder "
            f"keeps {first}{drops} (layers count from 0).{changed} The same is done when `pyramiddrop.load` has loaded "
            "it."
        )

    def _loading(self, name: str) -> str:
        if self.method is None:
            return "Transformers alone loads it, too."
        return (
            f'`pyramiddrop.load` applies the method of `pyramiddrop.json`; `pyramiddrop.load("{name}", None)` and '
            "Transformers alone load the model without dropping. On a model that is loaded already:\n\n"
            f"```python\nfrom pyramiddrop import *\n\napply(model, {self.method!r})\n```"
        )
