"""Measures late entry (HiDrop, arXiv 2602.23699) on the bundled models, which were not trained with it: visual tokens
pass the first layers by, and text does not see them there. Writes the result and the table of docs/cost.md.

python benchmarks/late_entry.py
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from speed_document import RESULTS, ROOT, filled
from torch import Tensor

from pyramiddrop.assets import digits_checkpoint, reader_checkpoint
from pyramiddrop.evaluation.scores import score
from pyramiddrop.evaluation.tasks import MATCHES, digits_task, reader_task
from pyramiddrop.hf.model_info import inspect_model
from pyramiddrop.inference.checkpoint import Checkpoint, load_checkpoint
from pyramiddrop.inference.prompt import build_inputs, on_model

ENTRIES, LONGEST = (0, 1, 2, 3, 4), 8
DOCUMENT = ROOT / "docs" / "cost.md"


@contextmanager
def entering_at(layers: Sequence[Any], entry: int, visual: Tensor) -> Iterator[None]:
    """Let the visual rows of one prompt enter at layer `entry`: the layers before it run over the text alone.

    Without a KV cache and without padding: then no layer needs a mask, and each is causal over the rows that it gets.

    Args:
        visual: (L,) bool; rows behind it are text.
    """
    waiting: dict[str, Tensor] = {}

    def before(index: int, args: Any, kwargs: dict[str, Any]) -> Any:
        hidden, call = args[0], dict(kwargs)
        assert call.get("attention_mask") is None
        if index == 0:
            waiting["hidden"] = hidden
        length = waiting["hidden"].shape[1]
        seen = torch.cat([visual, visual.new_zeros(length - len(visual))])
        if index == entry:
            whole = waiting["hidden"].clone()
            whole[:, ~seen] = hidden
            return (whole, *args[1:]), call
        call["position_embeddings"] = tuple(table[:, ~seen] for table in call["position_embeddings"])
        return (hidden[:, ~seen] if index == 0 else hidden, *args[1:]), call

    with ExitStack() as stack:
        for index in range(entry + 1) if entry else ():
            hook = layers[index].register_forward_pre_hook(
                lambda _, args, kwargs, index=index: before(index, args, kwargs), with_kwargs=True
            )
            stack.callback(hook.remove)
        yield


@torch.inference_mode()
def next_logits(model: Any, embeds: Tensor, entry: int, visual: Tensor) -> Tensor:
    """(1, V) logits of the token behind `embeds` (1, L, D), with visual rows that enter at layer `entry`."""
    info = inspect_model(model)
    with entering_at(info.layers, entry, visual):
        hidden = info.text(inputs_embeds=embeds, use_cache=False).last_hidden_state
    logits: Tensor = model.get_output_embeddings()(hidden[:, -1])
    return logits


@torch.inference_mode()
def embedded(model: Any, inputs: Any) -> tuple[Tensor, Tensor]:
    """(1, L, D) what the text model is fed with, the picture's features in it, and (L,) bool which of it is visual."""
    seen: list[Tensor] = []
    info = inspect_model(model)
    hook = info.text.register_forward_pre_hook(
        lambda _, __, kwargs: seen.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    try:
        model(**inputs, use_cache=False)
    finally:
        hook.remove()
    return seen[0], torch.isin(inputs["input_ids"][0], torch.tensor(info.visual_ids))


def answer(checkpoint: Checkpoint, embeds: Tensor, visual: Tensor, entry: int) -> str:
    """The greedy answer to one prompt."""
    model, tokenizer, said = checkpoint.model, checkpoint.processor.tokenizer, list[int]()
    for _ in range(LONGEST):
        token = int(next_logits(model, embeds, entry, visual).argmax())
        if token == tokenizer.eos_token_id:
            break
        said.append(token)
        own = model.get_input_embeddings()(torch.tensor([[token]]))
        embeds = torch.cat([embeds, own], 1)
    return str(tokenizer.decode(said, skip_special_tokens=True)).strip()


def measured(name: str, checkpoint: Checkpoint, task: Any) -> dict[str, Any]:
    """Scores by layer of entry, over the questions of a task."""
    points: dict[int, list[float]] = {entry: [] for entry in ENTRIES}
    for sample in task.samples:
        inputs = on_model(checkpoint.model, build_inputs(checkpoint.processor, list(sample.images), sample.question))
        embeds, visual = embedded(checkpoint.model, inputs)
        for entry in ENTRIES:
            said = answer(checkpoint, embeds, visual, entry)
            points[entry].append(MATCHES[task.match](said, sample.answers))
    clusters = [sample.cluster for sample in task.samples]
    scores = {str(entry): vars(score(values, clusters)) for entry, values in points.items()}
    return {"name": name, "layers": checkpoint.num_layers, "questions": len(task.samples), "scores": scores}


def table(record: dict[str, Any]) -> str:
    """The record as a Markdown table: right answers in percent, a model a row."""
    head = ("model", "questions", *(f"from layer {entry}" for entry in ENTRIES))
    rows = [
        (
            f"{one['name']}, {one['layers']} layers",
            str(one["questions"]),
            *(f"{100 * found['mean']:.1f} ± {100 * found['error']:.1f}" for found in one["scores"].values()),
        )
        for one in record["models"]
    ]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows))


if __name__ == "__main__":
    torch.set_num_threads(1)
    models = (
        ("digits", digits_checkpoint(), digits_task(limit=160)),
        ("reader", reader_checkpoint(), reader_task(limit=30)),
    )
    found = [measured(name, load_checkpoint(folder, "cpu"), task) for name, folder, task in models]
    (RESULTS / "late-entry.json").write_text(json.dumps({"models": found}, indent=1) + "\n", "utf-8")
    DOCUMENT.write_text(filled(DOCUMENT.read_text("utf-8"), table), "utf-8")
