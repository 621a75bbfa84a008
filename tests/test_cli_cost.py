"""The verb `cost`: what it prints for named shapes, configurations and plain numbers, and the paper's table."""

from __future__ import annotations

import json
import re
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
from transformers import Gemma3Config, MixtralConfig, MllamaConfig, Qwen3_5Config
from typer.testing import CliRunner, Result

from pyramiddrop.cli.main import app
from pyramiddrop.cost import PRESETS, Prompt, estimate_cost
from pyramiddrop.evaluation.paper import paper_figures
from pyramiddrop.report import units
from pyramiddrop.report.tables.cost import paper_markdown, shapes_markdown
from pyramiddrop.schedule import Schedule, powers

DOCS = Path(__file__).parents[1] / "docs" / "cost.md"
NUMBERS = ["--num-layers", "32", "--hidden", "4096", "--intermediate", "11008", "--visual-tokens", "2880"]


def run(*words: str) -> Result:
    return CliRunner().invoke(app, ["cost", *words], env={"COLUMNS": "160"})


def found(*words: str) -> Any:
    result = run(*words, "--json")
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def flops(answer: Any, convention: str = "paper") -> dict[str, str]:
    """TFLOPs by method, to three digits."""
    return {one["method"]: f"{one['flops'][convention] / 1e12:.3g}" for one in answer["methods"]}


def test_the_paper_beside_ours() -> None:
    result = run("--paper")
    assert result.exit_code == 0
    rows = [line.split() for line in result.stdout.splitlines() if "✓" in line or "✗" in line]
    assert len(rows) == len(paper_figures()) == 27
    for row in rows:
        printed, ours, mark = row[-4:-1]
        assert (printed, mark) == (ours, "✓")
    assert "27 of 27 figures agree" in result.stdout


def test_the_paper_as_json() -> None:
    figures = json.loads(run("--paper", "--json").stdout)["figures"]
    first = {"preset": "llava-next-7b", "visual_tokens": 2880, "method": "vanilla", "printed": "20.8", "ours": "20.8"}
    assert figures[0].items() >= first.items()
    assert figures[0]["exact"] == pytest.approx(20.8252, abs=1e-4)


def test_the_default_is_the_papers_first_model() -> None:
    answer = found()
    assert answer["name"] == "llava-1.5-7b"
    assert flops(answer) == {"vanilla": "3.82", "PyramidDrop": "1.78", "FastV": "2.01"}


def test_plain_numbers_are_the_papers_next_model() -> None:
    answer = found(*NUMBERS)
    assert flops(answer) == {"vanilla": "20.8", "PyramidDrop": "9.46", "FastV": "10.6"}
    assert answer["shape"]["decoder"]["heads"] == 32
    assert answer["shape"]["vision"] is None


def test_options_belong_to_pyramiddrop() -> None:
    assert flops(found(*NUMBERS, "--lam", "0.6")) == {"vanilla": "20.8", "PyramidDrop(lam=0.6)": "11"}
    (_, custom) = found(*NUMBERS, "--layers", "4,8", "--keep", "0.5,0.25")["methods"]
    assert custom["visual_tokens_by_layer"] == [2880] * 4 + [1440] * 4 + [720] * 24
    (_, staged) = found(*NUMBERS, "--stages", "2")["methods"]
    assert staged["visual_tokens_by_layer"] == [2880] * 16 + [1440] * 16
    (_, fastv) = found(*NUMBERS, "--layer", "3")["methods"]
    assert fastv["visual_tokens_by_layer"] == [2880] * 3 + [1440] * 29


def test_several_methods_each_with_its_own_options() -> None:
    words = ["pyramiddrop:lam=0.4", "pyramiddrop:layers=4,8:keep=0.5,0.25", "fastv:layer=3:keep=0.25", "uniform"]
    answer = found(*(word for method in words for word in ("--method", method)))
    columns = {one["method"]: one for one in answer["methods"]}
    assert list(columns) == [
        "vanilla",
        "PyramidDrop(lam=0.4)",
        "PyramidDrop(layers=(4, 8), keep=(0.5, 0.25))",
        "FastV(layer=3, keep=0.25)",
        "UniformDrop",
    ]
    assert columns["FastV(layer=3, keep=0.25)"]["visual_tokens_by_layer"] == [576] * 3 + [144] * 29
    assert columns["UniformDrop"]["full_parts"]["ranking"] == 0
    assert columns["PyramidDrop(lam=0.4)"]["full_parts"]["ranking"] > 0


