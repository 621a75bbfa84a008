"""Add response headers with the keep ratios and visual tokens of a request."""

from __future__ import annotations

from collections.abc import Sequence
from contextvars import ContextVar
from typing import Any

#: The keep ratios and visual tokens of each prompt of the current HTTP call.
_served: ContextVar[list[tuple[Sequence[float], Sequence[int]]] | None] = ContextVar("pyramiddrop_served", default=None)

KEEP, VISUAL_TOKENS = b"pyramiddrop-keep", b"pyramiddrop-visual-tokens"


def note_served(keep: Sequence[float], visual: Sequence[int]) -> None:
    """Note a prompt for the headers of its response; no effect outside a server with `PruningHeaders`.

    Args:
        keep: the keep ratio of each drop.
        visual: number of visual tokens in each stage, including the first one.
    """
    served = _served.get()
    if served is not None:
        served.append((keep, visual))


class PruningHeaders:
    """ASGI middleware for vLLM's server: `--middleware pyramiddrop.vllm.response_headers.PruningHeaders`.

    Responses about pictures or videos get two headers: `pyramiddrop-keep`, the keep ratio of each drop, and
    `pyramiddrop-visual-tokens`, the number of visual tokens in each stage, over all prompts of the request.
    """

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        served: list[tuple[Sequence[float], Sequence[int]]] = []
        token = _served.set(served)
        start: dict[str, Any] | None = None

        async def send_with_headers(message: dict[str, Any]) -> None:
            # A stream sends its headers before its request is read, so they wait for the first part of the body.
            nonlocal start
            if message["type"] == "http.response.start":
                start = message
                return
            if start is not None:
                await send({**start, "headers": [*start.get("headers", ()), *_headers(served)]})
                start = None
            await send(message)

        try:
            await self._app(scope, receive, send_with_headers)
        finally:
            _served.reset(token)


def _headers(served: Sequence[tuple[Sequence[float], Sequence[int]]]) -> list[tuple[bytes, bytes]]:
    if not served:
        return []
    keep, _ = served[0]  # a call has a single set of sampling parameters
    visual = [sum(counts) for counts in zip(*(counts for _, counts in served), strict=True)]
    return [
        (KEEP, ",".join(f"{ratio:g}" for ratio in keep).encode()),
        (VISUAL_TOKENS, ",".join(map(str, visual)).encode()),
    ]
