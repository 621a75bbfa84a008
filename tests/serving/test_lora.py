"""LoRA adapters, chosen by request: answers are those of the merged models under the `hf` adapter."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed: .ci/vllm sets up an environment that has it")

import torch
from clients import answer, body, chats, post, running
from qwen import masked_answers, with_pictures
from repeated import BLOCK, about
from served import (
    Question,
    answers,
    blocks_in_use,
    engine,
    engine_processes,
    expected,
    questions,
    sampling,
    scheduler,
)
from transformers import AutoModelForImageTextToText, AutoTokenizer
from vllm.lora.request import LoRARequest

from internvl_checkpoints import PICTURE, save_internvl
from pyramiddrop import Method, PyramidDrop
from pyramiddrop.vllm.forward import StagedForward, _VisualPrefill
from pyramiddrop.vllm.lora import RowAdapters
from qwen_checkpoints import save_qwen
from reference import Rule

peft = pytest.importorskip("peft", reason="the adapters of these tests are PEFT's")

RULE = Rule([2, 4, 6], [0.5, 0.25, 0.125])
HALVES = PyramidDrop(layers=RULE.layers, keep=RULE.keep)
#: One slot more than adapters: on a CPU vLLM gives requests without an adapter what is in the last slot.
LORA = {"enable_lora": True, "max_lora_rank": 8, "max_loras": 3}
NAMES = ("first", "second")
#: The adapter of each request in turn; None is the model itself.
TURNS = ("first", None, "second", "second")
DECODER = r".*language_model.*(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"


def save_adapters(folder: Path, scratch: Path) -> dict[str | None, Path]:
    """Random adapters of the decoder of a checkpoint, in `scratch`, as PEFT saves them; returns merged checkpoints."""
    merged: dict[str | None, Path] = {None: folder}
    for seed, name in enumerate(NAMES):
        torch.manual_seed(seed)
        model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
        config = peft.LoraConfig(r=8, lora_alpha=32, init_lora_weights=False, target_modules=DECODER)
        adapted = peft.get_peft_model(model, config)
        adapted.save_pretrained(scratch / name)
        merged[name] = scratch / f"{name}-merged"
        shutil.copytree(folder, merged[name])
        adapted.merge_and_unload().save_pretrained(merged[name])
    return merged


def request(scratch: Path, name: str | None) -> LoRARequest | None:
    return None if name is None else LoRARequest(name, NAMES.index(name) + 1, str(scratch / name))


def turns(count: int) -> list[str | None]:
    return [TURNS[number % len(TURNS)] for number in range(count)]


def mixed(merged: dict[str | None, Path], asked: Sequence[Question], method: Method | None) -> list[list[int]]:
    """The answers of the merged model of each request."""
    names = turns(len(asked))
    by_name = {name: iter(expected(merged[name], _asked_of(asked, names, name), method)) for name in set(names)}
    return [next(by_name[name]) for name in names]


def _asked_of(asked: Sequence[Question], names: Sequence[str | None], name: str | None) -> list[Question]:
    return [question for question, its in zip(asked, names, strict=True) if its == name]


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("lora")


@pytest.fixture(scope="module")
def merged(llava: Path, scratch: Path) -> dict[str | None, Path]:
    return save_adapters(llava, scratch)


@pytest.mark.fast_cases(2)
@pytest.mark.parametrize(
    ("method", "options"),
    [
        (HALVES, {}),
        (
            PyramidDrop(lam=0.4, rank_layer="last"),
            {"max_num_batched_tokens": 24, "max_model_len": 192, "num_gpu_blocks_override": 25},
        ),
        (HALVES, {"max_num_batched_tokens": 24}),
        (HALVES, {"enable_prefix_caching": False, "max_num_batched_tokens": 40}),
    ],
    ids=["whole", "parts and few blocks, last layer ranks", "parts", "no prefix caching"],
)
def test_mixed_requests(
    llava: Path, scratch: Path, merged: dict[str | None, Path], method: Method, options: dict[str, Any]
) -> None:
    """Two adapters and none, side by side in the same steps."""
    asked = questions(16, tokens=(4, 10))
    wanted = mixed(merged, asked, method)
    assert sum(one != other for one, other in zip(wanted, expected(llava, asked, method), strict=True)) >= 8
    adapters = [request(scratch, name) for name in turns(16)]
    with engine(llava, method, **LORA, **options) as llm:
        assert answers(llm, asked, every=2, adapters=adapters) == wanted
        assert answers(llm, asked, adapters=adapters) == wanted, "all at once"
        assert blocks_in_use(scheduler(llm)) == 0


def test_the_prefix_cache_tells_adapters_apart(llava: Path, scratch: Path, merged: dict[str | None, Path]) -> None:
    """Blocks of one adapter are used for it alone."""
    asked = [about([1, 2, 3], question) for question in range(6)]
    with engine(llava, HALVES, **LORA) as llm:
        found, hits = [], []
        for question, name in zip(asked, ["first", "first", "second", None, "second", None], strict=True):
            [output] = llm.generate(
                [question.inputs],
                sampling(question.tokens),
                lora_request=request(scratch, name),
                use_tqdm=False,
            )
            hits.append(output.num_cached_tokens)
            found.append((name, list(output.outputs[0].token_ids)))
    assert hits == [0, 2 * BLOCK, 0, 0, 2 * BLOCK, 2 * BLOCK]
    for name in {name for name, _ in found}:
        own = [question for question, (its, _) in zip(asked, found, strict=True) if its == name]
        assert [answer for its, answer in found if its == name] == expected(merged[name], own, HALVES)


@contextmanager
def broken(llava: Path, scratch: Path) -> Iterator[Any]:
    with engine(llava, HALVES, **LORA) as llm:
        yield lambda asked: answers(llm, asked, adapters=[request(scratch, name) for name in turns(len(asked))])


def test_control_ranking_without_the_adapter(
    llava: Path, scratch: Path, merged: dict[str | None, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    score = _VisualPrefill._score

    def without(self: Any, *inputs: Any) -> Any:
        self.adapter = (0,) * len(self.adapter)
        return score(self, *inputs)

    asked = questions(16, tokens=(4, 10))
    monkeypatch.setattr(_VisualPrefill, "_score", without)
    with broken(llava, scratch) as run:
        assert run(asked) != mixed(merged, asked, HALVES)


def test_control_the_whole_step_s_map_in_later_stages(
    llava: Path, scratch: Path, merged: dict[str | None, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Entries are as many as rows, but those of other requests."""

    def first_entries(self: StagedForward) -> Any:
        return (*self._adapters.of(0, 512), *[0] * 512)[: sum(self._lengths)]

    asked = questions(16, tokens=(4, 10))
    monkeypatch.setattr(StagedForward, "_row_adapters", first_entries)
    with broken(llava, scratch) as run:
        assert run(asked) != mixed(merged, asked, HALVES)


