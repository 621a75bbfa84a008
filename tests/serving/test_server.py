"""Engines in processes of their own: vLLM's multiprocess engine, tensor parallelism, and the OpenAI server."""

from __future__ import annotations

import base64
import json
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed: .ci/vllm sets up an environment that has it")

import psutil
from clients import answer, body, chats, post, post_with_headers, running
from qwen import masked_answers, with_pictures
from served import ABOUT_FILM, Question, Video, engine_processes, expected, films, questions, sampling
from transformers import AutoTokenizer

from internvl_checkpoints import PICTURE, save_internvl
from pyramiddrop import PyramidDrop
from qwen_checkpoints import CHAT_TEMPLATE, FILM, save_qwen
from reference import Rule

RULE = Rule([2, 4, 6], [0.5, 0.25, 0.125])
HALVES = PyramidDrop(layers=RULE.layers, keep=RULE.keep)
METHOD = ("--layers", "2,4,6", "--keep", "0.5,0.25,0.125")


@pytest.mark.fast_cases(1)
@pytest.mark.parametrize("options", [{}, {"max_num_batched_tokens": 24}], ids=["whole prompts", "in parts"])
def test_the_engine_in_a_process_of_its_own(llava: Path, options: dict[str, Any]) -> None:
    """There the scheduler is asynchronous, one step ahead of the answers."""
    asked = chats(9)
    with engine_processes(llava, HALVES, **options) as llm:
        outputs = llm.generate(
            [question.inputs for question in asked], [sampling(question.tokens) for question in asked], use_tqdm=False
        )
    assert [list(output.outputs[0].token_ids) for output in outputs] == expected(llava, asked, HALVES)


