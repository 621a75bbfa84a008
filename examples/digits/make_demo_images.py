"""Draws the small model's pictures and their questions: the first scenes of the benchmark's test split with seed 2024.

python examples/digits/make_demo_images.py src/pyramiddrop/assets/digits_images
"""

from __future__ import annotations

import argparse
import json
from itertools import groupby
from pathlib import Path

from pyramiddrop.evaluation.digits import DigitsBenchmark

PICTURES, QUESTIONS, SEED = 3, 6, 2024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    out: Path = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    benchmark = DigitsBenchmark("test", scenes=PICTURES, questions_per_scene=QUESTIONS, seed=SEED)
    asked = {}
    for scene, samples in groupby(benchmark, key=lambda sample: sample.scene):
        name = f"digits-{scene + 1}.png"
        asked[name] = []
        for sample in samples:
            sample.image.save(out / name, optimize=True)
            asked[name].append({"kind": sample.kind, "question": sample.question, "answer": sample.answer})
    (out / "questions.json").write_text(json.dumps(asked, indent=2) + "\n", "utf-8")


if __name__ == "__main__":
    main()
