"""`python -m benchmarks.gpu --check`: the tests that need a GPU, each as one line, ok or FAILED with the reason."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).parents[1]
TESTS = "tests/runtime/test_gpu.py"
LIMIT_SECONDS = 540
"""Compiled layers take most of it: each graph is made for the first time."""


def check(*, smoke: bool) -> int:
    """Run the tests; 1 where one fails, or none runs (a smoke test runs none: they need a GPU)."""
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "results.xml"
        command = [sys.executable, "-m", "pytest", TESTS, "-q", "-n", "0", "-p", "no:cacheprovider", "--tb=line"]
        try:
            done = subprocess.run(
                [*command, f"--junitxml={results}"], cwd=ROOT, capture_output=True, text=True, timeout=LIMIT_SECONDS
            )
        except subprocess.TimeoutExpired:
            print(f"FAILED: no end within {LIMIT_SECONDS} s")
            return 1
        if not results.is_file():
            print(f"FAILED: {(done.stderr or done.stdout).strip() or 'pytest did not start'}")
            return 1
        lines = list_results(results)
    for line in lines:
        print(line)
    failed, ran = (
        sum(line.startswith("FAILED") for line in lines),
        sum(not line.startswith("skipped") for line in lines),
    )
    print(f"{ran - failed} ok, {failed} failed, {len(lines) - ran} skipped")
    return 1 if failed or (ran == 0 and not smoke) else 0


def list_results(path: Path) -> list[str]:
    """A line for each test of pytest's results: `ok`, `skipped` or `FAILED`, its seconds, its sentence, the reason."""
    lines = []
    for case in ElementTree.parse(path).getroot().iter("testcase"):
        sentence = (case.get("name") or "").removeprefix("test_").replace("_", " ")
        what = f"({float(case.get('time') or 0):.1f} s) {sentence}"
        broken = next((one for kind in ("failure", "error") for one in case.iter(kind)), None)
        if broken is not None:
            reason = (broken.get("message") or broken.text or "?").strip().splitlines()[0]
            lines.append(f"FAILED  {what}: {reason}")
        elif case.find("skipped") is not None:
            lines.append(f"skipped {what}")
        else:
            lines.append(f"ok      {what}")
    return lines
