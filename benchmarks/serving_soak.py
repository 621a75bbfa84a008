"""Send 1000 requests, some of them cut or with bad pictures, to plain vLLM and to PyramidDrop; print one JSON record.

python benchmarks/serving_soak.py > benchmarks/results/serving-soak.json

It needs the environment that `.ci/vllm` makes, and takes some minutes. 16 clients ask the bundled model of 64 visual
tokens over HTTP. A fifth of the requests are cut: the client closes the connection before the answer or amid it.
A tenth have a picture that cannot be read, and must be refused with status 400. Each other answer is compared with that
of Transformers, under the `hf` adapter where tokens are dropped.
"""

from __future__ import annotations

import json
import random
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from bundled_server import DIGITS, Reply, Server, ask, body, data_url, machine, serving
from transformers import AutoModelForImageTextToText, AutoProcessor

from pyramiddrop import PyramidDrop
from pyramiddrop.evaluation.digits import DigitsBenchmark, DigitsSample

REQUESTS, CLIENTS, EVERY = 1000, 16, 100  # memory is read after each hundred
CUT, BAD = 0.2, 0.1
NEW = 6  # tokens at most: a word or a number, and its end
VARIANTS = ("vanilla", "PyramidDrop")


@dataclass(frozen=True)
class Sent:
    """One request of the run.

    Attributes:
        sample: what it asks.
        kind: `whole`, `cut` or `bad`.
        cut_after: pieces of the answer after which the client goes; None reads to the end.
        picture: its address, if that is not the sample's picture.
    """

    sample: int
    kind: str
    cut_after: int | None = None
    picture: str | None = None


def main() -> None:
    """Measure, and print the record."""
    samples = list(DigitsBenchmark(scenes=60, questions_per_scene=3))
    plan = planned(samples)
    runs = {}
    with tempfile.TemporaryDirectory() as name:
        for variant in VARIANTS:
            wanted = expected(samples, variant)
            with serving(DIGITS, variant, Path(name)) as server:
                runs[variant] = soak(server, samples, plan, wanted)
            print(f"{variant}: {runs[variant]}", file=sys.stderr)
    json.dump({**machine(), "requests": REQUESTS, "clients": CLIENTS, "runs": runs}, sys.stdout, indent=1)
    print()


def planned(samples: Sequence[DigitsSample]) -> list[Sent]:
    """The same requests for all variants."""
    draw = random.Random(0)
    bad = broken_pictures(samples[0])
    plan = []
    for _ in range(REQUESTS):
        sample, chance = draw.randrange(len(samples)), draw.random()
        if chance < BAD:
            plan.append(Sent(sample, "bad", picture=draw.choice(bad)))
        elif chance < BAD + CUT:
            plan.append(Sent(sample, "cut", cut_after=draw.randrange(4)))
        else:
            plan.append(Sent(sample, "whole"))
    return plan


def broken_pictures(sample: DigitsSample) -> list[str]:
    """Addresses of a picture that is cut off, of bytes that are none, of no base64, and of no picture at all."""
    whole = data_url(sample.image)
    nothing = "data:image/png;base64,"
    return [whole[: len(whole) // 2], nothing + "bm90IGEgcGljdHVyZQ==", nothing + "%%%%", nothing]


@torch.inference_mode()
def expected(samples: Sequence[DigitsSample], variant: str) -> list[str]:
    """What Transformers answers, one question at a time."""
    model = AutoModelForImageTextToText.from_pretrained(DIGITS.folder, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(DIGITS.folder)
    found = []
    with nullcontext() if variant == "vanilla" else PyramidDrop()(model):
        for sample in samples:
            content = [{"type": "image"}, {"type": "text", "text": sample.question}]
            prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
            inputs = processor(text=[prompt], images=[sample.image], return_tensors="pt")
            ids = model.generate(**inputs, do_sample=False, max_new_tokens=NEW)[0, inputs["input_ids"].shape[1] :]
            found.append(processor.tokenizer.decode(ids, skip_special_tokens=True).strip())
    return found


def soak(server: Server, samples: Sequence[DigitsSample], plan: Sequence[Sent], wanted: Sequence[str]) -> Any:
    """What became of the requests, and the memory of the server in MiB at the start and after each hundred."""
    resident = [mib(server)]
    counts = dict.fromkeys(("answered", "wrong", "cut", "refused", "bad pictures answered", "lost"), 0)
    lock = threading.Lock()
    done = 0

    def send(one: Sent) -> None:
        nonlocal done
        sample = samples[one.sample]
        asked = body(one.picture or sample.image, sample.question, NEW)
        try:
            reply = ask(server.port, asked, one.cut_after)
        except OSError:
            reply = 0
        with lock:
            counts[outcome(one, reply, wanted[one.sample])] += 1
            done += 1
            if done % EVERY == 0:
                resident.append(mib(server))

    with ThreadPoolExecutor(CLIENTS) as clients:
        list(clients.map(send, plan))
    return {**counts, "left over": left_over(server), "resident_mib": resident}


def outcome(one: Sent, reply: Reply | int, wanted: str) -> str:
    """What became of a request."""
    if one.kind == "bad":
        return "refused" if reply == 400 else "bad pictures answered"
    if not isinstance(reply, Reply):
        return "lost"
    if one.kind == "cut":
        return "cut"
    return "answered" if reply.text == wanted else "wrong"


def left_over(server: Server, seconds: float = 30) -> dict[str, float]:
    """What the engine still holds when nobody asks any more; it may take a moment to see that a client has gone."""
    names = ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc")
    end = time.monotonic() + seconds
    while any(found := [server.metrics()[name] for name in names]) and time.monotonic() < end:
        time.sleep(0.5)
    return dict(zip(("running", "waiting", "kv_cache_share"), found, strict=True))


def mib(server: Server) -> int:
    """Memory of the server."""
    return server.resident_bytes() >> 20


if __name__ == "__main__":
    main()
