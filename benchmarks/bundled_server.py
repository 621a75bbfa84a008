"""Serve a bundled model by vLLM's OpenAI server on a CPU, plain or dropping, and ask it.

What benchmarks/serving_http.py and benchmarks/serving_soak.py share.
"""

from __future__ import annotations

import base64
import http.client
import io
import json
import os
import platform
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from PIL import Image

from pyramiddrop.assets import digits_checkpoint, reader_checkpoint
from pyramiddrop.inference.serving import template_with_bos

STAGES = 4  # of the default method: each has a KV-cache group, whose blocks hold the tokens of its layers
NAME = "bundled"  # of the served model
BLOCK = 32  # tokens
KV_BYTES = 512 << 20
TICK = os.sysconf("SC_CLK_TCK")

#: Plain vLLM cannot load the bundled model: its tower has the names of Transformers 5, its heads a size that the
#: attention on a CPU lacks. The plugin does both for itself; this does the same for plain vLLM, and nothing else.
PLAIN = """
def register():
    from vllm.model_executor.models.llava import LlavaForConditionalGeneration as Llava
    from vllm.model_executor.models.utils import WeightsMapper
    from pyramiddrop.vllm.attention import pad_heads

    names = WeightsMapper(orig_to_new_prefix={"vision_tower.": "vision_tower.vision_model."})
    if not hasattr(Llava, "plain_bundled"):
        Llava.plain_bundled = Llava.__init__
        Llava.hf_to_vllm_mapper = Llava.hf_to_vllm_mapper | names
        Llava.__init__ = load

def load(self, *, vllm_config, prefix=""):
    from pyramiddrop.vllm.attention import pad_heads

    self.plain_bundled(vllm_config=vllm_config, prefix=prefix)
    for layer in self.language_model.model.layers:
        pad_heads(layer.self_attn.attn)
"""


@dataclass(frozen=True)
class Bundled:
    """One of the models that come with the library.

    Attributes:
        folder: of the checkpoint.
        layers: of its decoder.
        kv_width: values of a key, over all heads, as vLLM holds them: the reader's heads of 48 are padded to 64.
    """

    folder: Path
    layers: int
    kv_width: int


READER = Bundled(reader_checkpoint(), layers=12, kv_width=4 * 64)
DIGITS = Bundled(digits_checkpoint(), layers=8, kv_width=4 * 32)


@dataclass(frozen=True)
class Reply:
    """An answer that was streamed. Seconds of the wall clock, from sending the request on.

    Attributes:
        text: of the answer.
        first: until its first token.
        last: until its last one.
        tokens: of the answer.
    """

    text: str
    first: float
    last: float
    tokens: int


class Server:
    """A server that runs, and its processes."""

    def __init__(self, pid: int, port: int) -> None:
        self._pid, self.port = pid, port

    def cpu_seconds(self) -> float:
        """Of all its processes since they were started."""
        return sum(sum(map(int, _stat(pid)[11:13])) for pid in self._tree()) / TICK

    def resident_bytes(self) -> int:
        """Memory that its processes hold themselves, shared memory counted once for each."""
        pages = sum(int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in self._tree())
        return pages * os.sysconf("SC_PAGE_SIZE")

    def metrics(self) -> dict[str, float]:
        """Sums of vLLM's metrics over their labels."""
        text = urllib.request.urlopen(f"http://127.0.0.1:{self.port}/metrics", timeout=60).read().decode()
        found: dict[str, float] = {}
        for name, value in re.findall(r"^([a-z_:]+)(?:\{.*\})? (\S+)$", text, re.MULTILINE):
            found[name] = found.get(name, 0.0) + float(value)
        return found

    def _tree(self) -> list[int]:
        children: dict[int, list[int]] = {}
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    children.setdefault(int(_stat(int(entry.name))[1]), []).append(int(entry.name))
                except (FileNotFoundError, ProcessLookupError):
                    continue
        found = [self._pid]
        for pid in found:
            found += children.get(pid, [])
        return found


def _stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat from the state on."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


