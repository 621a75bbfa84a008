"""Backends: what lmms-eval's own classes and ours make of messages, and that the method is really on their model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from asking import TASK, Turns, answers, requests, user
from onevision import save_onevision
from PIL import Image

from checkpoints import save_checkpoint
from pyramiddrop import PyramidDrop
from pyramiddrop.assets import digits_checkpoint
from pyramiddrop.evaluation.digits import DigitsBenchmark
from pyramiddrop.evaluation.lmms.arguments import BACKENDS
from pyramiddrop.evaluation.lmms.model import DroppingChat
from pyramiddrop.hf.attachment import Attachment
from pyramiddrop.inference import InputError
from qwen_checkpoints import CHAT_TEMPLATE, save_qwen

METHOD = {"method": "pyramiddrop", "layers": "2/4", "keep": "0.5/0.25"}
DROP = PyramidDrop(layers=[2, 4], keep=[0.5, 0.25])


def picture(seed: int, width: int = 84, height: int = 56) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8))


ASKED: list[Turns] = [
    user(picture(1), "w5 w9 w17"),
    user(picture(2, 112, 56), picture(3), "w40 w41"),
    user(picture(4, 56, 112), "w50 w3 w8 w9 w10"),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny checkpoint of each family."""
    made = tmp_path_factory.mktemp("checkpoints")
    return {
        "llava": save_checkpoint(made / "llava"),
        "qwen2_5_vl": save_qwen(made / "qwen2_5_vl", "qwen2_5_vl", CHAT_TEMPLATE),
        "qwen3_vl": save_qwen(made / "qwen3_vl", "qwen3_vl", CHAT_TEMPLATE, patch=16),
        "llava_next": save_checkpoint(made / "next", "next"),
        "llava_onevision": save_onevision(made / "onevision"),
    }


@contextmanager
def overheard(model: Any) -> Iterator[list[dict[str, Any]]]:
    """What `model.generate` is given inside the block."""
    calls: list[dict[str, Any]] = []
    generate = model.generate
    model.generate = lambda **inputs: calls.append(inputs) or generate(**inputs)
    try:
        yield calls
    finally:
        del model.generate


def decoded(backend: Any, call: dict[str, Any], output: torch.Tensor) -> str:
    return str(backend.tokenizer.decode(output[0, call["input_ids"].shape[1] :], skip_special_tokens=True))


@pytest.mark.parametrize("family", ["llava", "llava_next", "llava_onevision", "qwen2_5_vl", "qwen3_vl"])
def test_prompts_are_lmms_evals_and_the_method_is_on_its_model(folders: dict[str, Path], family: str) -> None:
    source, name = str(folders[family]), family if family.startswith("qwen") else "llava_hf"
    kind = getattr(import_module(BACKENDS[name].module), BACKENDS[name].kind)
    theirs = kind(pretrained=source, device="cpu", device_map="cpu")
    theirs._model = theirs._model.float()
    theirs.task_dict = {TASK: {"test": ASKED}}
    with overheard(theirs.model) as calls:
        plain = [one.text for one in theirs.generate_until(requests(theirs, ASKED))]
    ours = DroppingChat(source, device="cpu", backend=name, method="vanilla")
    ours.inner._model.float()
    assert answers(ours, ASKED) == plain

    dropping = DroppingChat(source, device="cpu", **METHOD)
    dropping.inner._model.float()
    found = answers(dropping, ASKED)
    expected = []
    for call in calls:
        with DROP(theirs.model) as trace, torch.inference_mode():
            expected.append(decoded(theirs, call, theirs.model.generate(**call)))
        assert trace.lengths[0] > trace.lengths[-1]
    assert found == expected
    assert found != plain
    spent = dropping.meter.by_task[TASK].averages()
    assert spent["retained_visual_tokens"] < spent["visual_tokens"]
    assert spent["flops_ratio"] < 1
    assert spent["kv_ratio"] < 1


