"""The Space in a real browser: a press of its button fills in both answers, the costs and the picture."""

from __future__ import annotations

import html
import importlib.util
import json
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest

from browser import BROWSER, needs_browser

gradio = pytest.importorskip("gradio", reason="pip install gradio brings what the Space needs")
SPACE = Path(__file__).parents[1] / "examples" / "space" / "app.py"
#: Presses the button as a person would, waits for what comes, and tells it in the page's title.
ACT = """async () => {
  const wait = milliseconds => new Promise(done => setTimeout(done, milliseconds));
  const text = name => document.querySelector(`#${name} textarea`)?.value ?? "";
  while (!document.querySelector("#ask")) await wait(100);
  document.querySelector("#ask").click();
  const there = name => document.querySelector(name) !== null;
  while (!text("pruned") || !there("#kept img") || !there("#costs td")) await wait(100);
  const costs = document.querySelector("#costs").textContent;
  document.title = JSON.stringify({plain: text("plain"), pruned: text("pruned"), costs});
}"""


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """Where the Space runs, with a page that acts as soon as it is loaded."""
    spec = importlib.util.spec_from_file_location("space", SPACE)
    assert spec is not None
    assert spec.loader is not None
    space: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(space)
    page = space.build()
    with page:
        page.load(None, js=ACT)
    _, local, _ = page.launch(prevent_thread_lock=True, quiet=True)
    yield local
    page.close()


def told(port: int) -> dict[str, Any]:
    """What the page says in its title; Chromium lists its pages at its debugging port."""
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        with urlopen(f"http://127.0.0.1:{port}/json", timeout=10) as listed:
            titles = [html.unescape(page["title"]) for page in json.load(listed)]
        for title in titles:
            if title.startswith("{"):
                found: dict[str, Any] = json.loads(title)
                return found
        time.sleep(0.5)
    raise AssertionError(f"nothing was answered; the titles are {titles}")


@pytest.mark.slow
@needs_browser
def test_a_question_is_answered_without_dropping_and_with_it(address: str, tmp_path: Path) -> None:
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--remote-debugging-port=0"]
    command = [str(BROWSER), *flags, f"--user-data-dir={tmp_path}", address]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as browser:
        try:
            port = tmp_path / "DevToolsActivePort"
            while not port.exists() or not port.read_text():
                assert browser.poll() is None
                time.sleep(0.1)
            found = told(int(port.read_text().split()[0]))
        finally:
            browser.terminate()
    assert (found["plain"], found["pruned"]) == ("8", "8")
    assert "576 → 288 → 144 → 72" in found["costs"]
