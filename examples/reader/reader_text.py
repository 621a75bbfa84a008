"""The vocabulary and the tokenizer of the reader model, and questions as rows of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from shared import ASSISTANT, EOS, IGNORE, MARKS, PAD, make_tokenizer
from tokenizers import Regex, decoders
from transformers import PreTrainedTokenizerFast

from pyramiddrop.evaluation.reader.canvas import (
    CATEGORIES,
    COLOURS,
    DIGITS,
    EXTREMES,
    FIELDS,
    HEIGHTS,
    LINES,
    MOST_LINES,
    NOTHING,
    PLACES,
    SHAPES,
    SIDES,
    TITLES,
    Question,
)

ASKING = ("digit", "colour", "where", "there", "many", "thing", "value", "word", "read", "document", "bar", "point")
_THINGS = (*DIGITS, *COLOURS, *SHAPES, *HEIGHTS, *SIDES, *FIELDS, *TITLES, *CATEGORIES)
VOCABULARY = (*MARKS, *_THINGS, "yes", "no", *LINES, *EXTREMES, *PLACES, *ASKING, NOTHING)
TOKEN_ID = {word: index for index, word in enumerate(VOCABULARY)}

#: Words without which a question says the same.
FILLERS = (
    "a|an|and|are|at|can|do|does|for|has|have|how|in|is|it|me|of|on|or|please|s|"
    "tell|that|the|this|what|which|you|written|here"
)
REPLACED = {
    r"\bcolou?r(s|ed)?\b": "colour",
    r"\bcoloured\b": "colour",
    r"\bcenter\b": "centre",
    r"\bnumbers?\b": "digit",
    r"\bobjects?\b": "thing",
    **{rf"\b{word}s\b": word for word in ("digit", "thing", "word", "document", "bar", "point", "value")},
    r"\b(tallest|largest|biggest|longest|maximum|most)\b": "highest",
    r"\b(smallest|shortest|minimum|least)\b": "lowest",
    r"\s+": " ",
}
WORD = rf"\bline [1-{MOST_LINES}]\b|\b(?!(?:{FILLERS})\b)[a-z]+|[0-9]"

SLOTS, WIDTH = 26, 7  # questions behind a picture; tokens of the longest with its answer, but for the end mark
FORMATS = ("", f" {ASSISTANT}")  # what stands between a question and its answer: nothing at first, then as LLaVA has it


def reader_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer. A number is read and written digit by digit; its digits are joined again in the answer."""
    tokenizer = make_tokenizer(VOCABULARY, REPLACED, WORD, longest=1024)
    tokenizer.backend_tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace(Regex("$"), " "),
            decoders.Fuse(),
            decoders.Replace(Regex("(?<=[0-9]) (?=[0-9])"), ""),
            decoders.Replace(Regex(" $"), ""),
        ]
    )
    return tokenizer


@lru_cache(maxsize=1)
def _tokenizer() -> PreTrainedTokenizerFast:
    return reader_tokenizer()


@lru_cache(maxsize=20000)
def encode(text: str) -> tuple[int, ...]:
    """The tokens of a text, without a start mark."""
    return tuple(_tokenizer().encode(text, add_special_tokens=False))


def question_rows(questions: Sequence[Question], suffix: str) -> tuple[NDArray[Any], NDArray[Any]]:
    """Token ids and labels, (questions, WIDTH) each: a label stands where the model must predict it."""
    ids = np.full((len(questions), WIDTH + 1), TOKEN_ID[PAD], np.int16)
    labels = np.full_like(ids, IGNORE)
    for row, question in enumerate(questions):
        asked, answer = encode(question.text + suffix), (*encode(question.answer), TOKEN_ID[EOS])
        end = len(asked) + len(answer)
        if end > WIDTH + 1:
            raise ValueError(f"{question} takes {end - 1} tokens; a slot has {WIDTH}")
        ids[row, :end] = (*asked, *answer)
        labels[row, len(asked) : end] = answer
    return ids[:, :-1], labels[:, 1:]
