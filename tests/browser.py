"""A real browser for the tests of pages: Chromium without a window, where there is one."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_browser = pytest.mark.skipif(BROWSER is None, reason="no Chromium here")
#: No window, no network of its own; timers run as fast as they can.
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--window-size=1100,900",
    "--virtual-time-budget=20000",
]
#: Waits for the page's pictures, does what a person would, and leaves what it says in the document.
ACT = """<script>
window.addEventListener("error", event => { window.failed = event.message; });
window.addEventListener("load", async () => {
  const wait = milliseconds => new Promise(done => setTimeout(done, milliseconds));
  await wait(200);
  let told;
  try { told = await (async () => { %s })(); } catch (error) { window.failed = String(error); }
  const place = document.createElement("pre");
  place.id = "told";
  place.textContent = JSON.stringify({told, failed: window.failed ?? null});
  document.body.replaceChildren(place);
});
</script>"""


def act(page: str, script: str, folder: Path, *flags: str) -> Any:
    """What `script`, the body of an async JavaScript function, returns on the text of a `page`.

    It may `await wait(milliseconds)`. Any error of the page's own scripts fails the test.
    """
    path = folder / "acted.html"
    path.write_text(page + ACT % script, encoding="utf-8")
    command = [str(BROWSER), *FLAGS, *flags, f"--user-data-dir={folder / 'profile'}", "--dump-dom", path.as_uri()]
    shown = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout
    found = re.search(r'<pre id="told">(.*?)</pre>', shown, re.DOTALL)
    assert found, shown[-2000:]
    answer = json.loads(html.unescape(found[1]))
    assert answer["failed"] is None
    return answer["told"]
