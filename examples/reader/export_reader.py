"""Writes the trained reader as a Hugging Face checkpoint: half-precision weights, configs, tokenizer, processor.

python examples/reader/export_reader.py runs/reader/weights.safetensors src/pyramiddrop/assets/reader
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from reader_model import ReaderLlava
from reader_text import reader_tokenizer
from safetensors import safe_open
from safetensors.torch import load_file
from shared import ModelConfig, largest_difference, make_processor, save_in_half, to_hugging_face


def load_weights(path: Path) -> ReaderLlava:
    """The model of a weights file that `train_reader.py` wrote."""
    with safe_open(path, "pt") as file:
        config = ModelConfig(**json.loads(file.metadata()["config"]))
    model = ReaderLlava(config)
    model.load_state_dict(load_file(path))
    return model.eval()


def export(weights: Path, out: Path) -> float:
    """Write the checkpoint; gives the largest difference of a logit between the trained and the exported model."""
    model = load_weights(weights)
    exported = to_hugging_face(model)
    difference = largest_difference(model, exported)
    save_in_half(exported, out)
    make_processor(model.config, reader_tokenizer()).save_pretrained(out)
    return difference


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", type=Path, help="weights.safetensors of train_reader.py")
    parser.add_argument("out", type=Path, help="folder for the checkpoint")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    difference = export(arguments.weights, arguments.out)
    if difference > 1e-3:
        raise SystemExit(f"the exported model disagrees with the trained one: logits differ by {difference:.2g}")
    size = sum(file.stat().st_size for file in arguments.out.iterdir()) / 1e6
    print(f"{arguments.out}: {size:.1f} MB, logits agree within {difference:.1g}")


if __name__ == "__main__":
    main()
