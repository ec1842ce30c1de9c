"""The page in a real browser: every figure has a size, labels do not leave it, sorting works, the console is silent."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path
from typing import Any

import pytest

from finescale.report import write_html

CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update"),
    *("--window-size=1200,900", "--enable-logging=stderr", "--v=0"),
)

# Runs in a copy of the page, after its own script: measures the figures and sorts the table, writes what it saw.
PROBE = """<script>
const seen = { figures: {}, outside: [], overlaps: [], sorted: [], filtered: 0, width: 0, dark: "" };
for (const figure of document.querySelectorAll("figure[data-figure]")) {
  const svg = figure.querySelector("svg"), box = svg.getBoundingClientRect();
  seen.figures[figure.id] = [box.width, box.height, svg.querySelectorAll("path,rect,circle,line").length];
  const texts = [...svg.querySelectorAll("text")].map((t) => [t.textContent, t.getBoundingClientRect()]);
  for (const [words, r] of texts)
    if (r.left < box.left - 1 || r.right > box.right + 1 || r.top < box.top - 1 || r.bottom > box.bottom + 1)
      seen.outside.push(figure.id + ": " + words);
  texts.forEach(([a, p], i) => texts.slice(i + 1).forEach(([b, q]) => {
    const w = Math.min(p.right, q.right) - Math.max(p.left, q.left);
    const h = Math.min(p.bottom, q.bottom) - Math.max(p.top, q.top);
    if (w > 1 && h > 3) seen.overlaps.push(figure.id + ": " + a + " | " + b);
  }));
}
const heads = [...document.querySelectorAll("#table-layers th")];
const at = heads.findIndex((h) => h.textContent === "relative error");
const column = () => [...document.querySelectorAll("#table-layers tbody tr")].map((r) => Number(r.cells[at].dataset.v));
for (let i = 0; i < 3; i++) {
  heads[at].querySelector("button").click();
  seen.sorted.push([heads[at].getAttribute("aria-sort"), column()]);
}
const input = document.getElementById("filter");
input.value = "q_proj";
input.dispatchEvent(new Event("input"));
seen.filtered = [...document.querySelectorAll("#table-layers tbody tr")].filter((r) => !r.hidden).length;
seen.width = document.documentElement.scrollWidth;
const out = document.createElement("pre");
out.id = "probe";
out.textContent = JSON.stringify(seen);
document.body.append(out);
</script></body>"""


def look(page: Path, profile: Path, *more: str) -> tuple[dict[str, Any], str]:
    """What the probe saw, and what the browser logged about the page."""
    assert CHROMIUM is not None
    copy = page.with_suffix(".probe.html")
    copy.write_text(page.read_text(encoding="utf-8").replace("</body>", PROBE), encoding="utf-8")
    command = [CHROMIUM, *FLAGS, *more, f"--user-data-dir={profile}", "--dump-dom", copy.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, check=True)
    found = re.search(r'<pre id="probe">(.*?)</pre>', done.stdout, re.S)
    assert found, done.stderr[-2000:]
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line or "Uncaught" in line]
    return json.loads(unescape(found.group(1))), "\n".join(console)


@pytest.mark.slow
@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine (Debian: apt-get install chromium)")
@pytest.mark.parametrize("case", ["integer", "float", "large", "auto", "tiny"])
def test_page_in_a_browser(make_report: Any, make_run: Any, comparisons: list, tmp_path: Path, case: str) -> None:
    blocks = {"large": 80, "tiny": 1}.get(case, 30)
    report = make_report(blocks, amplifier=None if case == "float" else 1024)
    if case == "auto":  # several amplifiers, some scales beyond 8 bits
        report["layers"] = [
            (layer, *others)[i % 3]
            for i, (layer, *others) in enumerate(
                zip(*(make_report(blocks, amplifier=a)["layers"] for a in (2048, 8192, 32768)), strict=True)
            )
        ]
    write_html(report, make_run(blocks), tmp_path / "report.html", comparisons)
    seen, console = look(tmp_path / "report.html", tmp_path / "profile")
    assert console == ""
    wanted = {"fig-comparison", "fig-error", "fig-memory", "fig-time"} | ({"fig-error-map"} if blocks > 1 else set())
    wanted |= {"fig-float-scales"} if case == "float" else {"fig-scales", "fig-amplifier"}
    assert set(seen["figures"]) == wanted
    for name, (width, height, shapes) in seen["figures"].items():
        assert width > 600 and height > 100 and shapes >= 4, name
    assert seen["outside"] == []
    assert seen["overlaps"] == []
    assert seen["width"] <= 1200
    errors = [layer["relative_error"] for layer in report["layers"]]
    assert seen["sorted"] == [
        ["descending", sorted(errors, reverse=True)],
        ["ascending", sorted(errors)],
        [None, errors],
    ]
    assert seen["filtered"] == blocks


@pytest.mark.slow
@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine (Debian: apt-get install chromium)")
def test_page_on_a_telephone(make_report: Any, make_run: Any, comparisons: list, tmp_path: Path) -> None:
    write_html(make_report(), make_run(), tmp_path / "report.html", comparisons)
    seen, console = look(tmp_path / "report.html", tmp_path / "profile", "--window-size=500,900")
    assert console == ""
    assert seen["width"] <= 500, "the page itself must not scroll sideways"
