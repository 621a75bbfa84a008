"""The recorded numbers of the official code, and the model that they belong to."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from reference import Rule
from tiny import text_model, tiny_model

FOLDER = Path(__file__).parent / "data" / "official"


@dataclass
class Recorded:
    """One case: its rule, the place of its image, and its arrays."""

    rule: Rule
    first: list[int]  # per sample: the first visual column
    count: list[int]  # per sample: visual tokens
    loss: float | None
    arrays: dict[str, Tensor]

    def __getitem__(self, name: str) -> Tensor:
        return self.arrays[name]

    def kept(self, stage: int, sample: int) -> list[int]:
        """The visual columns that the stage kept."""
        return (self[f"stage{stage}_s{sample}_kept_orig"] + self.first[sample]).tolist()

    def visual_mask(self) -> Tensor:
        """(B, L) bool."""
        mask = torch.zeros(self["inputs_embeds"].shape[:2], dtype=torch.bool)
        for row, (first, count) in zip(mask, zip(self.first, self.count, strict=True), strict=True):
            row[first : first + count] = True
        return mask


def recorded(name: str) -> Recorded:
    """Read a case."""
    facts = json.loads((FOLDER / f"{name}.json").read_text())
    with np.load(FOLDER / f"{name}.npz") as file:
        arrays = {key: torch.from_numpy(file[key]) for key in file.files}
    rule = Rule(facts["layer_list"], facts["ratio_list_with_leading_1"][1:], positions="compact")
    return Recorded(rule, facts["image_token_posi"], facts["image_tokens"], facts.get("loss"), arrays)


def official_model(name: str, attention: str = "sdpa") -> PreTrainedModel:
    """A tiny LLaVA whose text model has the recorded weights."""
    config = json.loads((FOLDER / f"{name}.json").read_text())["config"]
    changes = {key: config[key] for key in ("vocab_size", "intermediate_size", "num_attention_heads", "rms_norm_eps")}
    model = tiny_model("llava", attention, config["num_hidden_layers"], **changes)
    weights = load_file(FOLDER / "weights_l8.safetensors")
    model.lm_head.load_state_dict({"weight": weights.pop("lm_head.weight")})
    text_model(model).load_state_dict({key.removeprefix("model."): value for key, value in weights.items()})
    return model
