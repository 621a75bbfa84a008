"""Score an answer against the right ones: exact match under a named normalisation, and VQA's soft accuracy."""

from __future__ import annotations

from collections.abc import Callable, Sequence

#: Scores an answer against the right ones, from 0 to 1.
Match = Callable[[str, Sequence[str]], float]


def same(answer: str, right: Sequence[str]) -> float:
    """1 if the answer equals one of the right ones exactly."""
    return float(answer in right)


def exact(answer: str, right: Sequence[str]) -> float:
    """1 if it is one of the right ones, ignoring case, surrounding space and a final full stop."""
    return float(plain(answer) in map(plain, right))


def vqa(answer: str, right: Sequence[str]) -> float:
    """VQA's soft accuracy (arXiv 1505.00468) of an answer against those of several people, compared by `plain`.

    Each person is left out in turn; if n of the others gave the answer, it scores min(1, n / 3), and the score is the
    mean of these. The official script also normalises articles, number words and punctuation; this function does not.
    With fewer than four right answers it is `exact`.
    """
    given = [plain(one) for one in right]
    if len(given) < 4:
        return exact(answer, right)
    agree = given.count(plain(answer))
    missing_one = min(1.0, (agree - 1) / 3)  # if one of those who gave this answer is left out
    return (agree * missing_one + (len(given) - agree) * min(1.0, agree / 3)) / len(given)


def plain(text: str) -> str:
    """The text without case, surrounding space and a final full stop."""
    return text.strip().removesuffix(".").rstrip().casefold()


#: The rules by their names on the command line.
MATCHES: dict[str, Match] = {"same": same, "exact": exact, "vqa": vqa}
