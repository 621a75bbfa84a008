"""The example for VLMEvalKit, against a stand-in of the part of it that a model sees."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from checkpoints import save_checkpoint, save_picture
from pyramiddrop import PyramidDrop
from pyramiddrop.assets import digits_checkpoint
from pyramiddrop.evaluation.answering import Answerer
from pyramiddrop.evaluation.samples import digits_samples
from pyramiddrop.inference.checkpoint import load_checkpoint

EXAMPLE = Path(__file__).parents[1] / "examples" / "vlmevalkit" / "pyramiddrop_vlm.py"
DIGITS = str(digits_checkpoint())


class BaseModel:
    """What VLMEvalKit's base class does for a model: it checks a message and hands it on."""

    INTERLEAVE = False
    allowed_types = ("text", "image", "video")

    def __init__(self) -> None:
        self.dump_image_func = None

    def generate(self, message: list[dict[str, str]], dataset: str | None = None) -> str:
        for part in message:
            assert part["type"] in self.allowed_types, f"Invalid input type: {part['type']}"
        answer: str = self.generate_inner(message, dataset)  # type: ignore[attr-defined]
        return answer


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The example's module, with VLMEvalKit's registry under it."""
    modules: dict[str, Any] = {name: ModuleType(name) for name in ("vlmeval", "vlmeval.config", "vlmeval.vlm")}
    modules["vlmeval.vlm.base"] = ModuleType("vlmeval.vlm.base")
    modules["vlmeval.config"].supported_VLM = {}
    modules["vlmeval.vlm.base"].BaseModel = BaseModel
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr("atexit.register", lambda report: None)
    spec = importlib.util.spec_from_file_location("pyramiddrop_vlm", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


def image(path: Path) -> dict[str, str]:
    return {"type": "image", "value": str(path)}


def text(words: str) -> dict[str, str]:
    return {"type": "text", "value": words}


def test_answers_are_those_of_the_method_and_the_cost_is_told(
    example: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    samples = digits_samples("test", 1)
    checkpoint = load_checkpoint(DIGITS, device="cpu")
    samples[0].images[0].save(tmp_path / "scene.png")
    for name, method in (("pyramiddrop:lam=0.25", PyramidDrop(lam=0.25)), ("vanilla", None)):
        example.register(f"digits {name}", DIGITS, name, max_new_tokens=5, device="cpu")
        model = example.supported_VLM[f"digits {name}"]()
        replies = Answerer(checkpoint, max_new_tokens=5).answers(samples, method)
        said = [model.generate([image(tmp_path / "scene.png"), text(one.question)], dataset="MME") for one in samples]
        assert said == [reply.text for reply in replies]
        share = sum(one.usage.flops for one in replies) / sum(one.vanilla.flops for one in replies)
        model.report()
        assert capsys.readouterr().out == (
            f"pyramiddrop: {len(samples)} questions, {share:.1%} of the prefill FLOPs without dropping\n"
        )
    assert share == 1


def test_pictures_and_words_keep_their_order(example: Any, tmp_path: Path) -> None:
    model = example.DroppingVLM(str(save_checkpoint(tmp_path / "llava")), device="cpu")
    picture = save_picture(tmp_path / "a.png")
    ids = model._inputs([text("w5"), image(picture), text("w6 w7"), image(picture)])["input_ids"][0].tolist()
    marks = [token for token, before in zip(ids, [None, *ids], strict=False) if token != before]
    token = model.checkpoint.model.config.image_token_id
    words = model.checkpoint.processor.tokenizer.convert_tokens_to_ids(["w5", "w6", "w7"])
    assert [mark for mark in marks if mark in {token, *words}] == [words[0], token, words[1], words[2], token]


def test_without_a_chat_template(example: Any, tmp_path: Path) -> None:
    model = example.DroppingVLM(str(save_checkpoint(tmp_path / "llava", chat_template=None)), device="cpu")
    assert model.generate([image(save_picture(tmp_path / "a.png")), text("w5 w6")])


def test_videos_are_refused(example: Any) -> None:
    model = example.DroppingVLM(DIGITS, device="cpu")
    with pytest.raises(AssertionError, match="Invalid input type: video"):
        model.generate([{"type": "video", "value": "a.mp4"}, text("What is it?")])