def test_a_method_is_read_by_the_parser_of_all_verbs() -> None:
    """Any argument is an option, the class may be named, and several methods may follow one `--method`."""
    answer = found("--method", "pyramiddrop:merge=true", "PyramidDrop:score=diversity", "FastV:keep=0.4")
    assert [one["method"] for one in answer["methods"][1:]] == [
        "PyramidDrop(merge=True)",
        "PyramidDrop(score='diversity')",
        "FastV(keep=0.4)",
    ]
    plain = found("--method", "pyramiddrop")["methods"][1]["full_parts"]["ranking"]
    assert answer["methods"][1]["full_parts"]["ranking"] > plain


def test_shared_options_go_to_those_that_know_them() -> None:
    answer = found("--method", "pyramiddrop", "--method", "fastv", "--method", "random:lam=0.3", "--lam", "0.4")
    assert [one["method"] for one in answer["methods"][1:]] == [
        "PyramidDrop(lam=0.4)",
        "FastV",
        "RandomDrop(lam=0.3)",
    ]


def test_the_json_is_the_account() -> None:
    answer = found("--shape", "qwen2.5-vl-7b", "--text-tokens", "10", "--crops", "2", "--method", "pyramiddrop")
    shape = PRESETS["qwen2.5-vl-7b"].shape
    expected = estimate_cost(shape, Prompt(1296, 10, 2), Schedule.equal(28, 4, powers(0.5, 3)))
    assert answer["methods"][1] == {"method": "PyramidDrop", **expected.as_dict()}
    assert answer["prompt"] == {"visual_tokens": 1296, "text_tokens": 10, "crops": 2, "instruction_tokens": None}


def test_the_dtype_is_that_of_the_cache() -> None:
    sizes = {dtype: found("--dtype", dtype)["methods"][0]["kv_bytes"] for dtype in ("float32", "bfloat16", "float8")}
    assert sizes["bfloat16"] == 2 * 32 * 4096 * 640 * 2 == sizes["float32"] // 2 == sizes["float8"] * 2


def test_the_table_says_all_of_it() -> None:
    printed = run().stdout
    for word in (
        "576 → 288 → 144 → 72",
        "270.00",
        "8.91 TFLOPs",
        "(54 %)",
        "ranking",
        "vision",
        "320 MiB",
        "activations",
    ):
        assert word in printed
    assert re.search(r"prefill FLOPs, paper +3\.82 TFLOPs +1\.78 TFLOPs +\(47 %\) +2\.01 TFLOPs", printed)
    assert "vision" not in run(*NUMBERS).stdout  # there is none to count


