"""Draws the demo's pictures and questions: the first scene, document and chart of the test split with seed 2024.

python examples/reader/make_demo_images.py src/pyramiddrop/assets/images

Two questions of different kinds about each picture were chosen by hand. Five of them are plain. The sixth is there
because PyramidDrop answers it wrongly and vanilla rightly: of the benchmark's 72 questions about the first six pictures
vanilla answers 71, PyramidDrop 70.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from pyramiddrop.evaluation.reader import ReaderBenchmark

SEED = 2024
#: For each picture: its file, and its questions.
ASKED = {
    "scene.png": ("Which digit is white?", "What colour is the 0?"),
    "document.png": ("Read line 4.", "What is the value of floor?"),
    "chart.png": ("Which bar is the highest?", "What is the value of beet?"),
}
WHY = {
    "What is the value of floor?": "Tokens are ranked by the attention of the prompt's last token, which looks for the "
    "digit to be written first: the 6. From layer 6 on no patch of the third digit is left, and a 6 is written for it."
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    out: Path = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    samples = list(ReaderBenchmark("test", pictures=len(ASKED), seed=SEED))
    questions = {}
    for number, (name, chosen) in enumerate(ASKED.items()):
        mine = {sample.question: sample for sample in samples if sample.picture == number}
        next(iter(mine.values())).image.save(out / name, optimize=True)
        questions[name] = [
            {"kind": mine[text].kind, "question": text, "answer": mine[text].answer}
            | ({"why": WHY[text]} if text in WHY else {})
            for text in chosen
        ]
    (out / "questions.json").write_text(json.dumps(questions, indent=2) + "\n", "utf-8")


if __name__ == "__main__":
    main()
