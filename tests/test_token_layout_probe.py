"""A picture with one lit spot: the visual token whose place covers the spot is the one whose pixels are lit."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from pyramiddrop.inference.prompt import image_token
from pyramiddrop.report.token_layout.views import CannotPlaceError, place_pictures
from spot_probe import SIZES, SPOTS, assert_lit, lit, token_light

pytest.importorskip("transformers", minversion="5.23")

from spot_probe_families import CENTRED, FAMILIES, SLACK
from spot_probe_grids import GRIDS, grid_inputs, pixtral, prompt_inputs, stand_in
from zoo import MEMBERS
from zoo.vision import IMAGE

DARK = (-9, -9)
SHAPES = pytest.mark.parametrize("size", SIZES, ids=["square", "wide", "tall"])


@pytest.mark.fast_cases(6)
@SHAPES
@pytest.mark.parametrize("family", FAMILIES)
def test_crops(family: str, size: tuple[int, int]) -> None:
    model, processor = FAMILIES[family]()
    shown = 0
    for place in SPOTS:
        picture = lit(size, place)
        inputs, dark = (_inputs(processor, one) for one in (picture, lit(size, DARK)))
        seen = place_pictures(model.config, processor, [picture], inputs)
        shown += assert_lit(seen, token_light(model, inputs, dark), place, SLACK.get(family, 0.2))
    assert shown >= (1 if family in CENTRED else len(SPOTS))


@pytest.mark.fast_cases(4)
@pytest.mark.parametrize("family", ["internvl", "idefics3", "gemma3", "llava_next", "llava_onevision", "ovis2"])
def test_the_second_of_two_pictures(family: str) -> None:
    model, processor = FAMILIES[family]()
    for place in SPOTS:
        first, second = lit(SIZES[1], DARK), lit(SIZES[2], place)
        inputs = _inputs(processor, first, second)
        dark = _inputs(processor, first, lit(SIZES[2], DARK))
        seen, light = place_pictures(model.config, processor, [first, second], inputs), token_light(model, inputs, dark)
        before = sum(one.view.tokens for one in seen if one.picture is first)
        assert light[:before].max() < 1e-4 < light[before:].max()
        own = [one for one in seen if one.picture is second]
        assert all(one.view.name.endswith(" 2") for one in own)
        assert assert_lit(own, light[before:], place)


@pytest.mark.fast_cases(6)
@SHAPES
@pytest.mark.parametrize("family", GRIDS)
def test_grids_of_patches(family: str, size: tuple[int, int]) -> None:
    model, processor = MEMBERS[family].build(0), GRIDS[family]()
    for place in SPOTS:
        picture = lit(size, place)
        inputs, dark = (grid_inputs(family, model, processor, one) for one in (picture, lit(size, DARK)))
        seen = place_pictures(model.config, stand_in(processor), [picture], inputs)
        assert assert_lit(seen, token_light(model, inputs, dark), place) == 1


@pytest.mark.fast_cases(4)
@SHAPES
@pytest.mark.parametrize("family", ["mistral3", "lighton_ocr"])
def test_grids_of_pixels(family: str, size: tuple[int, int]) -> None:
    model, processor = MEMBERS[family].build(0), pixtral(2)
    for place in SPOTS:
        picture = lit(size, place)
        inputs, dark = (_pixtral_inputs(family, model, processor, one) for one in (picture, lit(size, DARK)))
        seen = place_pictures(model.config, None, [picture], inputs)
        assert assert_lit(seen, token_light(model, inputs, dark), place) == 1


def test_a_processors_outputs_must_be_those_of_the_pictures() -> None:
    config = SimpleNamespace(model_type="qwen2_vl")
    for outputs in (None, {}, {"image_grid_thw": [(1, 4, 4)] * 2}):
        with pytest.raises(ValueError, match="qwen2_vl needs the processor's image_grid_thw, one row a picture"):
            place_pictures(config, stand_in(SimpleNamespace(merge_size=2)), [Image.new("RGB", (50, 50))], outputs)


@pytest.mark.parametrize(
    ("family", "reason"),
    [("idefics2", "a resampler"), ("blip-2", "a Q-Former"), ("qwen9", "nobody has worked out here")],
)
def test_families_without_known_places_are_refused_with_the_reason(family: str, reason: str) -> None:
    with pytest.raises(CannotPlaceError, match=f"of model type '{family}': {reason}"):
        place_pictures(SimpleNamespace(model_type=family), None, [])


def _inputs(processor: Any, *pictures: Image.Image) -> Any:
    text = " ".join(["w5", *[image_token(processor)] * len(pictures), "w7"])
    images: Any = [list(pictures)] if len(pictures) > 1 else list(pictures)
    return processor(images=images, text=[text], return_tensors="pt")


def _pixtral_inputs(family: str, model: Any, processor: Any, picture: Image.Image) -> Any:
    made = dict(processor(images=[picture], return_tensors="pt"))
    height, width = made["image_sizes"][0].tolist()
    return prompt_inputs(family, model, [IMAGE] * (height // 14 * (width // 14)), made)
