"""What is told of model families is what the zoo proves, what the engine refuses, and what the page says."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
import transformers
from transformers import PreTrainedModel
from typer.testing import CliRunner

from checks import kept_columns
from pyramiddrop import FastV, PyramidDrop, RandomDrop, UniformDrop, UnsupportedModelError, apply
from pyramiddrop import families as told
from pyramiddrop.cli.main import app
from pyramiddrop.families import FAMILIES, Limit
from pyramiddrop.hf.model_info import ModelInfo, check_compact_positions, check_grouping, inspect_model
from pyramiddrop.hf.versions import NEWEST_TESTED
from pyramiddrop.inference.catalog import BY_STRUCTURE, PROVEN, REFUSED, all_families
from zoo import MEMBERS, UNSUPPORTED, make_batch, make_rows
from zoo.pieces import collate
from zoo.vision import IMAGE

DOCS = Path(__file__).parents[1] / "docs"
METHODS = (PyramidDrop(), PyramidDrop(layers=[1], keep=[0.5]), FastV(layer=1), RandomDrop(), UniformDrop())

REFUSED_MEMBERS = [name for name in MEMBERS if FAMILIES[name.split("-")[0]].refused]
BUILT: dict[str, Callable[[], PreTrainedModel]] = {
    **{name: lambda name=name: MEMBERS[name].build(0) for name in REFUSED_MEMBERS},  # type: ignore[misc]
    **UNSUPPORTED,
}


def run(*words: str) -> str:
    """What the command prints."""
    result = CliRunner().invoke(app, ["families", *words])
    assert result.exit_code == 0, result.stderr
    return result.stdout


def members_of(family: str) -> list[str]:
    """A family's members of the zoo."""
    return [name for name in MEMBERS if name.split("-")[0] == family]


@cache
def parts_of(member: str) -> ModelInfo:
    """A member's parts; its model is not run."""
    return inspect_model(MEMBERS[member].build(0))


PROVEN_FAMILIES = [name for name in FAMILIES if not FAMILIES[name].refused]

# --- The entries and the zoo ----------------------------------------------------------------------------------------


def test_every_member_has_an_entry_and_every_proven_entry_a_member() -> None:
    assert {name.split("-")[0] for name in MEMBERS} <= set(FAMILIES)
    assert [name for name in PROVEN_FAMILIES if not members_of(name)] == []
    assert [name for name in UNSUPPORTED if not FAMILIES[name].refused] == []


def test_every_family_of_transformers_is_listed() -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as NAMES

    entries = all_families()
    assert set(NAMES) <= {entry.model_type for entry in entries}
    assert {entry.model_type for entry in entries if entry.status == BY_STRUCTURE} == set(NAMES) - set(FAMILIES)
    assert {entry.model_type for entry in entries if entry.status == PROVEN} == set(PROVEN_FAMILIES)


@pytest.mark.fast_cases(12)
@pytest.mark.parametrize("family", PROVEN_FAMILIES)
def test_an_entry_says_what_the_engine_does(family: str) -> None:
    entry, members = FAMILIES[family], [parts_of(name) for name in members_of(family)]
    assert {info.config.model_type for info in members} == {family}
    assert {info.text.config.model_type for info in members} == set(entry.text)
    assert ("video" in entry.modalities) == any(MEMBERS[name].video for name in members_of(family))
    kinds = [{scope.kind for scope in info.scopes} for info in members]
    mixed = any({"sliding", "full"} <= kind for kind in kinds)

    def tells(*limits: Limit) -> bool:
        return any(limit in entry.limits for limit in limits)

    assert tells(told.AXES, told.OWN_ROPE, told.DYNAMIC_ROPE) == any(
        refuses(lambda info=info: check_compact_positions(info)) for info in members
    )
    assert tells(told.WINDOWS) == mixed
    assert tells(told.ALL_WINDOWED) == any(kind == {"sliding"} for kind in kinds)
    assert tells(told.CHUNKS) == any("chunked" in kind for kind in kinds)
    assert tells(told.RECURRENT) == any("recurrent" in kind for kind in kinds)
    assert tells(told.SHARED) == any(list(info.sources) != list(range(len(info.layers))) for info in members)
    assert tells(told.FLOOR) == any(info.longest for info in members)
    assert not refuses(lambda: check_grouping(members[0], "image"))
    assert tells(told.FRAMES) == refuses(lambda: check_grouping(members[0], "frame")) or (
        "video" not in entry.modalities
    )


