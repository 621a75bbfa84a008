"""Training steps on packed rows and on padded batches, without and with PyramidDrop: CPU seconds, FLOPs and rows.

    python benchmarks/packing.py --repeats 3

Four documents with one picture each and texts of very different lengths, in one packed row (position ids that start
again) or in a padded batch; a Llama decoder with random weights, fed with random embeddings. PyTorch counts the FLOPs
of a step. SDPA computes all pairs of a packed row, also those of different documents; flash kernels do not, and
`attention pairs` counts what is left for them in all layers.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from transformers import LlamaConfig, LlamaForCausalLM

from pyramiddrop import Method, PyramidDrop

VISUAL = 288
#: Text before the picture, behind it, and the answer's tokens, of each document.
TEXTS = ((8, 12, 4), (8, 40, 16), (8, 80, 40), (8, 200, 80))
HIDDEN = 256


def decoder() -> LlamaForCausalLM:
    """8 layers, with a vocabulary whose logits weigh little."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=688,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=8,
        vocab_size=1000,
        use_cache=False,
    )
    return LlamaForCausalLM(config).train()


def documents() -> list[dict[str, Tensor]]:
    """Each document's embeddings, visual mask, labels and positions, without a batch."""
    torch.manual_seed(1)
    found = []
    for before, behind, answer in TEXTS:
        length = before + VISUAL + behind + answer
        visual = torch.zeros(length, dtype=torch.bool)
        visual[before : before + VISUAL] = True
        labels = torch.full((length,), -100)
        labels[-answer:] = torch.randint(1000, (answer,))
        embeddings = torch.randn(length, HIDDEN) * 0.02
        found.append({"embeds": embeddings, "visual": visual, "labels": labels, "positions": torch.arange(length)})
    return found


def packed(rows: list[dict[str, Tensor]]) -> tuple[dict[str, Tensor], Tensor]:
    """The model's arguments for one row of all documents, and its visual mask."""
    joined = {name: torch.cat([row[name] for row in rows])[None] for name in rows[0]}
    inputs = {"inputs_embeds": joined["embeds"], "labels": joined["labels"], "position_ids": joined["positions"]}
    return inputs, joined["visual"]


def padded(rows: list[dict[str, Tensor]]) -> tuple[dict[str, Tensor], Tensor]:
    """The same as a batch, padded on the right."""

    def batch(name: str, filler: float) -> Tensor:
        return torch.nn.utils.rnn.pad_sequence([row[name] for row in rows], batch_first=True, padding_value=filler)

    mask = torch.nn.utils.rnn.pad_sequence([torch.ones(len(row["labels"])) for row in rows], batch_first=True)
    inputs = {"inputs_embeds": batch("embeds", 0), "labels": batch("labels", -100), "attention_mask": mask.long()}
    return inputs, batch("visual", False)


def step(model: Any, inputs: Mapping[str, Tensor], visual: Tensor, method: Method | None) -> tuple[float, list[int]]:
    """The loss of a forward and backward, and the rows that each layer computed."""
    model.zero_grad()
    with method(model, visual_mask=visual) if method else nullcontext() as trace:
        loss = model(**inputs).loss
        loss.backward()
    rows = [inputs["labels"].shape[1]] * len(model.model.layers) if trace is None else trace.lengths
    return float(loss.detach()), rows


def attention_pairs(model: Any, rows: list[dict[str, Tensor]], method: Method | None) -> int:
    """Pairs of rows in all layers where documents are kept apart, the causal half alone: each document runs alone."""
    each = [step(model, *packed([row]), method)[1] for row in rows]
    return sum(length * (length + 1) // 2 for lengths in each for length in lengths)


def count_flops(model: Any, call: Any) -> tuple[int, float]:
    """FLOPs of a step, and its loss. PyTorch's counter has no entry for the attention kernel of a CPU."""
    kernels = torch.ops.aten
    attention = {
        kernels._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
        kernels._scaled_dot_product_flash_attention_for_cpu_backward: lambda grad, q, k, v, *_, **__: (
            sdpa_backward_flop_count(grad, q, k, v)
        ),
    }
    with FlopCounterMode(display=False, custom_mapping=attention) as counter:
        loss, _ = step(model, *call)
    return counter.get_total_flops(), loss


def main() -> None:
    """Print one line for each way to run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3, help="steps of each way, taken in turn after a warm-up")
    repeats = parser.parse_args().repeats
    torch.set_num_threads(1)
    model, rows = decoder(), documents()
    methods: dict[str, Method | None] = {"vanilla": None, "PyramidDrop": PyramidDrop()}
    ways = {
        (how, name): (*make(rows), method)
        for how, make in (("padded", padded), ("packed", packed))
        for name, method in methods.items()
    }
    seconds: dict[tuple[str, str], list[float]] = {way: [] for way in ways}
    counted = {way: count_flops(model, call) for way, call in ways.items()}
    for _ in range(repeats):
        for way, call in ways.items():
            started = time.process_time()
            step(model, *call)
            seconds[way].append(time.process_time() - started)
    pairs = {name: attention_pairs(model, rows, method) for name, method in methods.items()}
    medians = {way: statistics.median(values) for way, values in seconds.items()}
    first = ("padded", "vanilla")
    print("| rows | method | loss | columns | GFLOPs | ratio | CPU s | ratio | attention pairs, documents apart |")
    print("|---|---|---|---|---|---|---|---|---|")
    for way, (inputs, _, _) in ways.items():
        flops, loss = counted[way]
        measured = f"{flops / 1e9:.1f} | {flops / counted[first][0]:.2f} | {medians[way]:.2f}"
        told = f"{' | '.join(way)} | {loss:.4f} | {inputs['labels'].numel()}"
        ratio, apart = medians[way] / medians[first], pairs[way[1]] / 1e6
        print(f"| {told} | {measured} | {ratio:.2f} | {apart:.2f} M |")


if __name__ == "__main__":
    main()
