"""Owns the words of the digits model: its vocabulary, its tokenizer and its chat template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import reduce

import numpy as np
from numpy.typing import NDArray
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from pyramiddrop.evaluation.digits import (
    ANSWER_WORDS,
    ARGUMENTS,
    COLOUR_NAMES,
    EMPTY,
    GRID,
    KIND_NAMES,
    MAX_ANSWER,
    QuestionBatch,
    question_text,
)

PAD, BOS, EOS, UNK, IMAGE, USER, ASSISTANT = "<pad>", "<s>", "</s>", "<unk>", "<image>", "USER:", "ASSISTANT:"
NOTHING = "empty"
ROWS = tuple(f"row {row + 1}" for row in range(GRID))
COLUMNS = tuple(f"column {column + 1}" for column in range(GRID))
DIGITS = tuple(map(str, range(10)))
MARKS = (PAD, BOS, EOS, UNK, IMAGE, USER, ASSISTANT)
VOCABULARY = (*MARKS, *DIGITS, *ROWS, *COLUMNS, *COLOUR_NAMES, "digit", "colour", "row", "column", "read", NOTHING)
TOKEN_ID = {word: index for index, word in enumerate(VOCABULARY)}
IGNORE = -100

#: Words without which a question says the same: the tokenizer skips them, and all punctuation.
FILLERS = (
    "a|an|and|are|at|can|colored|coloured|does|has|have|in|is|it|me|number|of|on|please|s|tell|"
    "that|the|there|what|which|you"
)
REPLACED = {
    r"\bcolors?\b": "colour",
    r"\bcolours\b": "colour",
    r"\bdigits\b": "digit",
    r"\bcol\b": "column",
    r"\s+": " ",
}
WORD = rf"\b(?:row|column) [1-8]\b|\b(?!(?:{FILLERS})\b)[a-z]+|[0-9]"

#: LLaVA-1.5's format: "USER: <image>\nquestion ASSISTANT: answer</s>USER: question ASSISTANT:".
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ message['role'].upper() + ': ' }}"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}"
    "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>\\n' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
    "{% endif %}"
    "{{ '</s>' if message['role'] == 'assistant' else ' ' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def make_tokenizer(
    vocabulary: Sequence[str] = VOCABULARY,
    replaced: Mapping[str, str] = REPLACED,
    word: str = WORD,
    longest: int = 512,
) -> PreTrainedTokenizerFast:
    """A word-level tokenizer. What `word` does not match, such as punctuation and filler words, does not count."""
    tokens = {word: index for index, word in enumerate(vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(tokens, unk_token=UNK))
    replacements = [normalizers.Replace(Regex(pattern), word) for pattern, word in replaced.items()]
    tokenizer.normalizer = normalizers.Sequence([normalizers.Lowercase(), *replacements])
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(word), behavior="removed", invert=True)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, TOKEN_ID[BOS])])
    tokenizer.add_tokens([AddedToken(mark, normalized=False, special=False) for mark in (USER, ASSISTANT)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        unk_token=UNK,
        extra_special_tokens={"image_token": IMAGE},
        padding_side="left",
        model_max_length=longest,
        clean_up_tokenization_spaces=False,
    )


class QuestionTokens:
    """Turns question arrays into token arrays, by tables that the tokenizer itself filled."""

    def __init__(self, suffix: str = f" {ASSISTANT}") -> None:
        tokenizer = make_tokenizer()
        encoded = {
            (kind, argument): tokenizer.encode(question_text(name, argument) + suffix, add_special_tokens=False)
            for kind, name in enumerate(KIND_NAMES)
            for argument in range(ARGUMENTS[name])
        }
        longest = max(map(len, encoded.values()))
        shape = (len(KIND_NAMES), max(ARGUMENTS.values()))
        self.questions = np.full((*shape, longest), TOKEN_ID[PAD])
        self.lengths = np.zeros(shape, int)
        for place, ids in encoded.items():
            self.questions[place][: len(ids)] = ids
            self.lengths[place] = len(ids)
        self.answers = np.array([*(TOKEN_ID[word] for word in ANSWER_WORDS), TOKEN_ID[PAD]])  # EMPTY is the last
        read = KIND_NAMES.index("read_row")
        reach = [self.lengths[kind].max() + (MAX_ANSWER if kind == read else 1) for kind in range(len(KIND_NAMES))]
        self.width = int(reduce(max, reach))  # a slot: the question and all of its answer but the end mark

    def __call__(self, batch: QuestionBatch) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Token ids and labels, (B, K, width) each: a label stands where the model must predict it."""
        lengths = self.lengths[batch.kinds, batch.arguments]
        full = np.full((*lengths.shape, self.width + 1), TOKEN_ID[PAD])
        labels = np.full_like(full, IGNORE)
        questions = self.questions[batch.kinds, batch.arguments][..., : self.width + 1]
        full[..., : questions.shape[-1]] = questions
        count = (batch.answers != EMPTY).sum(-1)
        for place in range(MAX_ANSWER + 1):
            code = batch.answers[..., place] if place < MAX_ANSWER else np.full_like(lengths, EMPTY)
            token = np.where(place < count, self.answers[code], TOKEN_ID[EOS])
            where = np.nonzero(place <= count)
            full[(*where, lengths[where] + place)] = token[where]
            labels[(*where, lengths[where] + place)] = token[where]
        return full[..., :-1].astype(np.int64), labels[..., 1:].astype(np.int64)
