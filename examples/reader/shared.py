"""The parts of ``examples/digits`` that this example uses as they are."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "digits"))

from export import largest_difference, make_processor, save_in_half, to_hugging_face
from model import DecoderLayer, ModelConfig, PackedLlava, Packing, VisionLayer, VisionTower, rotary_table
from optimizer import make_optimizers, set_rate
from text import ASSISTANT, BOS, EOS, FILLERS, IGNORE, MARKS, PAD, USER, make_tokenizer

__all__ = [
    "ASSISTANT",
    "BOS",
    "EOS",
    "FILLERS",
    "IGNORE",
    "MARKS",
    "PAD",
    "USER",
    "DecoderLayer",
    "ModelConfig",
    "PackedLlava",
    "Packing",
    "VisionLayer",
    "VisionTower",
    "largest_difference",
    "make_optimizers",
    "make_processor",
    "make_tokenizer",
    "rotary_table",
    "save_in_half",
    "set_rate",
    "to_hugging_face",
]