def refuses(check: Callable[[], object]) -> bool:
    """Whether it raises UnsupportedModelError."""
    try:
        check()
    except UnsupportedModelError:
        return True
    return False


@pytest.mark.parametrize("name", BUILT)
def test_a_refused_family_is_refused_by_name_and_never_half_patched(name: str) -> None:
    model = BUILT[name]()
    family = model.config.model_type
    attributes = [sorted(vars(module)) for module in model.modules()]
    for method in METHODS:
        with pytest.raises(UnsupportedModelError, match=f"'{family}' .* is not supported: ") as caught:
            apply(model, method)
        assert FAMILIES[family].refused in str(caught.value)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    assert [sorted(vars(module)) for module in model.modules()] == attributes


def test_what_is_refused_by_name_is_mostly_seen_by_structure_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only these need their entry: nothing in the model shows it."""
    for name in BUILT:
        monkeypatch.delitem(FAMILIES, name)
    assert {name for name, build in BUILT.items() if not refuses(lambda build=build: inspect_model(build()))} == {  # type: ignore[misc]
        "blip-2",
        "kosmos-2",
    }


@pytest.mark.parametrize("family", ["smolvlm", "llama4", "internvl"])
def test_a_quota_of_each_frame_is_refused_where_frames_are_images(family: str) -> None:
    model = MEMBERS[family].build(0)
    with pytest.raises(UnsupportedModelError, match=f"per_frame=True is not supported for '{family}'.*Use per_image="):
        apply(model, FastV(layer=4, per_frame=True))
    assert not any(module._forward_pre_hooks for module in model.modules())


# --- The command and the page ---------------------------------------------------------------------------------------


@pytest.mark.skipif(
    tuple(map(int, transformers.__version__.split(".")[:2])) != NEWEST_TESTED,
    reason="the page lists the families of the newest Transformers that is tested",
)
def test_the_page_is_what_the_command_prints() -> None:
    page = (DOCS / "families.md").read_text("utf-8")
    assert page == run("--markdown"), "run `make docs`"


def test_json_list_and_page_tell_the_same() -> None:
    listed, table = json.loads(run("--json"))["families"], run().splitlines()
    page = [line for line in (DOCS / "families.md").read_text("utf-8").splitlines() if line.startswith("| `")]
    assert [entry["family"] for entry in listed] == [entry.model_type for entry in all_families()]
    named = [entry for entry in listed if entry["status"] != BY_STRUCTURE]
    first_words = [line.split()[0] for line in table if line[:1].strip()]
    assert [word for word in first_words if word in {entry["family"] for entry in named}] == [
        entry["family"] for entry in named
    ]
    others = "".join(table).partition("nothing is proven")[2]
    assert all(entry["family"] in others for entry in listed if entry["status"] == BY_STRUCTURE)
    assert [entry["family"] for entry in named] == [line.split("`")[1] for line in page]
    for entry, row in zip(named, page, strict=True):
        assert f"| {entry['status']} |" in row
        assert (entry["refused"] or ", ".join(dict.fromkeys(limit["name"] for limit in entry["limits"]))) in row


def test_the_list_fits_a_terminal_of_80_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    lines = run().splitlines()
    assert all(len(line) <= 80 for line in lines)
    assert len(lines) < 150
    assert all(any(line.startswith(name) for line in lines) for name in FAMILIES)


def test_one_family_in_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    (tmp_path / "config.json").write_text('{"model_type": "gemma3"}')
    assert run("gemma3") == run(str(tmp_path))
    assert all(limit.description in run("gemma3") for limit in FAMILIES["gemma3"].limits)
    assert FAMILIES["mllama"].refused in run("mllama")
    assert json.loads(run("mllama", "--json"))["status"] == REFUSED
    assert "nothing is proven" in run("pp_chart2table")


@pytest.mark.parametrize(("words", "message"), [("lava", "did you mean llava"), ("xyz", "lists them")])
def test_what_is_no_family_is_one_line(words: str, message: str) -> None:
    result = CliRunner().invoke(app, ["families", words])
    assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (2, "", 1)
    assert message in result.stderr


def test_no_family_is_called_proven_that_fails_a_check() -> None:
    lines = [line for line in (DOCS / "conformance.md").read_text("utf-8").splitlines() if line.startswith("| `")]
    failing = {line.split("`")[1].split("-")[0] for line in lines if "✗" in line}
    assert failing & set(PROVEN_FAMILIES) == set()


# --- Images of several runs -----------------------------------------------------------------------------------------


@pytest.mark.fast_cases(12)
@pytest.mark.parametrize("family", PROVEN_FAMILIES)
def test_images_side_by_side_are_told_apart_or_the_entry_says_so(family: str) -> None:
    entry = FAMILIES[family]
    if entry.split or entry.image_lengths:
        return
    for name in members_of(family):
        model = MEMBERS[name].build(0)
        types = make_rows(MEMBERS[name], model, [["image", "image"]])[0].types
        runs = sum(kind > before for kind, before in zip(types, [0, *types], strict=False))
        assert (runs < 2) == (told.ADJACENT in entry.limits)


TOLD = ["gemma3", "gemma3n", "gemma4", "gemma4_unified", "chameleon", "kimi_k25", "muse_glimmer", "exaone4_5"]


@pytest.mark.parametrize("name", TOLD)
def test_images_are_told_apart_without_the_tokens_that_a_processor_writes_around_them(name: str) -> None:
    """A prompt of one's own may have nothing between them: sizes tell, also where `generate` hands none on."""
    member, model = MEMBERS[name], MEMBERS[name].build(0)
    row = make_rows(member, model, [[4, "image", "image", 6]])[0]
    bare = [(token, kind) for token, kind in zip(row.ids, row.types, strict=True) if kind]
    text = row.ids[:4], row.ids[-6:]
    row.ids, row.types = ([*text[0], *(t for t, _ in bare), *text[1]], [0] * 4 + [k for _, k in bare] + [0] * 6)
    row.labels = [-100] * len(row.ids)
    inputs = collate(member, model, [row])
    first = sum(row.pieces[0].types)
    method = UniformDrop(layers=[7], keep=[0.5], per_image=True)
    with method(model) as trace, torch.no_grad():
        for run in (lambda: model(**inputs), lambda: model.generate(**inputs, max_new_tokens=2, do_sample=False)):
            run()
            left = trace.stages[0].kept[0] - 4
            assert [int((left < first).sum()), int((left >= first).sum())] == [first // 2, (len(bare) - first) // 2]


@pytest.mark.parametrize("name", ["gemma3", "gemma3n", "gemma4", "cohere2_vision"])
@pytest.mark.parametrize("layers", [[1, 2], [3], [4], [5, 6]])
def test_a_static_cache_is_refused_for_its_windows(name: str, layers: list[int]) -> None:
    """Whether or not the window's layer is the one that drops, and before anything has run."""
    member, model = MEMBERS[name], MEMBERS[name].build(0)
    inputs = make_batch(member, model, [[4, "image", 6]])
    method = UniformDrop(layers=layers, keep=[0.5, 0.25][: len(layers)])
    with method(model), torch.no_grad(), pytest.raises(ValueError, match="StaticCache with layers that see a window"):
        model.generate(**inputs, max_new_tokens=2, do_sample=False, cache_implementation="static")


@pytest.mark.parametrize("name", ["cohere_compass", "gemma4", "muse_glimmer"])
@pytest.mark.parametrize("per", ["per_image", "per_frame"])
def test_the_frames_of_a_video_are_the_same_in_generate(per: str, name: str) -> None:
    """Its grids are not handed on; timestamps stand between the frames."""
    member, model = MEMBERS[name], MEMBERS[name].build(0)
    inputs = make_batch(member, model, [[5, "video", 4], [2, "video", 3, "video", 1]])
    with PyramidDrop(layers=[3, 7], **{per: True})(model) as trace, torch.no_grad():
        model(**inputs)
        expected = kept_columns(trace)
        model.generate(**inputs, max_new_tokens=2, do_sample=False)
        assert kept_columns(trace) == expected


@pytest.mark.parametrize(
    "name",
    [
        *("mistral3", "mistral3-mistral4", "lighton_ocr", "molmo2", "step3p7", "llava_next"),
        *("idefics3", "granite_docling", "cohere2_vision", "aya_vision"),
    ],
)
def test_a_forward_generation_and_beams_find_the_same_images(name: str) -> None:
    """Transformers hands pixels to a forward, but features that are already made to those of a generation."""
    member, model = MEMBERS[name], MEMBERS[name].build(0)
    row = [2, "image", 3, "image", 1, "image", 4]
    inputs = make_batch(member, model, [row] if "left_padding" in member.cannot else [row, [5, "image", 2, "image", 7]])
    with PyramidDrop(per_image=True, layers=[3, 7])(model) as trace, torch.no_grad():
        model(**inputs)
        expected = kept_columns(trace)
        model.generate(**inputs, max_new_tokens=2, do_sample=False)
        assert kept_columns(trace) == expected
        model.generate(**inputs, max_new_tokens=2, do_sample=False, num_beams=2)
        assert kept_columns(trace) in (
            expected,
            [[columns for columns in stage for _ in range(2)] for stage in expected],
        )


def test_a_video_of_molmo_2_has_one_quota() -> None:
    member, model = MEMBERS["molmo2"], MEMBERS["molmo2"].build(0)
    inputs = make_batch(member, model, [[3, "video", 2, "video", 4]])
    found = []
    with PyramidDrop(per_image=True, layers=[3], keep=[0.5])(model) as trace, torch.no_grad():
        for run_once in (lambda: model(**inputs), lambda: model.generate(**inputs, max_new_tokens=2, do_sample=False)):
            run_once()
            found.append(kept_columns(trace))
    columns = trace.visual_columns[0].tolist()
    middle = columns[len(columns) // 2]  # both videos have as many tokens
    assert found[0] == found[1]
    assert [sum(column < middle for column in found[0][0][0]), len(found[0][0][0])] == [
        len(columns) // 4,
        len(columns) // 2,
    ]


def test_a_call_that_does_not_tell_its_images_is_refused() -> None:
    member, model = MEMBERS["mistral3"], MEMBERS["mistral3"].build(0)
    inputs = make_batch(member, model, [[3, "image", 4]])
    embeds, visual = model.get_input_embeddings()(inputs["input_ids"]), inputs["input_ids"] == IMAGE
    with (
        PyramidDrop(per_image=True)(model, visual_mask=visual),
        pytest.raises(ValueError, match="does not tell which visual tokens are one image's, and breaks of rows stand"),
    ):
        model(inputs_embeds=embeds.detach())


def test_tiles_without_their_names_are_refused() -> None:
    member, model = MEMBERS["idefics3"], MEMBERS["idefics3"].build(0)
    inputs = make_batch(member, model, [[3, "image", 4]])
    inputs["input_ids"] = torch.where(
        inputs["input_ids"] == IMAGE, IMAGE, torch.arange(inputs["input_ids"].shape[1]) + 2
    )
    with (
        PyramidDrop(per_image=True)(model),
        pytest.raises(ValueError, match="does not tell which visual tokens are one image's, and tokens that name"),
    ):
        model(**inputs)
