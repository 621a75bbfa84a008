"""Ask a model about a video, and say how many visual tokens each stage kept.

python examples/inference/video.py
python examples/inference/video.py --model Qwen/Qwen2.5-VL-7B-Instruct --video clip.mp4 --question "What happens?"

A model that takes videos is asked once about all frames. Another one (the bundled model) is asked about each frame, in
one batch.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from PIL import Image, ImageChops
from transformers import AutoModelForImageTextToText, AutoProcessor

from pyramiddrop import PyramidDrop
from pyramiddrop.assets import demo_images, reader_checkpoint
from pyramiddrop.inference.prompt import build_batch, build_inputs
from pyramiddrop.inference.video import open_video


def main() -> None:
    """Print an answer for the video, or one for each frame."""
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument(
        "--model", default=str(reader_checkpoint()), help="folder or hub name (default: the bundled one)"
    )
    words.add_argument("--video", type=Path, help="a file, an animated GIF or WebP, or a folder of frames")
    words.add_argument("--frames", type=int, default=4)
    words.add_argument("--question", default="Which digit is white?")
    asked = words.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        video = open_video(asked.video or bundled_clip(Path(folder) / "clip.gif"), asked.frames)
    model = AutoModelForImageTextToText.from_pretrained(asked.model, dtype="auto")
    processor = AutoProcessor.from_pretrained(asked.model)
    if getattr(processor, "video_processor", None) is not None:
        inputs = build_inputs(processor, [], asked.question, video)
    else:
        inputs = build_batch(processor, [([frame], asked.question) for frame in video.frames])

    with PyramidDrop()(model) as trace:
        ids = model.generate(**inputs.to(model.device), max_new_tokens=32, do_sample=False)
    answers = processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    for row, answer in enumerate(answers):
        kept = [trace.visual_tokens[row], *(len(stage.kept[row]) for stage in trace.stages)]
        print(f"{answer.strip()} (visual tokens in each stage: {' '.join(map(str, kept))})")


def bundled_clip(path: Path) -> Path:
    """A clip in which the bundled scene moves to the right, as a GIF."""
    with Image.open(demo_images()[0]) as picture:
        frames = [ImageChops.offset(picture.convert("RGB"), 14 * step, 0) for step in range(6)]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=200)
    return path


if __name__ == "__main__":
    main()