def test_a_configuration_without_weights(llava_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((llava_folder / "config.json").read_bytes())
    answer = found("--model", str(tmp_path))
    assert answer["prompt"]["visual_tokens"] == 16
    assert answer["methods"][1]["visual_tokens_by_layer"] == [16, 16, 8, 8, 4, 4, 2, 2]
    assert answer["shape"]["decoder"]["bytes_per_value"] == 4


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with the configuration of a Qwen3.5, every fourth layer of which attends."""
    folder = tmp_path_factory.mktemp("hybrid")
    Qwen3_5Config(text_config={"num_hidden_layers": 16}).save_pretrained(folder)
    return str(folder)


def test_a_model_that_cannot_have_fastv_is_shown_without(hybrid: str) -> None:
    result = run("--model", hybrid, "--visual-tokens", "100")
    assert result.exit_code == 0
    assert re.search(r"vanilla +PyramidDrop *\n", result.stdout)
    assert result.stderr.startswith(
        "FastV is left out: this model cannot drop before layer 2; allowed are layers [4, 8"
    )
    assert "No vision tower and no projector are counted" in result.stdout
    named = run("--model", hybrid, "--visual-tokens", "100", "--method", "fastv")
    assert (named.exit_code, named.stdout) == (2, "")
    assert named.stderr == f"error: {result.stderr.partition(': ')[2]}"


def test_a_scorer_that_reads_the_layer_before_cannot_rank_in_the_first() -> None:
    """As the model itself refuses it (`tests/test_limits.py`)."""
    method = "pyramiddrop:keep=0.5,score=variation,rank_layer=last"
    refused = run("--shape", "llava-1.5-7b", "--method", f"{method},layers=1")
    assert refused.exit_code == 2
    assert refused.stderr.startswith("error: this model cannot drop before layer 1; allowed are layers [2, 3")
    assert run("--shape", "llava-1.5-7b", "--method", f"{method},layers=2").exit_code == 0


def test_layers_of_several_kinds_are_one_size_a_stage(hybrid: str) -> None:
    words = ["--model", hybrid, "--visual-tokens", "100", "--method", "pyramiddrop:stages=2"]
    sizes = found(*words)["methods"][1]["kv_bytes_by_layer"]
    assert len(set(sizes[:7])) == 2  # states and keys
    shown = re.search(r"mean layer, by stage +(\S+ \S+) +(\S+ \S+) → (\S+ \S+) *\n", run(*words).stdout)
    assert shown is not None
    assert list(shown.groups()[1:]) == [units.size(mean(part)) for part in (sizes[:7], sizes[7:])]


def test_a_ranking_layer_that_does_not_see_the_picture_is_refused(tmp_path: Path) -> None:
    Gemma3Config(text_config={"num_hidden_layers": 12, "sliding_window": 64}).save_pretrained(tmp_path)
    words = ["--model", str(tmp_path), "--method", "fastv:layer=3"]
    assert found(*words, "--visual-tokens", "60")["methods"][1]["method"] == "FastV(layer=3)"
    refused = run(*words)
    assert refused.exit_code == 2
    seen = (
        "layer 2, which would rank, sees 64 tokens, and the visual ones begin 256 tokens before the end of the prompt"
    )
    assert seen in refused.stderr  # a picture of Gemma 3 has 256


@pytest.mark.parametrize("method", ["vision", "downsample"])
def test_a_drop_before_the_decoder_suits_any_layers(hybrid: str, method: str) -> None:
    answer = found("--model", hybrid, "--visual-tokens", "100", "--method", method)
    assert answer["methods"][1]["visual_tokens_by_layer"] == [50] * 16


def test_a_refused_family_is_named_with_the_reason(tmp_path: Path) -> None:
    MllamaConfig().save_pretrained(tmp_path)
    refused = run("--model", str(tmp_path), "--visual-tokens", "5")
    assert (
        "the family 'mllama' is not supported: its text model looks at the image by cross-attention" in refused.stderr
    )


def test_a_configuration_of_a_text_model(tmp_path: Path) -> None:
    MixtralConfig(num_hidden_layers=4).save_pretrained(tmp_path)
    answer = found("--model", str(tmp_path), "--visual-tokens", "100")
    assert answer["shape"]["decoder"]["experts"]["active"] == 2
    refused = run("--model", str(tmp_path))
    assert refused.exit_code == 2
    assert "--visual-tokens" in refused.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--shape", "llava"], "shape 'llava' is not one of llava-1.5-7b"),
        (["--shape", "llava-1.5-7b", "--num-layers", "3"], "got --shape and --num-layers"),
        (["--shape", "llava-1.5-7b", "--model", "x"], "got --shape and --model"),
        (["--num-layers", "32"], "--hidden is missing"),
        ([*NUMBERS[:6]], "say --visual-tokens"),
        ([*NUMBERS, "--heads", "3"], "--heads must divide --hidden"),
        (["--num-layers", "0", *NUMBERS[2:]], "--num-layers must be at least 1"),
        (["--visual-tokens", "0"], "visual_tokens must be at least 1"),
        (["--dtype", "int3"], "dtype 'int3'"),
        (["--model", "/no/such/folder"], "no such folder"),
        (["--method", "best"], "method 'best' is not one of"),
        (["--method", "fastv", "--lam", "0.5"], "--lam belongs to none of the methods fastv"),
        (["--method", "fastv:lam=0.5"], "lam does not belong to the method 'fastv'"),
        (["--method", "fastv:layer=two"], "layer in 'fastv:layer=two' must be a whole number; got 'two'"),
        (["--method", "fastv:2"], "'2' in 'fastv:2' is no option of a method"),
        (["--layers", "8,40", "--keep", "0.5,0.2"], "layers must be in 1..31"),
        (["--lam", "2"], "lam must be a number in (0, 1]"),
    ],
)
def test_bad_input_is_one_line(words: list[str], message: str) -> None:
    result = run(*words)
    assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (2, "", 1)
    assert result.stderr.startswith("error: ")
    assert message in result.stderr


@pytest.mark.parametrize(("name", "lines"), [("paper", paper_markdown(paper_figures())), ("shapes", shapes_markdown())])
def test_the_tables_of_the_page_are_generated(name: str, lines: list[str]) -> None:
    _, _, rest = DOCS.read_text("utf-8").partition(f"<!-- {name} -->\n")
    table, _, _ = rest.partition(f"<!-- /{name} -->")
    expected = "\n".join(lines) + "\n"
    assert table == expected, f"docs/cost.md should have, between the marks {name!r}:\n{expected}"
