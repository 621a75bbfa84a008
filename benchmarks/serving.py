"""Measures serving on vLLM's CPU engine: plain vLLM and PyramidDrop in turn; prints one JSON record.

python benchmarks/serving.py > benchmarks/results/serving.json

It needs the environment that `.ci/vllm` makes. The model is a random LLaVA of middle size. The engine runs in this
process and on one thread, and the clock counts the CPU seconds of the process: other programs on the machine are not
in it. So many clients as the concurrency says each send their next request as soon as they have
their answer.
"""

from __future__ import annotations

import gc
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

# Read when vLLM and PyTorch are imported.
os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
}

import numpy as np
import torch
import transformers
import vllm
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from pyramiddrop import PyramidDrop
from pyramiddrop.vllm import hf_overrides

LAYERS, HIDDEN, INTERMEDIATE, HEADS = 8, 512, 1408, 8
VISUAL, WORDS, NEW = 576, 32, 24
BLOCK = 32  # tokens
VOCABULARY, PAD, IMAGE = 512, 1, 0
CONCURRENCY = {1: 3, 4: 8, 8: 16, 32: 32}  # and how many requests are measured
ROUNDS = 2
PLENTY, BUDGET = 1 << 30, 256 << 20  # bytes of KV cache: to measure speed, and for how many requests fit
METHOD = PyramidDrop()


@dataclass(frozen=True)
class Load:
    """One concurrency, one variant. Seconds are CPU seconds of the process; medians over all requests.

    Attributes:
        turn: of the rounds, in each of which both ways are measured.
        requests: measured.
        throughput: answer tokens a second.
        first_token: from sending a request to its first token, the queue included.
        per_token: between later tokens.
        peak_kv_bytes: that requests held at one moment.
    """

    variant: str
    concurrency: int
    turn: int
    requests: int
    throughput: float
    first_token: float
    per_token: float
    peak_kv_bytes: int


def main() -> None:
    """Measure, and print the record."""
    with tempfile.TemporaryDirectory() as name:
        folder = save_model(Path(name))
        loads, fits = [], {}
        for turn in range(ROUNDS):
            for variant in ("vanilla", "PyramidDrop"):
                llm = engine(folder, variant, PLENTY)
                run(llm, variant, 2, 2)  # warms up
                loads += [run(llm, variant, clients, count, turn) for clients, count in CONCURRENCY.items()]
                close(llm)
        for variant in ("vanilla", "PyramidDrop"):
            llm = engine(folder, variant, BUDGET)
            fits[variant] = together(llm)
            close(llm)
    json.dump(record(loads, fits), sys.stdout, indent=1)
    print()


def engine(folder: Path, variant: str, kv_bytes: int, *, eager: bool = True) -> Any:
    """vLLM in this process, with so many bytes of KV cache; not `eager`, its forward is compiled."""
    dropping = {"hf_overrides": hf_overrides(str(folder), METHOD)} if variant != "vanilla" else {}
    layers = LAYERS if variant == "vanilla" else LAYERS // METHOD.stages  # a block holds tokens of one group's layers
    return vllm.LLM(
        str(folder),
        dtype="float32",
        enforce_eager=eager,
        max_model_len=1024,
        max_num_seqs=64,
        max_num_batched_tokens=2048,
        block_size=BLOCK,
        enable_prefix_caching=False,
        disable_log_stats=True,
        num_gpu_blocks_override=kv_bytes // (layers * BLOCK * 2 * HIDDEN * 4),
        **dropping,
    )


def close(llm: Any) -> None:
    """Give the memory back before the next engine."""
    llm.llm_engine.engine_core.shutdown()
    gc.collect()


