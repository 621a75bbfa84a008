"""The reader benchmark: scenes, documents and charts of 336 x 336 pixels, with questions that have one right answer."""

from pyramiddrop.evaluation.reader.benchmark import GROUPS, KINDS, ReaderBenchmark, ReaderSample, draw_picture
from pyramiddrop.evaluation.reader.canvas import IMAGE, PATCH, Picture, Question

__all__ = [
    "GROUPS",
    "IMAGE",
    "KINDS",
    "PATCH",
    "Picture",
    "Question",
    "ReaderBenchmark",
    "ReaderSample",
    "draw_picture",
]
