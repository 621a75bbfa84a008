"""What a response tells of the dropping, without a server."""

from __future__ import annotations

import asyncio
from typing import Any

from pyramiddrop.vllm.response_headers import PruningHeaders, note_served


def told(*served: tuple[list[float], list[int]], kind: str = "http") -> tuple[dict[bytes, bytes], list[bytes]]:
    """The headers and the body of a stream whose requests are read as it begins, as vLLM's server does."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"a", b"b")]})

        async def body() -> None:
            for keep, visual in served:
                note_served(keep, visual)
            await send({"type": "http.response.body", "body": b"1", "more_body": True})

        await asyncio.create_task(body())  # another task, which has a copy of the context
        await send({"type": "http.response.body", "body": b"2"})

    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(PruningHeaders(app)({"type": kind}, None, send))
    assert [message["type"] for message in sent] == ["http.response.start", *["http.response.body"] * 2]
    return dict(sent[0]["headers"]), [message["body"] for message in sent[1:]]


def test_keep_ratios_and_tokens_of_each_stage_are_told() -> None:
    headers, body = told(([0.5, 0.25], [16, 8, 4]))
    assert headers == {b"a": b"b", b"pyramiddrop-keep": b"0.5,0.25", b"pyramiddrop-visual-tokens": b"16,8,4"}
    assert body == [b"1", b"2"]


def test_tokens_of_several_prompts_are_added() -> None:
    headers, _ = told(([0.5], [16, 8]), ([0.5], [5, 2]))
    assert headers[b"pyramiddrop-visual-tokens"] == b"21,10"


def test_without_pictures_nothing_is_told() -> None:
    assert told()[0] == {b"a": b"b"}


def test_what_is_no_http_is_handed_on() -> None:
    assert told(([0.5], [16, 8]), kind="websocket")[0] == {b"a": b"b"}


def test_one_call_is_told_nothing_of_another() -> None:
    note_served([0.5], [16, 8])  # outside of any call
    assert told()[0] == {b"a": b"b"}
    told(([0.5], [16, 8]))
    assert told()[0] == {b"a": b"b"}