def run(llm: Any, variant: str, clients: int, count: int, turn: int = 0) -> Load:
    """`clients` send `count` requests in all, each its next one when its last one is answered."""
    core, manager = llm.llm_engine, scheduler(llm).kv_cache_manager
    waiting = [prompt(1000 * turn + 100 * clients + number) for number in range(count)]
    sent: dict[str, float] = {}
    first: dict[str, float] = {}
    last: dict[str, float] = {}
    peak = 0
    start = time.process_time()
    while waiting or core.has_unfinished_requests():
        while waiting and len(sent) - len(last) < clients:
            name = f"{clients}-{len(sent)}"
            sent[name] = time.process_time()
            core.add_request(name, waiting.pop(0), sampling())
        for output in core.step():
            first.setdefault(output.request_id, time.process_time())
            if output.finished:
                last[output.request_id] = time.process_time()
        peak = max(peak, held(manager))
    total = time.process_time() - start
    return Load(
        variant,
        clients,
        turn,
        count,
        throughput=count * NEW / total,
        first_token=statistics.median(first[name] - sent[name] for name in sent),
        per_token=statistics.median((last[name] - first[name]) / (NEW - 1) for name in sent),
        peak_kv_bytes=peak * block_bytes(manager),
    )


def together(llm: Any) -> int:
    """How many of many requests that are sent at once run at the same time, until the first one is answered."""
    core, of = llm.llm_engine, scheduler(llm)
    names = [f"fit-{number}" for number in range(40)]
    for number, name in enumerate(names):
        core.add_request(name, prompt(number), sampling())
    most = 0
    while not any(output.finished for output in core.step()):
        most = max(most, len(of.running))
    core.abort_request(names)
    return most


def scheduler(llm: Any) -> Any:
    return llm.llm_engine.engine_core.engine_core.scheduler


def held(manager: Any) -> int:
    """Blocks that requests hold; the null block is nobody's."""
    return int(manager.block_pool.num_gpu_blocks - manager.block_pool.get_num_free_blocks() - 1)


def block_bytes(manager: Any) -> int:
    """Bytes of one block: of the layers of one group."""
    group = manager.kv_cache_config.kv_cache_groups[0]
    return int(group.kv_cache_spec.page_size_bytes * len(group.layer_names))


def sampling(tokens: int = NEW) -> Any:
    return vllm.SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)


def prompt(seed: int) -> dict[str, Any]:
    """A picture of noise, and a question of random words."""
    draw = np.random.default_rng(seed)
    words = " ".join(f"w{number}" for number in draw.integers(2, VOCABULARY, WORDS))
    picture = Image.fromarray(draw.integers(0, 255, (336, 336, 3), dtype=np.uint8))
    return {"prompt": f"<image> {words}", "multi_modal_data": {"image": picture}}


def save_model(folder: Path) -> Path:
    """LLaVA-1.5's build with a thin vision tower and a decoder of middle size, all weights random."""
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=336,
        patch_size=14,
        projection_dim=64,
    )
    text = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        max_position_embeddings=1024,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=IMAGE,
        image_seq_length=VISUAL,
        vision_feature_layer=-1,
    )
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    published = {
        name.replace("vision_tower.", "vision_tower.vision_model.", 1): value for name, value in weights.items()
    }
    save_file(published, folder / "model.safetensors", metadata={"format": "pt"})
    processor().save_pretrained(folder)
    return folder


def processor() -> LlavaProcessor:
    vocabulary = {"<image>": IMAGE, "<pad>": PAD} | {f"w{number}": number for number in range(2, VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return LlavaProcessor(
        tokenizer=PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            pad_token="<pad>",
            unk_token="<pad>",
            extra_special_tokens={"image_token": "<image>"},
        ),
        image_processor=CLIPImageProcessorPil(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336}),
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token="<image>",
    )


def record(loads: list[Load], fits: dict[str, int]) -> dict[str, Any]:
    """Plain numbers, and nothing that tells one machine from its like."""
    return {
        "machine": {"kind": f"{os.cpu_count()}-core {platform.machine()} CPU container", "threads": 1},
        "versions": {
            "vllm": vllm.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        "model": {"layers": LAYERS, "hidden": HIDDEN, "intermediate": INTERMEDIATE, "heads": HEADS, "dtype": "float32"},
        "request": {"visual_tokens": VISUAL, "words": WORDS, "answer_tokens": NEW},
        "method": METHOD.settings(),
        "loads": [{name: _rounded(value) for name, value in asdict(load).items()} for load in loads],
        "rounds": ROUNDS,
        "kv_budget_bytes": BUDGET,
        "requests_that_fit": fits,
    }


def _rounded(value: Any) -> Any:
    return round(value, 4) if isinstance(value, float) else value


if __name__ == "__main__":
    main()
