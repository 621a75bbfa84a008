"""Ask a model several questions at once, each about its own picture. A sample's answer does not depend on the others.

python examples/inference/batch.py
python examples/inference/batch.py --model llava-hf/llava-1.5-7b-hf --ask a.jpg "What is this?" --ask b.jpg "And this?"
"""

from __future__ import annotations

import argparse

from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from pyramiddrop import PyramidDrop
from pyramiddrop.assets import demo_images, reader_checkpoint

QUESTIONS = ("Which digit is white?", "Read line 4.", "Which bar is the highest?")


def main() -> None:
    """Print each question's answer, and how many of its visual tokens each stage kept."""
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument(
        "--model", default=str(reader_checkpoint()), help="folder or hub name (default: the bundled one)"
    )
    words.add_argument("--ask", nargs=2, action="append", metavar=("IMAGE", "QUESTION"))
    asked = words.parse_args()
    questions = asked.ask or list(zip(demo_images(), QUESTIONS, strict=True))

    model = AutoModelForImageTextToText.from_pretrained(asked.model, dtype="auto")
    processor = AutoProcessor.from_pretrained(asked.model)
    processor.tokenizer.padding_side = "left"  # to generate, as without dropping
    prompts = [
        processor.apply_chat_template(
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}],
            add_generation_prompt=True,
        )
        for _, question in questions
    ]
    pictures = [[Image.open(path).convert("RGB")] for path, _ in questions]
    inputs = processor(images=pictures, text=prompts, padding=True, return_tensors="pt").to(model.device)

    with PyramidDrop()(model) as trace:
        ids = model.generate(**inputs, max_new_tokens=32, do_sample=False)
    answers = processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    for row, ((_, question), answer) in enumerate(zip(questions, answers, strict=True)):
        kept = [trace.visual_tokens[row], *(len(stage.kept[row]) for stage in trace.stages)]
        print(f"{question} {answer.strip()} (visual tokens in each stage: {' '.join(map(str, kept))})")


if __name__ == "__main__":
    main()
