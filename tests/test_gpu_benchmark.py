"""The command that measures on a GPU, tried on a CPU: every part, its files, and what it says where it cannot."""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import pytest
import torch

from pyramiddrop.inference.timing import CpuClock
from pyramiddrop.speed import overhead as waits
from pyramiddrop.speed.generation import eager, measure_decoding
from pyramiddrop.speed.predicted import choose_variants
from pyramiddrop.speed.record import decoding_records
from pyramiddrop.speed.subject import Subject, shape_subject

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import gpu  # noqa: E402
import speed_document  # noqa: E402

TRIAL = ["--device", "cpu", "--shape", "tiny", "--layers", "4", "--visual", "24", "--repeats", "1", "--new-tokens", "3"]
WAYS = ["vanilla", "PyramidDrop", "FastV"]


@pytest.fixture(scope="module")
def subject() -> Subject:
    return shape_subject("tiny", torch.device("cpu"), depth=4, visual=30, text=10)


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What each part of a trial writes, by its name."""
    out = tmp_path_factory.mktemp("gpu")
    for name in gpu.PARTS:
        assert gpu.main([*TRIAL, "--out", str(out), "--only", name, "--here"]) == 0
    return {path.stem: json.loads(path.read_text("utf-8")) for path in out.iterdir()}


def test_each_part_writes_its_file(records: dict[str, Any]) -> None:
    assert set(records) == {f"{name}-cpu" for name in gpu.PARTS}
    for name, part in gpu.PARTS.items():
        record = records[f"{name}-cpu"]
        assert (record["kind"], record["machine"]["device"], record["machine"]["device_bytes"]) == (
            part.kind,
            "cpu",
            None,
        )
        assert record["subject"]["visual_tokens"] == 24
        assert {row["variant"] for row in record["results"]} == set(WAYS)
        if part.kind != "graphs":
            assert {row["batch"] for row in record["results"]} == set(part.batches)
    assert {row["checkpointing"] for row in records["training-cpu"]["results"]} == {False, True}
    assert {row["compiled"] for row in records["decoding-cpu"]["results"]} == {"eager"}
    graphs = records["graphs-cpu"]
    assert graphs["setting"] == {"visual_tokens": [12, 18, 24, 36, 48, 72], "backend": "eager"}
    vanilla, *others = (row["graphs"] for row in graphs["results"])
    assert vanilla[0] == 1
    assert all(other[-1] <= vanilla[-1] for other in others)


def test_the_document_takes_files_of_a_gpu(records: dict[str, Any], tmp_path: Path) -> None:
    text = "before\n<!-- begin *-cuda.json -->\nold\n<!-- end -->\nbehind"
    assert speed_document.NOT_RUN in speed_document.filled(text, results=tmp_path)
    for name, record in records.items():
        on_gpu = {**record, "machine": record["machine"] | {"device": "A GPU", "device_bytes": 80 * 2**30}}
        (tmp_path / f"{name.removesuffix('-cpu')}-cuda.json").write_text(json.dumps(on_gpu), "utf-8")
    filled = speed_document.filled(text, results=tmp_path)
    assert "old" not in filled
    for name in gpu.PARTS:
        assert f"### {name}-cuda\n" in filled
    for word in ("A GPU, 80.0 GiB; ", "batch 4, eager", "| graphs | ", "batch 1, checkpointing", "on a StaticCache"):
        assert word in filled
    assert speed_document.filled(filled, results=tmp_path) == filled


@pytest.mark.slow
def test_parts_run_in_processes_of_their_own(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    words = [*TRIAL, "--out", str(tmp_path), "--only", "decoding", "graphs"]
    assert gpu.main(words) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"decoding-cpu.json", "graphs-cpu.json"}
    printed = capfd.readouterr().out
    assert "decoding: skipped on cpu: CUDA events, bfloat16, reduce-overhead" in printed
    assert "| batch 4, eager | vanilla | PyramidDrop | FastV |" in printed
    assert gpu.main([*words, "--layers", "99"]) == 1  # both fail, and the second was tried
    failed = capfd.readouterr().err
    assert "decoding: error: --num-layers must be in 1..8" in failed
    assert "graphs: error: --num-layers must be in 1..8" in failed


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_nothing_is_measured(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main([]) == 0
    assert capsys.readouterr().out.startswith("No CUDA device is here: nothing was measured.")


def test_a_trial_does_not_write_among_the_results(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(["--device", "cpu", "--shape", "tiny"]) == 2
    assert "needs --shape and --out" in capsys.readouterr().err


@pytest.mark.slow
def test_a_compiled_step_is_one_graph_for_all_runs(subject: Subject) -> None:
    variants = choose_variants([], subject.info.shape, subject.prompt)
    compilers = {"eager": eager, "one graph": partial(torch.compile, backend="eager", fullgraph=True)}
    ticks: list[None] = []
    found = measure_decoding(subject, variants, 2, 3, 2, CpuClock(), compilers, lambda: ticks.append(None))
    assert [(one.compiled, one.variant, one.graphs) for one in found] == [
        (compiled, variant, graphs) for compiled, graphs in (("eager", 0), ("one graph", 1)) for variant in WAYS
    ]
    assert len(ticks) == len(found) * 3
    assert all(len(one.step.runs) == 2 and one.batch == 2 for one in found)
    ratios = [record["ratios"]["step"] for record in decoding_records(found)]
    assert ratios[0] == ratios[3] == 1.0
    assert ratios[4] == found[4].step.median / found[3].step.median


def test_host_waits_are_counted_once_the_method_is_settled(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    variant = choose_variants(["pyramiddrop"], subject.info.shape, subject.prompt)[1]
    assert waits.count_waits(subject, variant) is None  # on a CPU
    modes: list[str] = []
    asked: list[int] = []

    def scores(*given: Any) -> bool:
        asked.append(len(modes))
        return True

    class OnGpu:
        device = torch.device("cuda")

        def __call__(self, **inputs: Any) -> None:
            subject.model(**inputs)
            if modes and modes[-1] == "warn":
                waits.warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
                waits.warnings.warn("something else", stacklevel=1)

    monkeypatch.setattr("pyramiddrop.hf.query_key._agree", scores)
    monkeypatch.setattr("pyramiddrop.hf.query_key._extractors", WeakKeyDictionary())  # other tests have used the layers
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    fake: Any = OnGpu()
    held = subject.under
    replaced = type("OnGpuSubject", (), {"model": fake, "inputs": subject.inputs, "under": staticmethod(held)})
    assert waits.count_waits(replaced, variant) == 1  # type: ignore[arg-type]
    assert modes == ["warn", "default"]
    assert asked == [0, 0, 0]  # what is asked once was asked before