@pytest.mark.slow
@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="two workers need two cores")
@pytest.mark.parametrize("family", ["llava", "internvl", "qwen3_vl"])
def test_tensor_parallelism(family: str, llava: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two workers, half of the heads each: they must keep the same tokens, those of all heads."""
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
    with engine_processes(folder, HALVES, tensor_parallel_size=2, distributed_executor_backend="mp") as llm:
        outputs = llm.generate(
            [question.inputs for question in asked], [sampling(question.tokens) for question in asked], use_tqdm=False
        )
    assert [list(output.outputs[0].token_ids) for output in outputs] == wanted


@contextmanager
def server(folder: Path, *arguments: str) -> Iterator[str]:
    """vLLM's server under dropping; yields its address."""
    words = [str(folder), "--dtype", "float32", "--max-model-len", "512", "--enforce-eager", "--block-size", "32"]
    with running(folder, [*words, "--served-model-name", "tiny", "--backend", "vllm", *arguments]) as address:
        yield address


def stream_headers(address: str, asked: dict[str, Any]) -> Any:
    """The headers of a streamed reply, which is read to its end."""
    request = urllib.request.Request(
        f"{address}/v1/chat/completions",
        json.dumps(asked | {"stream": True}).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=300) as response:
        assert b"data: [DONE]" in response.read()
        return response.headers


def served(headers: Any) -> tuple[str | None, str | None]:
    """Keep ratios and visual tokens by stage, as a response tells them."""
    return headers["pyramiddrop-keep"], headers["pyramiddrop-visual-tokens"]


def test_the_openai_server_under_concurrent_clients(llava: Path) -> None:
    asked = chats(12)
    tokenizer = AutoTokenizer.from_pretrained(llava)
    wanted = [tokenizer.decode(ids) for ids in expected(llava, asked, HALVES)]
    with server(llava, *METHOD, "--max-num-batched-tokens", "48", "--max-num-seqs", "4") as address:
        with ThreadPoolExecutor(6) as clients:
            replies = list(clients.map(lambda question: post(address, body(question)), asked))
        with pytest.raises(urllib.error.HTTPError) as refused:
            post(address, body(asked[0]) | {"prompt_logprobs": 1})
        assert refused.value.code == 400
        assert b"prompt_logprobs" in refused.value.read()
        again = post(address, body(asked[1]))
        (more, _), (all_kept, _) = told = [
            post_with_headers(address, body(asked[0]) | {"vllm_xargs": {"pyramiddrop": it}}) for it in (0.9, "off")
        ]
        assert [served(headers) for _, headers in told] == [("0.9,0.81,0.729", "16,14,12,11"), ("1,1,1", "16,16,16,16")]
        assert served(stream_headers(address, body(asked[1]))) == ("0.5,0.25,0.125", "32,16,8,4")
        assert served(stream_headers(address, body(asked[2]))) == (None, None), "there is no picture in it"
        with pytest.raises(urllib.error.HTTPError) as wrong:
            post(address, body(asked[0]) | {"vllm_xargs": {"pyramiddrop": 2}})
        assert wrong.value.code == 400
        assert "must be a λ in (0, 1]" in json.load(wrong.value)["error"]["message"]
        metrics = urllib.request.urlopen(f"{address}/metrics", timeout=60).read().decode()
    assert [answer(reply) for reply in replies] == wanted
    assert answer(again) == wanted[1]
    for reply, method in ((more, PyramidDrop(layers=RULE.layers, keep=[0.9, 0.81, 0.729])), (all_kept, None)):
        assert answer(reply) == tokenizer.decode(expected(llava, asked[:1], method)[0])
    counted = dict(re.findall(r"^(pyramiddrop:\S+?)(?: |\{.*\} )(\S+)$", metrics, re.MULTILINE))
    pictures = sum(len(question.images) for question in asked) + 4 + 2  # asked[1] twice again, with two; asked[0], one
    assert float(counted["pyramiddrop:visual_tokens_total"]) == 16 * pictures
    assert float(counted["pyramiddrop:visual_tokens_dropped_total"]) == 14 * (pictures - 2) + 5
    assert float(counted["pyramiddrop:kv_cache_bytes_saved_total"]) > 0
    assert float(counted["pyramiddrop:prefill_flops_saved_total"]) > 0
    assert 'pyramiddrop:requests_total{asked="request",keep="1,1,1"} 1.0' in metrics
    assert 'pyramiddrop:requests_total{asked="request",keep="0.9,0.8,0.75"} 1.0' in metrics, "rounded"
    said = (llava / "server.log").read_text()
    assert "16 visual tokens (16 → 8 → 4 → 2)" in said
    assert re.search(r"INFO .*PyramidDrop drops visual tokens before layers 2, 4, 6 and keeps 0.5, 0.25, 0.125", said)
    assert re.search(r"INFO .*the KV cache holds [\d,]+ tokens of text, or [\d,]+ visual tokens", said)


@pytest.mark.slow
def test_a_killed_engine_ends_answers_and_server(llava: Path) -> None:
    """No client is left waiting for an engine that was killed amid its answer."""
    with server(llava, *METHOD) as address:
        request = urllib.request.Request(
            f"{address}/v1/chat/completions",
            json.dumps(body(chats(1)[0]) | {"max_tokens": 400, "stream": True}).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as response:
            assert response.readline().startswith(b"data: ")
            alive = [
                child
                for child in psutil.Process().children(recursive=True)
                if child.name().startswith("VLLM::EngineCor") and child.status() != psutil.STATUS_ZOMBIE
            ]
            [engine] = alive
            engine.kill()
            chunks = [json.loads(line[6:]) for line in response if line.startswith(b"data: {")]
        assert len(chunks) < 400
        assert "error" in chunks[-1], "the stream says that the answer is not whole"
        ended = time.monotonic() + 60
        while time.monotonic() < ended:
            try:
                urllib.request.urlopen(f"{address}/health", timeout=5)
            except urllib.error.HTTPError:
                time.sleep(0.5)  # it is shutting down
            except OSError:
                return
        raise AssertionError("the server outlives its engine")


@pytest.mark.slow
def test_data_parallelism(llava: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks of a dense model are independent engines behind one server."""
    monkeypatch.setenv("VLLM_CPU_SIM_MULTI_NUMA", "1")  # on a CPU vLLM gives each rank a memory node of its own
    asked = chats(12)
    tokenizer = AutoTokenizer.from_pretrained(llava)
    with (
        server(llava, *METHOD, "--data-parallel-size", "2", "--max-num-seqs", "2") as address,
        ThreadPoolExecutor(6) as clients,
    ):
        replies = list(clients.map(lambda question: post(address, body(question)), asked))
    assert [answer(reply) for reply in replies] == [tokenizer.decode(ids) for ids in expected(llava, asked, HALVES)]


@pytest.mark.slow
def test_a_video_over_http(tmp_path: Path) -> None:
    """A file that the client sends, decoded by vLLM; the reference is given the same frames."""
    cv2 = pytest.importorskip("cv2", reason="the film of this test is written by OpenCV")
    from vllm.multimodal.video import VIDEO_LOADER_REGISTRY

    folder, file = save_qwen(tmp_path / "qwen", "qwen2_5_vl", CHAT_TEMPLATE), tmp_path / "film.mp4"
    noise = films(1, "", "")[0].frames
    writer = cv2.VideoWriter(str(file), cv2.VideoWriter_fourcc(*"mp4v"), ABOUT_FILM["fps"], noise.shape[2:0:-1])
    for frame in noise:
        writer.write(frame)
    writer.release()
    frames, about = VIDEO_LOADER_REGISTRY.load("opencv").load_bytes(file.read_bytes())
    assert {name: about[name] for name in ABOUT_FILM} == ABOUT_FILM
    asked = [Video(f"user {FILM} w5 w{number} w7", (), 8, frames) for number in range(20, 23)]
    wanted = [AutoTokenizer.from_pretrained(folder).decode(ids) for ids in masked_answers(folder, asked, RULE)]
    with server(folder, *METHOD) as address:
        replies = [post_with_headers(address, film_body(question, file)) for question in asked]
    assert [answer(reply) for reply, _ in replies] == wanted
    assert [served(headers)[1] for _, headers in replies] == ["12,6,3,1"] * 3


def film_body(question: Question, file: Path) -> dict[str, Any]:
    """A question about the video in `file` as a client sends it."""
    url = "data:video/mp4;base64," + base64.b64encode(file.read_bytes()).decode()
    film = {"type": "video_url", "video_url": {"url": url}}
    text = {"type": "text", "text": question.prompt.removeprefix(f"user {FILM} ")}
    return body(Question("", (), question.tokens)) | {"messages": [{"role": "user", "content": [film, text]}]}
