"""Asks vLLM about a picture, with and without dropping, in one process each.

python examples/serving.py MODEL PICTURE "Question, as the model's chat template takes it, with its image token"
python examples/serving.py llava-hf/llava-1.5-7b-hf photo.jpg "USER: <image>\nWhat is this? ASSISTANT:" --lam 0.5
"""

from __future__ import annotations

import argparse
import time

from PIL import Image
from vllm import LLM, SamplingParams

from pyramiddrop import PyramidDrop
from pyramiddrop.vllm import hf_overrides


def main() -> None:
    """Answer, and say how long it took."""
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("model")
    words.add_argument("picture")
    words.add_argument("prompt")
    words.add_argument("--lam", type=float, help="share that each drop leaves; without it nothing is dropped")
    asked = words.parse_args()

    overrides = hf_overrides(asked.model, PyramidDrop(lam=asked.lam)) if asked.lam else {}
    llm = LLM(asked.model, hf_overrides=overrides, max_model_len=4096)
    prompt = {
        "prompt": asked.prompt.replace("\\n", "\n"),
        "multi_modal_data": {"image": Image.open(asked.picture).convert("RGB")},
    }
    start = time.perf_counter()
    [output] = llm.generate([prompt], SamplingParams(temperature=0, max_tokens=128))
    print(output.outputs[0].text)
    print(f"{time.perf_counter() - start:.2f} s")


if __name__ == "__main__":
    main()
