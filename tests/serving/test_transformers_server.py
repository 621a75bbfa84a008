"""`pyramiddrop serve --backend transformers`: Transformers' own OpenAI server, asked by the openai client."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="Transformers' server needs transformers[serving]")
pytest.importorskip("uvicorn", reason="Transformers' server needs transformers[serving]")
pytest.importorskip("openai", reason="the client is not installed")

from clients import body, chats, running
from openai import OpenAI
from served import expected
from transformers import AutoTokenizer

from pyramiddrop import PyramidDrop

HALVES = PyramidDrop(layers=[2, 4, 6], keep=[0.5, 0.25, 0.125])
METHOD = ("--layers", "2,4,6", "--keep", "0.5,0.25,0.125")


@pytest.fixture(scope="module")
def client(llava: Path) -> Iterator[Any]:
    words = [str(llava), "--backend", "transformers", *METHOD, "--dtype", "float32", "--device", "cpu"]
    with running(llava, words) as address:
        yield OpenAI(base_url=f"{address}/v1", api_key="none")


def asked_of(client: Any, folder: Path, question: Any, **options: Any) -> Any:
    words = body(question)
    return client.chat.completions.create(
        model=str(folder), messages=words["messages"], max_tokens=question.tokens, temperature=0, **options
    )


def test_four_clients_are_answered_as_by_the_adapter(client: Any, llava: Path) -> None:
    asked = chats(8)
    tokenizer = AutoTokenizer.from_pretrained(llava)
    wanted = [tokenizer.decode(ids, skip_special_tokens=True) for ids in expected(llava, asked, HALVES)]
    assert wanted != [tokenizer.decode(ids, skip_special_tokens=True) for ids in expected(llava, asked, None)]
    with ThreadPoolExecutor(4) as clients:
        replies = list(clients.map(lambda question: asked_of(client, llava, question), asked))
    assert [reply.choices[0].message.content for reply in replies] == wanted


def test_a_stream_is_the_same_answer(client: Any, llava: Path) -> None:
    question = chats(2)[1]
    [wanted] = expected(llava, [question], HALVES)
    parts = asked_of(client, llava, question, stream=True)
    text = "".join(part.choices[0].delta.content or "" for part in parts if part.choices)
    assert text == AutoTokenizer.from_pretrained(llava).decode(wanted, skip_special_tokens=True)
