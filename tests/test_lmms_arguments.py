"""What is checked of lmms-eval's model arguments and backends without lmms-eval."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest

from pyramiddrop import Downsample, FastV, Method, PyramidDrop, RandomDrop, UniformDrop, VisionDrop
from pyramiddrop.evaluation.lmms import run
from pyramiddrop.evaluation.lmms.arguments import pick_backend, read_arguments, write_arguments
from pyramiddrop.evaluation.lmms.meter import CostSums
from pyramiddrop.inference import InputError
from pyramiddrop.method_spec import NAMES, option_names


def test_method_and_backend_are_told_apart() -> None:
    given = {"method": "fastv", "layer": 3, "keep": 0.25, "backend": "generic", "num_frames": 8, "dtype": "float32"}
    read = read_arguments("a", given)
    assert read.method == FastV(layer=3, keep=0.25)
    assert read.backend == "generic"
    assert read.passed == {"num_frames": 8, "dtype": "float32"}


def test_lists_have_slashes_and_fields_alone_mean_pyramiddrop() -> None:
    read = read_arguments("a", {"layers": "8/16/24", "keep": "0.5/0.25/0.125", "per_image": True})
    assert read.method == PyramidDrop(layers=[8, 16, 24], keep=[0.5, 0.25, 0.125], per_image=True)
    assert read_arguments("a", {"method": "vanilla"}).method is None
    assert read_arguments("a", {"lam": 1}).method == PyramidDrop(lam=1.0)


def test_a_composition_is_one_method_and_what_stands_beside_it_is_for_the_inside() -> None:
    words = {"method": "vision:keep=0.3 | pyramiddrop:layers=8/16:keep=0.5/0.25"}
    inside = PyramidDrop(layers=[8, 16], keep=[0.5, 0.25])
    assert read_arguments("a", words).method == VisionDrop(keep=0.3) | inside
    words = {"method": "vision|fastv", "layer": 3, "positions": "compact", "per_image": True}
    shared = {"positions": "compact", "per_image": True}
    assert read_arguments("a", words).method == VisionDrop(**shared) | FastV(layer=3, **shared)


def test_without_a_word_the_saved_method_counts(tmp_path: Path) -> None:
    assert read_arguments(str(tmp_path), {}).method == PyramidDrop()
    FastV(layer=1, keep=0.75).save_pretrained(tmp_path)
    assert read_arguments(str(tmp_path), {}).method == FastV(layer=1, keep=0.75)
    assert read_arguments(str(tmp_path), {"lam": 0.4}).method == PyramidDrop(lam=0.4)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"method": "nothing"}, "'nothing' is not one of"),
        ({"method": "fastv", "lam": 0.5}, "lam does not belong to the method 'fastv'"),
        ({"method": "vanilla", "lam": 0.5}, "vanilla drops no tokens"),
        ({"lam": "half"}, "lam .*must be a number; got 'half'"),
        ({"lam": 1.5}, "lam|share|keep"),
        ({"method": "fastv|vision"}, "the one that drops before the decoder comes first"),
    ],
)
def test_bad_arguments_are_one_line(given: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_arguments("a", given)


@pytest.mark.parametrize(
    "method",
    [
        None,
        PyramidDrop(),
        PyramidDrop(lam=1 / 3, stages=3, positions="compact", per_image=True),
        PyramidDrop(layers=[1, 5], keep=[0.7, 0.2]),
        FastV(layer=3, keep=0.1),
        RandomDrop(seed=None),
        UniformDrop(lam=0.25),
        FastV(score="key_norm", random_from=3),
        PyramidDrop(score="diversity", reserve=0.1, merge=True),
        VisionDrop(keep=0.3) | PyramidDrop(layers=[1, 5], keep=[0.7, 0.0]),
        VisionDrop(score="random", positions="compact") | FastV(positions="compact"),
        Downsample() | PyramidDrop(),
    ],
)
def test_what_is_written_is_read_again(method: Method | None) -> None:
    text = write_arguments("some/model", method, {"dtype": "float32", "backend": None})
    parts = dict(part.split("=", 1) for part in text.split(","))  # as lmms-eval splits it
    assert parts.pop("pretrained") == "some/model"
    read = read_arguments("some/model", parts)
    assert read.method == method
    assert read.passed == {"dtype": "float32"}


def test_what_cannot_be_written_is_refused() -> None:
    class Mine(PyramidDrop):
        pass

    with pytest.raises(InputError, match="comma"):
        write_arguments("runs/a,b", None, {})
    with pytest.raises(InputError, match="Mine has none"):
        write_arguments("a", Mine(), {})
    with pytest.raises(InputError, match="Mine has none"):
        write_arguments("a", VisionDrop() | Mine(), {})
    with pytest.raises(InputError, match="a scorer by its name alone"):
        write_arguments("a", PyramidDrop(score={"name": "top_heads", "share": 0.5}), {})


@pytest.mark.parametrize(
    ("family", "batch", "processes", "device", "picked"),
    [
        ("llava_next", 1, 1, "cpu", "llava_hf"),
        ("llava", 2, 1, "cpu", "generic"),
        ("llava", 1, 2, "cpu", "generic"),
        ("llava_onevision", 1, 8, "cuda:3", "llava_hf"),
        ("qwen2_5_vl", 4, 1, "cuda:0", "qwen2_5_vl"),
        ("qwen3_vl_moe", 1, 1, "cpu", "qwen3_vl"),
        ("internvl", 1, 1, "cpu", "generic"),
    ],
)
def test_the_automatic_backend(family: str, batch: int, processes: int, device: str, picked: str) -> None:
    assert pick_backend("auto", family, batch, processes, device).name == picked


@pytest.mark.parametrize(
    ("name", "family", "batch", "processes", "message"),
    [
        ("vllm", "llava", 1, 1, "'vllm' is not one of auto, llava_hf, qwen2_5_vl, qwen3_vl, generic"),
        ("qwen3_vl", "llava", 1, 1, "takes qwen3_vl, qwen3_vl_moe, and this checkpoint is llava; use backend=generic"),
        ("llava_hf", "llava", 4, 1, "takes batch_size 1; got 4; use backend=generic"),
        ("qwen3_vl", "qwen3_vl", 1, 2, "runs 2 processes on CUDA only"),
    ],
)
def test_a_backend_that_does_not_fit(name: str, family: str, batch: int, processes: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        pick_backend(name, family, batch, processes, "cpu")


def test_no_argument_of_a_backend_is_a_field_of_a_method() -> None:
    """Else it would never reach the backend."""
    taken = set().union(*map(option_names, NAMES.values()))
    lmms_eval = {"revision", "attn_implementation", "use_cache", "max_frames_num", "chat_template", "max_pixels", "fps"}
    ours = {"pretrained", "method", "backend", "device", "device_map", "dtype", "batch_size", "num_frames"}
    assert taken.isdisjoint(lmms_eval | ours)


def test_averages_are_of_requests_and_leave_out_what_is_not_known() -> None:
    one, two = CostSums(1, 10, 5, 4, 8, 2, 8), CostSums(1, 30, 15, 8, 16, 4, 16)
    found = (one + two).averages()
    assert found["requests_measured"] == 2
    assert (found["visual_tokens"], found["retained_visual_tokens"]) == (20, 10)
    assert (found["prefill_flops"], found["flops_ratio"]) == (6, 0.5)
    assert (found["kv_bytes"], found["kv_ratio"]) == (3, 0.25)
    unknown = CostSums(1, 10, 5, *4 * [float("nan")]).averages()
    assert set(unknown) == {"requests_measured", "visual_tokens", "retained_visual_tokens"}
    assert CostSums().averages() == {}


@pytest.mark.skipif(find_spec("lmms_eval") is not None, reason="lmms-eval is installed")
def test_without_lmms_eval_one_line_says_so() -> None:
    with pytest.raises(InputError, match=r"lmms-eval is not installed: pip install 'pyramiddrop\[eval\]'"):
        run.run_tasks("a", None, ["mme"])
