"""The arithmetic of LLaVA-NeXT's high-resolution grid: how many visual tokens a picture of a size becomes."""

from __future__ import annotations


def token_count(grid: tuple[int, int], side: int, height: int, width: int, class_token: bool) -> int:
    """Tokens of a picture: the base crop of `side` x `side`, and the unpadded `grid` with one newline token a row."""
    _, _, rows, columns = unpadded(*grid, height, width)
    return side * side + class_token + rows * (columns + 1)


def unpadded(rows: int, columns: int, height: int, width: int) -> tuple[int, int, int, int]:
    """What stays of a `rows` x `columns` grid around a picture of `height` x `width`: top, left, rows, columns.

    It follows Transformers' `unpad_image`, its rounding included, for the number of tokens depends on it.
    """
    if width / height > columns / rows:
        padding = (rows - int(round(height * (columns / width), 7))) // 2
        return padding, 0, rows - 2 * padding, columns
    padding = (columns - int(round(width * (rows / height), 7))) // 2
    return 0, padding, rows, columns - 2 * padding
