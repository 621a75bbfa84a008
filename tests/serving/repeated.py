"""Prompts that begin alike, asked one after the other, and how many tokens of each the prefix cache knew."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from served import Question, blocks_in_use, picture, sampling, scheduler

BLOCK = 32


def words(count: int, first: int) -> str:
    return " ".join(f"w{first + number % 90}" for number in range(count))


def about(pictures: Sequence[int], question: int, before: int = 20, after: int = 9) -> Question:
    """A prompt of `before` words, pictures by number, and a question of `after` words, told apart by its number."""
    marks = " ".join("<image>" for _ in pictures)
    return Question(f"{words(before, 5)} {marks} {words(after, 10 + question)}", tuple(map(picture, pictures)), 6)


def ask(llm: Any, asked: Sequence[Question], extra: Any = None) -> tuple[list[list[int]], list[int]]:
    """Answers, one request after the other, and of how many tokens of each prompt the cache knew."""
    found, hits = [], []
    for question in asked:
        [output] = llm.generate([question.inputs], sampling(question.tokens, extra_args=extra), use_tqdm=False)
        found.append(list(output.outputs[0].token_ids))
        hits.append(output.num_cached_tokens)
    assert blocks_in_use(scheduler(llm)) == 0
    return found, hits
