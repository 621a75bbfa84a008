"""A method in words: what every verb reads, options beside it, and one line for every bad word."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pyramiddrop import Downsample, FastV, Method, PyramidDrop, RandomDrop, VisionDrop
from pyramiddrop.cli.options import MethodOptions
from pyramiddrop.inference import InputError
from pyramiddrop.inference.resolve import parse_method, resolve_method


@pytest.mark.parametrize(
    ("method", "options", "spec", "expected"),
    [
        (None, {}, None, PyramidDrop()),
        ("vanilla", {}, "vanilla", None),
        ("fastv", {"layer": "3", "keep": "0.25"}, "fastv:keep=0.25,layer=3", FastV(layer=3, keep=0.25)),
        ("random", {"lam": "0.6"}, "random:lam=0.6", RandomDrop(lam=0.6)),
        ("fastv:layer=3", {"merge": True}, "fastv:layer=3:merge=true", FastV(layer=3, merge=True)),
        (
            None,
            {"layers": "2,4", "keep": "0.5,0.25"},
            "pyramiddrop:layers=2,4,keep=0.5,0.25",
            PyramidDrop(layers=[2, 4], keep=[0.5, 0.25]),
        ),
        (None, {"positions": "compact"}, "pyramiddrop:positions=compact", PyramidDrop(positions="compact")),
        (
            "vision:keep=0.4 | pyramiddrop",
            {"lam": "0.6", "positions": "compact"},
            "vision:keep=0.4:positions=compact | pyramiddrop:lam=0.6,positions=compact",
            VisionDrop(keep=0.4, positions="compact") | PyramidDrop(lam=0.6, positions="compact"),
        ),
        ("Downsample|FastV:layer=3", {}, "Downsample|FastV:layer=3", Downsample() | FastV(layer=3)),
    ],
)
def test_options_beside_a_method_are_words_of_it(
    tmp_path: Path, method: str | None, options: dict[str, Any], spec: str | None, expected: Method | None
) -> None:
    assert MethodOptions(**options).spec(method) == spec
    assert resolve_method(spec, tmp_path, num_layers=8) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("vanilla", None),
        ("pyramiddrop", PyramidDrop()),
        ("PyramidDrop:lam=0.6", PyramidDrop(lam=0.6)),
        ("FastV:layer=3", FastV(layer=3)),
        ("RandomDrop", RandomDrop()),
        ("pyramiddrop:merge=true,score=diversity", PyramidDrop(merge=True, score="diversity")),
        ("pyramiddrop:reserve=0.25,random_from=5", PyramidDrop(reserve=0.25, random_from=5)),
        ("pyramiddrop:lam=0.6,stages=3", PyramidDrop(lam=0.6, stages=3)),
        ("pyramiddrop:layers=2/4,keep=0.5/0.25", PyramidDrop(layers=[2, 4], keep=[0.5, 0.25])),
        ("pyramiddrop:layers=3,keep=1", PyramidDrop(layers=[3], keep=[1.0])),
        ("fastv:layer=3:keep=0.25", FastV(layer=3, keep=0.25)),
        ("pyramiddrop:layers=2,4:keep=0.5,0.25", PyramidDrop(layers=[2, 4], keep=[0.5, 0.25])),
        ("random:seed=7,per_image=true", RandomDrop(seed=7, per_image=True)),
        ("random:seed=none,positions=compact", RandomDrop(seed=None, positions="compact")),
    ],
)
def test_a_method_in_one_word(text: str, expected: Method | None) -> None:
    assert parse_method(text) == expected


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("pyramid", "method 'pyramid' is not one of pyramiddrop, fastv, random, uniform"),
        ("vanilla:lam=0.5", "vanilla drops no tokens and has no options; got 'vanilla:lam=0.5'"),
        ("fastv:lam=0.5", "lam does not belong to the method 'fastv'"),
        ("fastv:rank_layer=next", "rank_layer does not belong to the method 'fastv'"),
        ("pyramiddrop:lam=0.5,keep=0.5", "give lam or keep, not both"),
        ("pyramiddrop:lam=0.5,lam=0.6", "'pyramiddrop:lam=0.5,lam=0.6' gives lam twice"),
        ("pyramiddrop:0.5", "'0.5' in 'pyramiddrop:0.5' is no option of a method"),
        ("pyramiddrop:lam=half", "lam in 'pyramiddrop:lam=half' must be a number; got 'half'"),
        ("pyramiddrop:stages=2.5", "must be a whole number; got '2.5'"),
        ("pyramiddrop:layers=2/x", "must be a whole number, or several with slashes between them, or none; got '2/x'"),
        ("pyramiddrop:per_image=maybe", "must be true or false; got 'maybe'"),
        ("fastv:keep=0.5/0.25", "must be a number; got '0.5/0.25'"),
        ("pyramiddrop:lam=2", "method 'pyramiddrop:lam=2': lam must be a number in (0, 1]; got 2.0"),
    ],
)
def test_a_method_in_a_wrong_word(text: str, words: str) -> None:
    with pytest.raises(InputError) as caught:
        parse_method(text)
    assert words in str(caught.value)


def test_a_method_must_fit_the_depth(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"layers must be in 1\.\.3"):
        resolve_method("pyramiddrop:layers=4", tmp_path, num_layers=4)
