"""Servers in processes of their own, as a user starts them, and what their clients ask."""

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
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image
from served import Question, picture


def chats(count: int) -> list[Question]:
    """Questions as the checkpoint's chat template writes them: no, one or two pictures, and a few words."""
    asked = []
    for number in range(count):
        pictures = tuple(picture(100 * number + k, 30 + 7 * number, 40) for k in range((1, 2, 0)[number % 3]))
        words = " ".join(f"w{(7 * number + k) % 180 + 5}" for k in range(3 + number))
        asked.append(Question(f"user {'<image> ' * len(pictures)}{words} assistant", pictures, 5 + number % 7))
    return asked


@contextmanager
def running(folder: Path, words: Sequence[str]) -> Iterator[str]:
    """`pyramiddrop serve` with `words`; yields its address. What it says is in `server.log` in `folder`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "pyramiddrop", "serve", *words, "--port", str(port), "--host", "127.0.0.1"]
    environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_LOGGING_LEVEL": "INFO"}
    with open(folder / "server.log", "w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        address = f"http://127.0.0.1:{port}"
        try:
            wait_until_healthy(process, address, folder / "server.log")
            yield address
        finally:
            process.terminate()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                raise


def wait_until_healthy(process: subprocess.Popen[bytes], address: str, log: Path, seconds: float = 600) -> None:
    """Return when the server at `address` answers; AssertionError if its `process` ends before, or if it takes longer.

    The error shows the end of `log`.
    """
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.poll() is None:
        try:
            urllib.request.urlopen(f"{address}/health", timeout=5)
            return
        except OSError:
            time.sleep(1)
    raise AssertionError("the server did not start:\n" + log.read_text()[-4000:])


def post(address: str, body: dict[str, Any]) -> Any:
    """The reply to a chat."""
    reply, _ = post_with_headers(address, body)
    return reply


def post_with_headers(address: str, body: dict[str, Any]) -> tuple[Any, Any]:
    """The reply to a chat, and its headers."""
    request = urllib.request.Request(
        f"{address}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=300) as response:
        return json.load(response), response.headers


def body(question: Question) -> dict[str, Any]:
    """A question of `chats` as a client sends it."""
    words = question.prompt.removeprefix("user ").removesuffix(" assistant").replace("<image> ", "")
    content: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": _url(one)}} for one in question.images]
    content.append({"type": "text", "text": words})
    return {
        "model": "tiny",
        "messages": [{"role": "user", "content": content}],
        "max_tokens": question.tokens,
        "temperature": 0,
        "ignore_eos": True,
        "skip_special_tokens": False,
    }


def answer(reply: Any) -> str:
    """Its text."""
    return str(reply["choices"][0]["message"]["content"]).strip()


def _url(one: Image.Image) -> str:
    file = io.BytesIO()
    one.save(file, "png")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
