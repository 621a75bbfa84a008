"""Engines in processes of their own: vLLM's multiprocess engine, tensor parallelism, and the OpenAI server."""

from __future__ import annotations

import base64
import io
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed: .ci/vllm sets up an environment that has it")

from PIL import Image
from qwen import masked_answers, with_pictures
from served import Question, engine, expected, picture, questions, sampling
from transformers import AutoTokenizer

from internvl_checkpoints import PICTURE, save_internvl
from pyramiddrop import PyramidDrop
from qwen_checkpoints import save_qwen
from reference import Rule

RULE = Rule([2, 4, 6], [0.5, 0.25, 0.125])
HALVES = PyramidDrop(layers=RULE.layers, keep=RULE.keep)


def chats(count: int) -> list[Question]:
    """Questions as the checkpoint's chat template writes them: no, one or two pictures, and a few words."""
    asked = []
    for number in range(count):
        pictures = tuple(picture(100 * number + k, 30 + 7 * number, 40) for k in range((1, 2, 0)[number % 3]))
        words = " ".join(f"w{(7 * number + k) % 180 + 5}" for k in range(3 + number))
        asked.append(Question(f"user {'<image> ' * len(pictures)}{words} assistant", pictures, 5 + number % 7))
    return asked


@pytest.mark.parametrize("options", [{}, {"max_num_batched_tokens": 24}], ids=["whole prompts", "in parts"])
def test_the_engine_in_a_process_of_its_own(
    llava: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    """There the scheduler is asynchronous, one step ahead of the answers."""
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    asked = chats(9)
    with engine(llava, HALVES, **options) as llm:
        outputs = llm.generate(
            [question.inputs for question in asked], [sampling(question.tokens) for question in asked], use_tqdm=False
        )
    assert [list(output.outputs[0].token_ids) for output in outputs] == expected(llava, asked, HALVES)


@pytest.mark.slow
@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="two workers need two cores")
@pytest.mark.parametrize("family", ["llava", "internvl", "qwen3_vl"])
def test_tensor_parallelism(family: str, llava: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two workers, half of the heads each: they must keep the same tokens, those of all heads."""
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    if family == "qwen3_vl":  # three axes of positions, norms of queries and keys, features added to the first layers
        folder, asked = save_qwen(tmp_path, family), [with_pictures(question) for question in questions(6)]
        wanted = masked_answers(folder, asked, RULE)
    elif family == "internvl":
        folder = save_internvl(tmp_path)
        asked = [Question(one.prompt.replace("<image>", PICTURE), one.images, one.tokens) for one in questions(6)]
        wanted = expected(folder, asked, HALVES)
    else:
        folder, asked = llava, chats(9)
        wanted = expected(folder, asked, HALVES)
    with engine(folder, HALVES, tensor_parallel_size=2, distributed_executor_backend="mp") as llm:
        outputs = llm.generate(
            [question.inputs for question in asked], [sampling(question.tokens) for question in asked], use_tqdm=False
        )
    assert [list(output.outputs[0].token_ids) for output in outputs] == wanted


@contextmanager
def server(folder: Path, *arguments: str) -> Iterator[str]:
    """`pyramiddrop serve` as a user starts it; yields its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [str(folder), "--port", str(port), "--host", "127.0.0.1", "--dtype", "float32", "--max-model-len", "512"]
    words += ["--enforce-eager", "--block-size", "32", "--served-model-name", "tiny", *arguments]
    environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    log = open(folder / "server.log", "w")  # noqa: SIM115 - the process writes to it
    process = subprocess.Popen(
        [sys.executable, "-m", "pyramiddrop", "serve", *words], env=environment, stdout=log, stderr=log
    )
    address = f"http://127.0.0.1:{port}"
    try:
        _wait(process, address, folder)
        yield address
    finally:
        process.terminate()
        process.wait(60)
        log.close()


def _wait(process: subprocess.Popen[bytes], address: str, folder: Path, seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.poll() is None:
        try:
            urllib.request.urlopen(f"{address}/health", timeout=5)
            return
        except OSError:
            time.sleep(1)
    raise AssertionError("the server did not start:\n" + (folder / "server.log").read_text()[-4000:])


def post(address: str, body: dict[str, Any]) -> Any:
    request = urllib.request.Request(
        f"{address}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=300) as response:
        return json.load(response)


def body(question: Question) -> dict[str, Any]:
    words = question.prompt.removeprefix("user ").removesuffix(" assistant").replace("<image> ", "")
    content: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": _url(one)}} for one in question.images]
    content.append({"type": "text", "text": words})
    return {
        "model": "tiny",
        "messages": [{"role": "user", "content": content}],
        "max_tokens": question.tokens,
        "temperature": 0,
        "ignore_eos": True,
        "add_special_tokens": True,
        "skip_special_tokens": False,
    }


def answer(reply: Any) -> str:
    return str(reply["choices"][0]["message"]["content"]).strip()


def _url(one: Image.Image) -> str:
    file = io.BytesIO()
    one.save(file, "png")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def test_the_openai_server_under_concurrent_clients(llava: Path) -> None:
    asked = chats(12)
    tokenizer = AutoTokenizer.from_pretrained(llava)
    wanted = [tokenizer.decode(ids) for ids in expected(llava, asked, HALVES)]
    method = ("--layers", "2,4,6", "--keep", "0.5,0.25,0.125")
    with server(llava, *method, "--max-num-batched-tokens", "48", "--max-num-seqs", "4") as address:
        with ThreadPoolExecutor(6) as clients:
            replies = list(clients.map(lambda question: post(address, body(question)), asked))
        with pytest.raises(urllib.error.HTTPError) as refused:
            post(address, body(asked[0]) | {"prompt_logprobs": 1})
        assert refused.value.code == 400
        assert b"prompt_logprobs" in refused.value.read()
        again = post(address, body(asked[1]))
    assert [answer(reply) for reply in replies] == wanted
    assert answer(again) == wanted[1]
    said = (llava / "server.log").read_text()
    assert "16 visual tokens (16 → 8 → 4 → 2)" in said
    assert "prefix caching is switched off" in said
