"""The report page in a real browser, where one is installed (Debian's chromium); skipped with the reason elsewhere."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from test_report import Page, make

from dschat.rlhf import report

BROWSER = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), ""
)
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--host-resolver-rules=MAP * ~NOTFOUND",
)  # fmt: skip
MEASURE = """<script>addEventListener('load', () => {
const all = s => [...document.querySelectorAll(s)];
document.querySelectorAll('details').forEach(d => d.open = true);
const found = {
  wide: document.documentElement.scrollWidth - innerWidth,
  curves: all('svg').map(s => [s.getBoundingClientRect().width, s.getBoundingClientRect().height]),
  drawn: all('svg path').length,
  fetched: performance.getEntriesByType('resource').length,
  text: document.body.innerText,
  tables: all('table').length,
  mode: document.compatMode,
};
document.body.innerHTML = '<pre id=measured></pre>';
document.getElementById('measured').textContent = JSON.stringify(found);
})</script></body>"""

pytestmark = pytest.mark.skipif(
    not BROWSER, reason="no chromium on PATH; the page's HTML is checked in test_report.py"
)


def browse(page: Path, width: int, tmp_path: Path) -> dict:
    """What the browser says about the page at a window's width."""
    copy = tmp_path / "measured.html"
    text = page.read_text()
    assert text.count("</body>") == 1
    copy.write_text(text.replace("</body>", MEASURE))
    command = [
        BROWSER,
        *FLAGS,
        f"--user-data-dir={tmp_path / 'profile'}",
        f"--window-size={width},900",
        "--dump-dom",
    ]
    done = subprocess.run([*command, copy.as_uri()], capture_output=True, text=True, timeout=240)
    match = re.search(r'<pre id="measured">(.*?)</pre>', done.stdout, re.DOTALL)
    assert match, done.stderr[-500:]
    return json.loads(html.unescape(match[1]))


@pytest.mark.parametrize("width", [1250, 500])
def test_page_in_a_browser(tmp_path, width):
    """Standards mode, visible curves, all texts shown, nothing fetched, and no sideways scrolling, even when narrow."""
    runs = [make(tmp_path / "a", seed=1), make(tmp_path / "b", seed=2, steps=5)]
    page = report.compare(runs, tmp_path / "page.html")
    found = browse(page, width, tmp_path)
    assert found["mode"] == "CSS1Compat" and found["fetched"] == 0
    assert len(found["curves"]) == page.read_text().count("<svg") >= 3 and found["drawn"] > 20
    assert all(w > 200 and h > 100 for w, h in found["curves"])
    assert found["wide"] <= 0, f"{found['wide']} pixels too wide at {width}"
    assert found["tables"] >= 2
    flat = " ".join(found["text"].split())
    for part in (
        "a: GRPO: 20 steps in 12 s.",
        "<p> & q",
        "decode",
        "Differences in settings: grpo",
        "seed: 2",
    ):
        assert part in flat, part
    Page(page.read_text())