def test_layers_get_their_own_map_back_after_an_error(llava: Path, scratch: Path) -> None:
    def fail() -> None:
        with adapters.rows(layers, adapters.of(0, 2)):
            assert layers[0].self_attn.qkv_proj.punica_wrapper is not own
            raise ValueError("amid it")

    with engine(llava, HALVES, **LORA) as llm:
        asked = questions(1, tokens=(1, 1))
        answers(llm, asked, adapters=[request(scratch, "first")])
        model = llm.llm_engine.model_executor.driver_worker.model_runner.get_model()
        layers = model.language_model.model.layers
        own, adapters = layers[0].self_attn.qkv_proj.punica_wrapper, RowAdapters(model.lora_manager, 2)
        with pytest.raises(ValueError, match="amid it"):
            fail()
        assert layers[0].self_attn.qkv_proj.punica_wrapper is own


@pytest.mark.slow
@pytest.mark.parametrize("family", ["internvl", "qwen3_vl"])
def test_other_families(tmp_path: Path, family: str) -> None:
    """Qwen3-VL has three axes of positions, and norms of queries and keys."""
    if family == "internvl":
        folder = save_internvl(tmp_path / "model")
        asked = [
            Question(one.prompt.replace("<image>", PICTURE), one.images, one.tokens)
            for one in questions(8, tokens=(4, 8))
        ]
        merged = save_adapters(folder, tmp_path)
        wanted = mixed(merged, asked, HALVES)
    else:
        folder = save_qwen(tmp_path / "model", family)
        asked = [with_pictures(one) for one in questions(8, tokens=(4, 8))]
        merged = save_adapters(folder, tmp_path)
        answered = {name: masked_answers(merged[name], asked, RULE) for name in set(TURNS)}
        wanted = [answered[name][number] for number, name in enumerate(turns(8))]
    adapters = [request(tmp_path, name) for name in turns(8)]
    with engine(folder, HALVES, **LORA, max_num_batched_tokens=64) as llm:
        assert answers(llm, asked, every=2, adapters=adapters) == wanted


@pytest.mark.slow
@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="two workers need two cores")
def test_tensor_parallelism(
    llava: Path, scratch: Path, merged: dict[str | None, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    asked = questions(8, tokens=(4, 8))
    with engine_processes(llava, HALVES, **LORA, tensor_parallel_size=2, distributed_executor_backend="mp") as llm:
        outputs = llm.generate(
            [question.inputs for question in asked],
            [sampling(question.tokens) for question in asked],
            lora_request=[request(scratch, name) for name in turns(8)],
            use_tqdm=False,
        )
    assert [list(output.outputs[0].token_ids) for output in outputs] == mixed(merged, asked, HALVES)


@pytest.mark.slow
def test_an_adapter_by_its_name_over_http(llava: Path, scratch: Path, merged: dict[str | None, Path]) -> None:
    asked = chats(6)
    words = [str(llava), "--layers", "2,4,6", "--keep", "0.5,0.25,0.125", "--backend", "vllm", "--dtype", "float32"]
    words += ["--max-model-len", "512", "--enforce-eager", "--block-size", "32", "--served-model-name", "tiny"]
    words += ["--enable-lora", "--max-lora-rank", "8", "--max-loras", "3", "--lora-modules"]
    with running(scratch, [*words, *(f"{name}={scratch / name}" for name in NAMES)]) as address:
        found = {
            name: [answer(post(address, body(one) | {"model": name})) for one in asked] for name in (*NAMES, "tiny")
        }
    decode = AutoTokenizer.from_pretrained(llava).decode
    for name in NAMES:
        assert found[name] == [decode(ids) for ids in expected(merged[name], asked, HALVES)]
    assert found["tiny"] == [decode(ids) for ids in expected(llava, asked, HALVES)]
