"""What surrounds the code: workflows, issue forms, hooks, the source distribution and links into the repository."""

from __future__ import annotations

import re
import shutil
import subprocess
import tomllib
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[1]
GITHUB = ROOT / ".github"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
REPOSITORY = PROJECT["project"]["urls"]["Source"]
WORKFLOWS = sorted((GITHUB / "workflows").glob("*.yml"))
FORMS = sorted(path for path in (GITHUB / "ISSUE_TEMPLATE").glob("*.yml") if path.stem != "config")
FIELDS = {"input", "textarea", "dropdown", "checkboxes", "markdown"}


def read(path: Path) -> Any:
    return yaml.safe_load(path.read_text("utf-8"))


def steps(workflow: Path) -> list[dict[str, Any]]:
    return [step for job in read(workflow)["jobs"].values() for step in job["steps"]]


# --- Workflows ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.stem)
def test_what_a_workflow_runs_is_there(workflow: Path) -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    matrices = [job.get("strategy", {}).get("matrix", {}) for job in read(workflow)["jobs"].values()]
    commands = "\n".join(step.get("run", "") for step in steps(workflow))
    made = set(re.findall(r"make ([\w-]+)", commands)).union(*(matrix.get("target", ()) for matrix in matrices))
    assert made <= targets
    scripts = re.findall(r"\.ci/[\w-]+", commands)
    assert all((ROOT / script).stat().st_mode & 0o100 for script in scripts)
    assert made or scripts or "pytest" in commands


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_may_only_read_and_keeps_no_secret(workflow: Path) -> None:
    assert read(workflow)["permissions"] == {"contents": "read"}
    assert "secrets." not in workflow.read_text()
    assert all("@" in step["uses"] for step in steps(workflow) if "uses" in step)


def test_every_supported_python_is_tested_with_each_transformers() -> None:
    matrix = read(GITHUB / "workflows" / "ci.yml")["jobs"]["tests"]["strategy"]["matrix"]
    classifiers = PROJECT["project"]["classifiers"]
    versions = [one.rpartition(" ")[2] for one in classifiers if one.startswith("Programming Language :: Python :: 3.")]
    assert matrix["python"] == versions
    assert f">={versions[0]}" == PROJECT["project"]["requires-python"]
    assert matrix["target"] == ["test", "test-oldest", "test-newest"]


def test_a_release_is_checked_and_published_without_a_password() -> None:
    jobs = read(GITHUB / "workflows" / "publish.yml")["jobs"]
    assert {"run": "make release-check"} in jobs["build"]["steps"]
    assert jobs["publish"]["needs"] == "build"
    assert jobs["publish"]["permissions"] == {"id-token": "write"}
    assert jobs["publish"]["steps"][-1] == {"uses": "pypa/gh-action-pypi-publish@release/v1"}


# --- Forms and hooks ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.stem)
def test_an_issue_form_can_be_filled_in(path: Path) -> None:
    form = read(path)
    assert set(form) == {"name", "description", "labels", "body"}
    assert {field["type"] for field in form["body"]} <= FIELDS
    assert all(field["attributes"]["label"] for field in form["body"])
    names = [field["id"] for field in form["body"]]
    assert len(names) == len(set(names))
    assert any(field.get("validations", {}).get("required") for field in form["body"])


def test_a_bug_comes_with_versions() -> None:
    [field] = [field for field in read(GITHUB / "ISSUE_TEMPLATE" / "bug.yml")["body"] if field["id"] == "versions"]
    assert field["validations"]["required"]
    assert "pyramiddrop --version && transformers env" in field["attributes"]["description"]


def test_the_hooks_need_no_network() -> None:
    repositories = read(ROOT / ".pre-commit-config.yaml")["repos"]
    assert [repository["repo"] for repository in repositories] == ["local"]
    hooks = repositories[0]["hooks"]
    assert {hook["language"] for hook in hooks} == {"system", "pygrep"}
    assert {"ruff", "ruff-format", "mypy"} <= {hook["id"] for hook in hooks}


# --- The distribution and the links ---------------------------------------------------------------------------------


def tracked() -> list[str]:
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout: what is tracked is not known")
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    return listed.stdout.splitlines()


def test_the_source_distribution_has_every_file() -> None:
    included = PROJECT["tool"]["hatch"]["build"]["targets"]["sdist"]["include"]
    names = {name.partition("/")[0] for name in tracked()}
    missing = {name for name in names if not any(fnmatch(name, pattern) for pattern in included)}
    assert missing == {".gitignore", "pyproject.toml"}  # which hatchling puts in of its own accord


def test_links_into_the_repository_lead_somewhere() -> None:
    found = {
        (path.relative_to(ROOT), link)
        for path in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").rglob("*.md")]
        for link in re.findall(rf"{REPOSITORY}/(?:blob|tree)/main/([^\s)#>\"]+)", path.read_text("utf-8"))
    }
    assert found
    assert [(str(path), link) for path, link in sorted(found) if not (ROOT / link).exists()] == []
