"""Score an answer against the right ones: exact match under a named normalisation, and VQA's soft accuracy."""

from __future__ import annotations

from collections.abc import Callable, Sequence

#: What an answer scores against the right ones, from 0 to 1.
Match = Callable[[str, Sequence[str]], float]


def same(answer: str, right: Sequence[str]) -> float:
    """1 where the answer is one of the right ones to the letter."""
    return float(answer in right)


def exact(answer: str, right: Sequence[str]) -> float:
    """1 where it is one of the right ones; case, surrounding space and a final full stop do not matter."""
    return float(plain(answer) in map(plain, right))


def vqa(answer: str, right: Sequence[str]) -> float:
    """VQA's soft accuracy (arXiv 1505.00468) of an answer that several people gave theirs for, under `plain`.

    Each person is left out in turn; with n of the others giving the answer it scores min(1, n / 3), and the mean of
    that counts. The official script rewrites articles, number words and punctuation besides; this does not. With
    fewer than four right answers it is `exact`.
    """
    given = [plain(one) for one in right]
    if len(given) < 4:
        return exact(answer, right)
    agree = given.count(plain(answer))
    missing_one = min(1.0, (agree - 1) / 3)  # one of those who gave this answer is left out
    return (agree * missing_one + (len(given) - agree) * min(1.0, agree / 3)) / len(given)


def plain(text: str) -> str:
    """The text without case, surrounding space and a final full stop."""
    return text.strip().removesuffix(".").rstrip().casefold()


#: By the names that a command line has for them.
MATCHES: dict[str, Match] = {"same": same, "exact": exact, "vqa": vqa}
