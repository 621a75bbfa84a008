"""Ask a model about one picture, without dropping and with PyramidDrop.

python examples/inference/plain.py
python examples/inference/plain.py --model llava-hf/llava-1.5-7b-hf --image photo.jpg --question "What is this?"
"""

from __future__ import annotations

import argparse
from typing import Any

from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from pyramiddrop import PyramidDrop
from pyramiddrop.assets import demo_images, reader_checkpoint


def main() -> None:
    """Print both answers, and what was kept."""
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument(
        "--model", default=str(reader_checkpoint()), help="folder or hub name (default: the bundled one)"
    )
    words.add_argument("--image", default=str(demo_images()[0]))
    words.add_argument("--question", default="Which digit is white?")
    asked = words.parse_args()

    model = AutoModelForImageTextToText.from_pretrained(asked.model, dtype="auto")
    processor = AutoProcessor.from_pretrained(asked.model)
    content = [{"type": "image", "image": Image.open(asked.image)}, {"type": "text", "text": asked.question}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    ).to(model.device)

    print("without dropping:", answer(model, processor, inputs))
    with PyramidDrop()(model) as trace:
        print("with PyramidDrop:", answer(model, processor, inputs))
    kept = [trace.visual_tokens[0], *(len(stage.kept[0]) for stage in trace.stages)]
    print("visual tokens in each stage:", *kept)
    print(f"of vanilla's decoder FLOPs: {trace.cost().flops_ratio:.0%}, of its KV cache: {trace.cost().kv_ratio:.0%}")


def answer(model: Any, processor: Any, inputs: Any) -> str:
    """The greedy answer in words."""
    ids = model.generate(**inputs, max_new_tokens=32, do_sample=False)
    return str(processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)).strip()


if __name__ == "__main__":
    main()
