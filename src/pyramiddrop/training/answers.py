"""Find the supervised tokens: the answers, as the chat template itself writes them."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.utils.chat_template_utils import render_jinja_template

from pyramiddrop.training.samples import BrokenSampleError, Message

IGNORED_LABEL = -100
Span = tuple[int, int]


@dataclass(frozen=True)
class Rendered:
    """A conversation as text; `answers` are the ranges of characters that the model shall learn to write."""

    text: str
    answers: list[Span]


class ConversationWriter:
    """Writes conversations by a processor's chat template, and knows which characters are answers.

    A template that marks its answers with `{% generation %}` is taken at its word. With any other, an answer is what
    follows when `add_generation_prompt` has been written: the words, and whatever ends the turn.

    Args:
        processor: of the model; it must have a chat template.
    """

    def __init__(self, processor: Any) -> None:
        self.processor = processor
        self.template: str = processor.chat_template
        self.marked = re.search(r"\{%-?\s*generation\s*-?%\}", self.template) is not None

    def write(self, messages: Sequence[Message]) -> Rendered:
        """The text of a conversation, and where its answers are.

        Raises:
            BrokenSampleError: where the template refuses the conversation, or writes earlier turns anew when a further
                one is added, so that no one can tell what the model would have to say.
        """
        if self.marked:
            text, answers = self._render(messages, marked=True)
            return Rendered(text, [(start, stop) for start, stop in answers])
        return self._by_prefixes(messages)

    def _by_prefixes(self, messages: Sequence[Message]) -> Rendered:
        text, answers = self._render(messages)[0], []
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            prompt = self._render(messages[:number], prompt=True)[0]
            until = self._render(messages[: number + 1])[0]
            if not (until.startswith(prompt) and text.startswith(until)):
                raise BrokenSampleError(
                    "the chat template writes earlier turns anew when a further one is added; use one that marks its "
                    "answers with {% generation %}"
                )
            answers.append((len(prompt), len(until)))
        return Rendered(text, answers)

    def _render(
        self, messages: Sequence[Message], prompt: bool = False, marked: bool = False
    ) -> tuple[str, Sequence[Sequence[int]]]:
        try:
            texts, spans = render_jinja_template(
                [list(messages)],
                chat_template=self.template,
                add_generation_prompt=prompt,
                return_assistant_tokens_mask=marked,
                **self.processor.tokenizer.special_tokens_map,
            )
        except Exception as error:  # a template may raise whatever it likes; Jinja's own errors have no common class
            raise BrokenSampleError(f"the chat template refuses it: {error}") from error
        return texts[0], spans[0] if marked else []


def answer_mask(offsets: Tensor, answers: Sequence[Span], expansions: Sequence[dict[str, Any]]) -> Tensor:
    """(L,) bool: the tokens that overlap an answer.

    Args:
        offsets: (L, 2), the characters of each token in the text whose images have been expanded; equal for padding.
        answers: ranges of characters in the text before that.
        expansions: of the processor: for each image its `span` before and its `new_span` after.
    """
    ends = [expansion["span"][1] for expansion in expansions]
    moved = [0, *(expansion["new_span"][1] - expansion["span"][1] for expansion in expansions)]
    mask = torch.zeros(len(offsets), dtype=torch.bool)
    for span in answers:
        start, stop = (character + moved[bisect_right(ends, character)] for character in span)
        mask |= (offsets[:, 0] < stop) & (offsets[:, 1] > start)
    return mask & (offsets[:, 0] < offsets[:, 1])
