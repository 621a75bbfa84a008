"""What would go wrong is refused at start or switched off; what a request may not ask, before it is in the engine."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed: .ci/vllm sets up an environment that has it")

import vllm
from served import ENGINE, answers, engine, expected, questions, sampling, save_served
from vllm.exceptions import VLLMValidationError

from pyramiddrop import PyramidDrop
from pyramiddrop.cli.main import app
from pyramiddrop.schedule import Schedule
from pyramiddrop.scoring import AttentionScorer
from pyramiddrop.vllm import hf_overrides, register, requests
from pyramiddrop.vllm.attention import join_stage
from pyramiddrop.vllm.batch import Batch
from pyramiddrop.vllm.rules import Rules
from pyramiddrop.vllm.unsupported import SCHEDULER, unsupported


@pytest.fixture(autouse=True, scope="module")
def plugin() -> None:
    register()


def configured(folder: Path, method: PyramidDrop | None = None, **options: Any) -> Any:
    """vLLM's configuration, as it is checked before an engine is built."""
    from vllm.engine.arg_utils import EngineArgs

    arguments = ENGINE | {"hf_overrides": hf_overrides(str(folder), method or PyramidDrop())} | options
    return EngineArgs(model=str(folder), **arguments).create_engine_config()


def test_prefix_caching_is_left_as_it_is(llava: Path) -> None:
    assert configured(llava).cache_config.enable_prefix_caching
    assert not configured(llava, enable_prefix_caching=False).cache_config.enable_prefix_caching


def test_the_scheduler_and_the_settings_reach_the_engine(llava: Path) -> None:
    config = configured(llava, PyramidDrop(lam=0.6))
    assert config.scheduler_config.scheduler_cls == SCHEDULER
    assert config.additional_config["pyramiddrop"]["lam"] == 0.6