@pytest.mark.parametrize("family", ["llava", "llava_next", "llava_onevision", "qwen2_5_vl"])
def test_generic_in_batches_equals_one_at_a_time_and_the_wrapped(folders: dict[str, Path], family: str) -> None:
    asked = [*ASKED, user("w7 w7"), user(picture(9), "w1")]
    single = DroppingChat(str(folders[family]), device="cpu", backend="generic", **METHOD)
    batched = DroppingChat(str(folders[family]), device="cpu", backend="generic", batch_size=3, **METHOD)
    assert answers(batched, asked) == answers(single, asked)
    one, many = single.meter.by_task[TASK], batched.meter.by_task[TASK]
    assert one.averages() == pytest.approx(many.averages())
    assert one.requests == len(asked)
    if family.startswith("llava"):
        wrapped = DroppingChat(str(folders[family]), device="cpu", backend="llava_hf", **METHOD)
        # Of LLaVA-OneVision lmms-eval's class cuts several pictures into crops, too; the processor by itself does not.
        alike = [ASKED[0], ASKED[2]] if family == "llava_onevision" else ASKED
        assert answers(wrapped, alike) == answers(single, alike)


def test_automatic_choice() -> None:
    digits = str(digits_checkpoint())
    assert type(DroppingChat(digits, device="cpu").inner).__name__ == "LlavaHf"
    assert type(DroppingChat(digits, device="cpu", batch_size=2).inner).__name__ == "Chat"
    with pytest.raises(InputError, match="backend llava_hf takes batch_size 1; got 2; use backend=generic"):
        DroppingChat(digits, device="cpu", batch_size=2, backend="llava_hf")
    with pytest.raises(InputError, match=r"backend generic: .*unexpected keyword argument 'max_pixels'"):
        DroppingChat(digits, device="cpu", backend="generic", max_pixels=3)
    with pytest.raises(InputError, match="batch_size must be a whole number of at least 1; got 'auto'"):
        DroppingChat(digits, device="cpu", batch_size="auto")


def digits_asked(count: int) -> list[Turns]:
    scenes = list(DigitsBenchmark("test", 1))[:count]
    return [user(sample.image, sample.question) for sample in scenes]


def test_an_answer_ends_where_the_task_says() -> None:
    model = DroppingChat(str(digits_checkpoint()), device="cpu", backend="generic", batch_size=4)
    asked = digits_asked(12)
    whole = answers(model, asked)
    assert any(" " in text for text in whole)
    assert answers(model, asked, until=[" "]) == [text.split(" ")[0] for text in whole]
    assert answers(model, asked, until=" ") == [text.split(" ")[0] for text in whole]
    first = answers(model, asked, max_new_tokens=1)
    assert first != whole
    assert all(text.startswith(word) for word, text in zip(first, whole, strict=True))


def test_generation_arguments_reach_generate_and_requests_keep_theirs() -> None:
    model = DroppingChat(str(digits_checkpoint()), device="cpu", backend="generic", method="random")
    asked = digits_asked(3)
    greedy, sampled = requests(model, asked), requests(model, asked, temperature=0.7, top_p=0.9, image_sizes="odd")
    given = []
    inner, generate = model.inner.model, model.inner.model.generate
    inner.__dict__["generate"] = lambda **inputs: given.append(inputs) or generate(**inputs)
    model.generate_until([greedy[0], sampled[1], greedy[2]])
    settings = [(call["do_sample"], call["temperature"], call["top_p"]) for call in given]
    assert sorted(settings, key=str) == [(False, None, None), (False, None, None), (True, 0.7, 0.9)]
    assert "image_sizes" not in given[0] | given[1] | given[2]
    wrapped = DroppingChat(str(digits_checkpoint()), device="cpu", backend="llava_hf")
    asked_again = requests(wrapped, asked)
    wrapped.generate_until(asked_again)
    assert [one.args[2] for one in asked_again] == [{"max_new_tokens": 6}] * 3


def test_beams_cost_a_request_what_one_beam_does() -> None:
    model = DroppingChat(str(digits_checkpoint()), device="cpu", backend="generic", batch_size=2)
    asked = digits_asked(4)
    answers(model, asked)
    one = model.meter.by_task.pop(TASK)
    answers(model, asked, num_beams=3)
    assert model.meter.by_task[TASK].averages() == pytest.approx(one.averages())


