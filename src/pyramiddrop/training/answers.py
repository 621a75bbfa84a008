"""Generate answers to evaluation samples while a model trains, and count those that are right."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from datasets import Dataset

from pyramiddrop.evaluation.tasks import exact
from pyramiddrop.inference.answer import answer_greedily
from pyramiddrop.inference.checkpoint import Checkpoint
from pyramiddrop.training.collate import AnswerCollator
from pyramiddrop.training.samples import Message

#: The logged name of the share of right answers.
EXACT_MATCH = "exact_match"
#: Tokens to generate beyond the longest right answer; longer answers are wrong anyway.
SPARE_TOKENS = 8


class AnswerCheck:
    """Generates a model's last answer of each conversation, and computes the share of exact matches.

    Answers are greedy, under the method that is applied to the model, if any. Case, surrounding space and a final full
    stop do not matter (`pyramiddrop.evaluation.tasks.exact`).

    Args:
        table: a table from `load_samples`.
        collator: writes the prompts, as in training.
        count: number of samples, spread evenly over the table; all if it has fewer.
        batch: number of prompts in a forward.
    """

    def __init__(self, table: Dataset, collator: AnswerCollator, count: int, batch: int) -> None:
        count = min(count, len(table))
        self.table = table.select([number * len(table) // count for number in range(count)])
        self.collator, self.batch = collator, batch
        self.right = [_text(messages[_last_answer(messages)]) for messages in self.table["messages"][:]]
        tokenizer = collator.processor.tokenizer
        self.max_new_tokens = max(len(tokenizer(text)["input_ids"]) for text in self.right) + SPARE_TOKENS

    def answers(self, model: Any, rank: int = 0, ranks: int = 1) -> list[str]:
        """The answers to every `ranks`-th sample, from `rank` on; the model's mode and random state are restored."""
        rows, checkpoint = range(rank, len(self.table), ranks), Checkpoint(model, self.collator.processor, "")
        texts: list[str] = []
        with _evaluating(model):
            for start in range(0, len(rows), self.batch):
                batch = [self.table[row] for row in rows[start : start + self.batch]]
                prompts = [{**row, "messages": row["messages"][: _last_answer(row["messages"])]} for row in batch]
                texts += answer_greedily(checkpoint, self.collator.prompts(prompts), self.max_new_tokens)
        return texts

    def exact_match(self, model: Any, rank: int, ranks: int, total: Callable[[float], float]) -> float:
        """The share of right answers, in [0, 1].

        Args:
            total: sums a number over all ranks, each of which answers a part of the samples.
        """
        texts = self.answers(model, rank, ranks)
        return total(sum(map(exact, texts, ([one] for one in self.right[rank::ranks])))) / len(self.table)


def _last_answer(messages: Sequence[Message]) -> int:
    return max(number for number, message in enumerate(messages) if message["role"] == "assistant")


def _text(message: Message) -> str:
    return " ".join(part["text"] for part in message["content"] if part["type"] == "text").strip()


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    """Context manager for evaluation mode, which preserves the random state of training."""
    was_training = model.training
    with keep_random_state():
        model.eval()
        try:
            yield
        finally:
            model.train(was_training)


@contextmanager
def keep_random_state() -> Iterator[None]:
    """Context manager that restores PyTorch's random state on the CPU and on this process's GPU."""
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices):
        yield