def test_the_method_beside_the_checkpoint_is_read(llava: Path, tmp_path: Path) -> None:
    for file in llava.iterdir():
        (tmp_path / file.name).symlink_to(file)
    PyramidDrop(lam=0.7).save_pretrained(tmp_path)
    overrides = {"architectures": ["PyramidDropLlavaForConditionalGeneration"]}
    assert configured(tmp_path, hf_overrides=overrides).additional_config["pyramiddrop"]["lam"] == 0.7


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"enable_lora": True, "enable_tower_connector_lora": True}, "--enable-tower-connector-lora"),
        (
            {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 2}},
            "speculative",
        ),
        ({"pipeline_parallel_size": 2, "distributed_executor_backend": "mp"}, "pipeline parallelism"),
        ({"disable_hybrid_kv_cache_manager": True}, "--disable-hybrid-kv-cache-manager"),
        ({"scheduler_cls": "vllm.v1.core.sched.scheduler.Scheduler"}, "--scheduler-cls"),
        ({"kv_sharing_fast_prefill": True}, "--kv-sharing-fast-prefill"),
        ({"kv_transfer_config": {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}}, "KV connectors"),
        ({"kv_offloading_size": 0.5}, "KV offloading"),
        ({"cpu_offload_gb": 1}, "offloading of weights"),
        ({"enable_prompt_embeds": True}, "--enable-prompt-embeds"),
        ({"kv_cache_dtype": "fp8"}, "--kv-cache-dtype fp8"),
        ({"max_num_batched_tokens": 3, "max_num_seqs": 2}, "--max-num-batched-tokens below 4"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_unsupported_is_refused_at_start(llava: Path, options: dict[str, Any], named: str) -> None:
    if "kv_transfer_config" in options:
        from vllm.config import KVTransferConfig

        options = {"kv_transfer_config": KVTransferConfig(**options["kv_transfer_config"])}
    with pytest.raises(ValueError, match=rf"pyramiddrop cannot be served with .*{named}"):
        configured(llava, **options)


@pytest.mark.parametrize(
    ("part", "name", "value", "named"),
    [
        ("parallel_config", "decode_context_parallel_size", 2, "context parallelism"),
        ("parallel_config", "prefill_context_parallel_size", 2, "context parallelism"),
        ("parallel_config", "ubatch_size", 2, "microbatches"),
        ("model_config", "runner_type", "pooling", "--runner pooling"),
    ],
)
def test_what_a_cpu_cannot_be_asked_for_is_refused_too(
    llava: Path, part: str, name: str, value: Any, named: str
) -> None:
    config = configured(llava)
    assert not list(unsupported(config))
    object.__setattr__(getattr(config, part), name, value)
    assert named in "; ".join(unsupported(config))


def test_data_parallelism_is_refused_where_ranks_step_together(llava: Path) -> None:
    config = configured(llava)
    object.__setattr__(config.parallel_config, "data_parallel_size", 2)
    assert not list(unsupported(config)), "ranks of a dense model are independent"
    object.__setattr__(config.parallel_config, "is_moe_model", True)
    assert "data parallelism of a mixture of experts" in "; ".join(unsupported(config))


def test_adapters_of_experts_are_refused(llava: Path) -> None:
    config = configured(llava, enable_lora=True)
    assert not list(unsupported(config))
    object.__setattr__(config.parallel_config, "is_moe_model", True)
    assert "LoRA of a mixture of experts" in "; ".join(unsupported(config))


@pytest.mark.parametrize(
    ("name", "value", "named"),
    [
        ("kv_events_config", SimpleNamespace(enable_kv_cache_events=True), "KV events"),
        ("ec_transfer_config", SimpleNamespace(), "encoder disaggregation"),
    ],
)
def test_what_moves_blocks_or_pictures_is_refused(llava: Path, name: str, value: Any, named: str) -> None:
    config = configured(llava)
    object.__setattr__(config, name, value)
    assert named in "; ".join(unsupported(config))


def test_latent_attention_is_refused() -> None:
    latent = SimpleNamespace(sliding_window=None, attn_backend=SimpleNamespace(is_mla=lambda: True))
    with pytest.raises(ValueError, match="serves full attention only"):
        join_stage(latent, 1, Batch())


def test_a_sliding_window_is_refused(tmp_path: Path) -> None:
    folder = save_served(tmp_path, "llava-mistral", sliding_window=16)
    with pytest.raises(ValueError, match="pyramiddrop cannot be served with a sliding window of 16 tokens"):
        configured(folder)


def test_full_graphs_of_mixed_batches_are_refused(llava: Path) -> None:
    from vllm.config.compilation import CUDAGraphMode

    config = configured(llava)
    for mode in CUDAGraphMode:
        config.compilation_config.cudagraph_mode = mode
        assert any("cudagraph_mode FULL" in reason for reason in unsupported(config)) == (mode == CUDAGraphMode.FULL)


def test_what_vllm_sets_after_it_asked_is_refused_by_the_model(llava: Path) -> None:
    """With splitting_ops=[] for one it makes FULL of FULL_AND_PIECEWISE, its default."""
    from vllm.config.compilation import CUDAGraphMode
    from vllm.v1.engine.llm_engine import LLMEngine

    config = configured(llava)
    config.compilation_config.cudagraph_mode = CUDAGraphMode.FULL
    with pytest.raises(ValueError, match="cannot be served with cudagraph_mode FULL"):
        LLMEngine.from_vllm_config(config)


def test_twofold_pruning_of_videos_is_refused(llava: Path) -> None:
    config = configured(llava)
    config.model_config.multimodal_config.video_pruning_rate = 0.5
    assert any("--video-pruning-rate" in reason for reason in unsupported(config))


@pytest.mark.parametrize("installed", ["0.31.2", "0.34.0", "1.0"])
def test_other_versions_of_vllm_are_refused(llava: Path, installed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm, "__version__", installed)
    with pytest.raises(RuntimeError, match=f"0.32 and 0.33; {installed} is installed"):
        hf_overrides(str(llava), PyramidDrop())


#: Runs plain vLLM on a vLLM that the plugin does not fit: of another version, or with a part that cannot be imported.
STRANGER = """
import sys
import vllm
{strange}
from served import engine, questions, sampling
with engine({folder!r}, None) as llm:
    [output] = llm.generate([questions(4)[2].inputs], sampling(4), use_tqdm=False)
    print("answered", list(output.outputs[0].token_ids))
    print("registered", sorted(name for name in vllm.ModelRegistry.get_supported_archs() if "PyramidDrop" in name))
"""


@pytest.mark.fast_cases(1)
@pytest.mark.parametrize(
    ("strange", "warned"),
    [
        ("vllm.__version__ = '0.34.0'", "fits vLLM 0.32 and 0.33; 0.34.0 is installed. To drop visual tokens"),
        ("sys.modules['pyramiddrop.vllm.requests'] = None", "is installed, but not as expected: ModuleNotFoundError"),
        (
            "from vllm.v1.core.sched.scheduler import Scheduler\n"
            "Scheduler._reserve_prefill_lookahead = lambda self, request, first, tokens: tokens",
            "_reserve_prefill_lookahead takes (self, request, first, tokens), not (self, request, num_computed_tokens",
        ),
    ],
    ids=["version", "moved", "another signature"],
)
def test_a_vllm_that_the_plugin_does_not_fit_serves_as_without_it(llava: Path, strange: str, warned: str) -> None:
    script = STRANGER.format(strange=strange, folder=str(llava))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "VLLM_LOGGING_LEVEL": "WARNING"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    with engine(llava, None) as llm:
        [output] = llm.generate([questions(4)[2].inputs], sampling(4), use_tqdm=False)
    assert f"answered {list(output.outputs[0].token_ids)}" in done.stdout
    assert "registered []" in done.stdout
    [line] = [line for line in (done.stdout + done.stderr).splitlines() if "pyramiddrop's plugin" in line]
    assert warned in line
    assert re.match(r"WARNING \d\d-\d\d \d\d:\d\d:\d\d ", line[line.index("WARNING") :]), "level and time"


def test_without_the_plugin_the_architecture_is_unknown(llava: Path) -> None:
    """A missing plugin must not be a model that drops nothing."""
    from vllm import ModelRegistry

    name = "PyramidDropLlavaForConditionalGeneration"
    assert name in ModelRegistry.get_supported_archs()
    held = ModelRegistry.models.pop(name)
    try:
        with pytest.raises(ValueError, match="not supported"):
            configured(llava)
    finally:
        ModelRegistry.models[name] = held


def test_prompt_logprobs_are_refused_and_the_engine_goes_on(llava: Path) -> None:
    method, asked = PyramidDrop(lam=0.5), questions(4)
    with engine(llava, method) as llm:
        with pytest.raises(VLLMValidationError, match="prompt_logprobs"):
            llm.generate([asked[2].inputs], sampling(4, prompt_logprobs=1), use_tqdm=False)
        with pytest.raises(VLLMValidationError, match="streaming input"):
            llm.llm_engine.input_processor.process_inputs(
                "0", asked[2].inputs, sampling(4), ("generate",), resumable=True
            )
        assert answers(llm, asked) == expected(llava, asked, method)


def pictures(*lengths: int) -> Any:
    """As much of a request as tells how long its pictures are."""
    places = [SimpleNamespace(offset=40 * number, length=length) for number, length in enumerate(lengths)]
    return SimpleNamespace(
        mm_features=[
            SimpleNamespace(
                modality="image", mm_position=SimpleNamespace(offset=place.offset, length=place.length, is_embed=None)
            )
            for place in places
        ]
    )


def test_a_picture_that_may_not_be_cut_must_fit_into_a_step_with_a_token_to_spare() -> None:
    """It would wait for ever."""
    rules = Rules(Schedule.of([2], [0.5]), AttentionScorer(), "next", per_image=False)
    whole = SimpleNamespace(disable_chunked_mm_input=True, max_num_batched_tokens=16)
    with pytest.raises(VLLMValidationError, match=r"a picture of 16 tokens .* --max-num-batched-tokens 17 or more"):
        requests._check_pictures(pictures(9, 16), whole, rules)
    requests._check_pictures(pictures(9, 15), whole, rules)
    requests._check_pictures(SimpleNamespace(mm_features=None), whole, rules)
    cut = SimpleNamespace(disable_chunked_mm_input=False, max_num_batched_tokens=16)
    requests._check_pictures(pictures(9, 16), cut, rules)
    off = Rules(Schedule.of([2], [1.0]), AttentionScorer(), "next", per_image=False)
    requests._check_pictures(pictures(9, 16), whole, off)


@pytest.mark.slow
def test_pictures_that_may_not_be_cut(llava: Path) -> None:
    method, asked = PyramidDrop(lam=0.5), questions(8, tokens=(4, 8))
    with engine(llava, method, disable_chunked_mm_input=True, max_num_batched_tokens=17) as llm:
        assert answers(llm, asked, every=1) == expected(llava, asked, method)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [{"enable_chunked_prefill": False}, {"scheduling_policy": "priority"}], ids=["whole prompts", "priority"]
)
def test_other_ways_to_schedule(llava: Path, options: dict[str, Any]) -> None:
    method, asked = PyramidDrop(lam=0.5), questions(8, tokens=(4, 8))
    with engine(llava, method, **options) as llm:
        assert answers(llm, asked, every=2) == expected(llava, asked, method)


def test_the_command_says_a_refusal_in_one_line(
    llava: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", sys.argv)  # the command sets it
    monkeypatch.setenv("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    with pytest.raises(SystemExit) as end:
        app(
            [
                "serve",
                str(llava),
                "--backend",
                "vllm",
                "--port",
                "0",
                "--enable-prompt-embeds",
                "--max-model-len",
                "512",
            ]
        )
    assert end.value.code == 2
    said = capfd.readouterr().err
    assert said.splitlines()[-1].startswith("error: pyramiddrop cannot be served with --enable-prompt-embeds (nothing")
    assert "Traceback" not in said


def test_plain_engines_are_not_touched(llava: Path) -> None:
    with engine(llava, None) as llm:
        [output] = llm.generate([questions(4)[2].inputs], sampling(4, prompt_logprobs=1), use_tqdm=False)
    assert output.prompt_logprobs