@pytest.fixture(scope="module")
def film(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A video of 12 frames, 4 a second."""
    path = str(tmp_path_factory.mktemp("films") / "film.mp4")
    writer = cv2.VideoWriter(path, cv2.VideoWriter_fourcc(*"mp4v"), 4, (84, 56))
    for number in range(12):
        writer.write(np.asarray(picture(number)))
    writer.release()
    return path


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_videos_of_lmms_evals_classes(folders: dict[str, Path], film: str, family: str) -> None:
    turns: Turns = [{"role": "user", "content": [{"type": "video", "url": film}, {"type": "text", "text": "w4"}]}]
    model = DroppingChat(str(folders[family]), device="cpu", max_num_frames=4, **METHOD)
    assert answers(model, [turns])[0]
    spent = model.meter.by_task[TASK]
    # layers 0-1, 2-3 and 4-7 of 8 see all, half and a quarter of the visual tokens
    assert spent.retained_tokens == spent.visual_tokens * (2 * 1 + 2 * 0.5 + 4 * 0.25) / 8


def test_videos_of_the_generic_backend(folders: dict[str, Path], film: str) -> None:
    turns: Turns = [{"role": "user", "content": [{"type": "video", "url": film}, {"type": "text", "text": "w4"}]}]
    model = DroppingChat(str(folders["qwen2_5_vl"]), device="cpu", backend="generic", num_frames=4, **METHOD)
    assert answers(model, [turns])[0]
    few = model.meter.by_task.pop(TASK)
    assert few.retained_tokens < few.visual_tokens
    model.inner.num_frames = 8
    answers(model, [turns])
    assert model.meter.by_task[TASK].visual_tokens == 2 * few.visual_tokens
    clip = {"type": "video", "video": film, "video_start": 1.0, "video_end": 2.0}  # 4 frames a second
    [about] = model.inner._films([[{"content": [clip]}]])["video_metadata"]
    assert list(about.frames_indices) == [4, 5, 6, 7, 8]
    assert np.shape(clip["video"]) == (5, 56, 84, 3)
    with pytest.raises(InputError, match="a video must be a file; a task gave dict"):
        answers(model, [[{"role": "user", "content": [{"type": "video", "url": {"url": film}}]}]])


def test_without_a_chat_template(tmp_path: Path) -> None:
    bare = save_checkpoint(tmp_path / "bare", chat_template=None)
    model = DroppingChat(str(bare), device="cpu", backend="generic", batch_size=2)
    assert all(answers(model, ASKED[:2]))
    further = [*user(picture(1), "w5"), {"role": "assistant", "content": [{"type": "text", "text": "w6"}]}]
    with pytest.raises(InputError, match="no chat template"):
        answers(model, [further])


@pytest.mark.parametrize("backend", ["llava_hf", "generic"])
def test_what_goes_wrong_in_generate_is_no_empty_answer(monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    model = DroppingChat(str(digits_checkpoint()), device="cpu", backend=backend)

    def broken(*args: Any, **kwargs: Any) -> Any:
        raise ValueError("broken within")

    monkeypatch.setattr(model.inner.model.model.language_model.layers[3].mlp, "forward", broken)
    with pytest.raises(ValueError, match="broken within"):
        answers(model, digits_asked(2))


def test_a_prefill_without_the_method_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = DroppingChat(str(digits_checkpoint()), device="cpu")
    monkeypatch.setattr(Attachment, "_open", lambda self, *call: None)
    with pytest.raises(RuntimeError, match="took no part"):
        answers(model, digits_asked(1))


def test_a_backend_that_does_not_generate_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = DroppingChat(str(digits_checkpoint()), device="cpu")
    monkeypatch.setattr(model.inner, "generate_until", lambda requests: ["said by another"] * len(requests))
    with pytest.raises(RuntimeError, match="0 of 2 requests"):
        answers(model, digits_asked(2))


@pytest.mark.parametrize("method", ["vanilla", "fastv"])
def test_cleaning_gives_the_model_back(method: str) -> None:
    model = DroppingChat(str(digits_checkpoint()), device="cpu", backend="generic", method=method)
    inner = model.inner.model
    assert "generate" in inner.__dict__
    model.clean()
    assert "generate" not in inner.__dict__
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in inner.modules())


def test_rounds_and_likelihoods_are_refused() -> None:
    model = DroppingChat(str(digits_checkpoint()), device="cpu", backend="generic")
    with pytest.raises(NotImplementedError, match="generate_until"):
        model.loglikelihood([])
    with pytest.raises(NotImplementedError, match="single rounds"):
        model.generate_until_multi_round([])