@contextmanager
def serving(bundled: Bundled, variant: str, folder: Path) -> Iterator[Server]:
    """A server of a bundled model: `vanilla` (plain vLLM) or `PyramidDrop` (the default, by `pyramiddrop serve`).

    Args:
        bundled: the model.
        variant: one of the two.
        folder: for its log and what plain vLLM needs to load the model.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    }
    model, layers = str(bundled.folder), bundled.layers
    if variant == "vanilla":
        environment["PYTHONPATH"] = os.pathsep.join([str(_plain(folder)), os.environ.get("PYTHONPATH", "")])
        command = [str(Path(sys.executable).parent / "vllm"), "serve", model]
        template = template_with_bos(model)  # for the same prompts
        command += ["--chat-template", template] if template else []
    else:
        layers //= STAGES  # a block holds the tokens of one group's layers
        command = [sys.executable, "-m", "pyramiddrop", "serve", model, "--backend", "vllm"]
    blocks = KV_BYTES // (layers * BLOCK * 2 * bundled.kv_width * 4)
    command += ["--port", str(port), "--host", "127.0.0.1", "--dtype", "float32"]
    command += ["--block-size", str(BLOCK), "--num-gpu-blocks-override", str(blocks)]
    command += ["--served-model-name", NAME, "--enforce-eager", "--disable-uvicorn-access-log"]
    with open(folder / f"{variant}.log", "w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
        try:
            _wait(process, port, folder / f"{variant}.log")
            yield Server(process.pid, port)
        finally:
            process.terminate()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)


def _plain(folder: Path) -> Path:
    """A folder for PYTHONPATH with a plugin that lets plain vLLM load the model."""
    path = folder / "plain"
    path.mkdir(exist_ok=True)
    (path / "plain_bundled.py").write_text(PLAIN)
    _describe(path, "plain-bundled", "0", "[vllm.general_plugins]\nplain_bundled = plain_bundled:register\n")
    _describe(path, "vllm", f"{version('vllm-cpu')}+cpu")  # vLLM's command asks for the version by this name
    return path


def _describe(folder: Path, name: str, number: str, entry_points: str = "") -> None:
    """Let `importlib.metadata` find a distribution in `folder`."""
    about = folder / f"{name.replace('-', '_')}-{number}.dist-info"
    about.mkdir(exist_ok=True)
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {number}\n")
    (about / "entry_points.txt").write_text(entry_points)


def _wait(process: subprocess.Popen[bytes], port: int, log: Path, seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.poll() is None:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
            return
        except OSError:
            time.sleep(0.5)
    raise RuntimeError("the server did not start:\n" + log.read_text()[-4000:])


def body(picture: Image.Image | str, question: str, tokens: int, *, to_the_end: bool = False) -> dict[str, Any]:
    """A chat about one picture, streamed. `to_the_end`: exactly so many `tokens`; else the model may end before."""
    content = [
        {"type": "image_url", "image_url": {"url": picture if isinstance(picture, str) else data_url(picture)}},
        {"type": "text", "text": question},
    ]
    return {
        "model": NAME,
        "messages": [{"role": "user", "content": content}],
        "max_tokens": tokens,
        "temperature": 0,
        "ignore_eos": to_the_end,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


def data_url(picture: Image.Image) -> str:
    """`picture` as a PNG in an address."""
    file = io.BytesIO()
    picture.save(file, "png", compress_level=1)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def ask(port: int, asked: dict[str, Any], cut_after: int | None = None) -> Reply | int:
    """Send a chat and read its stream.

    Args:
        port: of the server.
        asked: of `body`.
        cut_after: pieces of the answer after which the connection is closed, 0 closes it before the answer; None reads
            to the end.

    Returns:
        the reply, or the status of an error, which may come amid a stream.
    """
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
    start = time.perf_counter()
    try:
        connection.request(
            "POST", "/v1/chat/completions", json.dumps(asked).encode(), {"Content-Type": "application/json"}
        )
        if cut_after == 0:
            time.sleep(0.05)  # long enough to be read, not to be answered
            return Reply("", 0.0, 0.0, 0)
        response = connection.getresponse()
        if response.status != 200:
            response.read()
            return response.status
        return _read(response, start, cut_after)
    finally:
        connection.close()


def _read(response: Any, start: float, cut_after: int | None) -> Reply | int:
    text, tokens, pieces, first, last = "", 0, 0, 0.0, 0.0
    for line in response:
        if not line.startswith(b"data: {"):
            continue
        piece = json.loads(line[6:])
        if "error" in piece:
            return int(piece["error"]["code"])
        if piece.get("usage"):
            tokens = piece["usage"]["completion_tokens"]
        for choice in piece["choices"]:
            if choice["delta"].get("content") or choice.get("finish_reason"):
                last = time.perf_counter() - start
                first = first or last
            text += choice["delta"].get("content") or ""
        pieces += 1
        if cut_after is not None and pieces >= cut_after:
            break
    return Reply(text.strip(), first, last, tokens)


def machine() -> dict[str, Any]:
    """What was measured on; nothing that tells one machine from its like."""
    return {
        "machine": f"{os.cpu_count()}-core {platform.machine()} CPU container",
        "date": time.strftime("%Y-%m-%d"),
        "versions": {"vllm": version("vllm-cpu"), "torch": version("torch"), "transformers": version("transformers")},
    }
