"""What fitune survives: faults injected for real, and inputs made at random, counted.

    python -m benchmarks.reliability                    # some 8 minutes on two idle cores; as root, small disks too
    python -m benchmarks.reliability --only disk        # those tests whose names have the word
    python -m benchmarks.reliability --json             # one JSON object instead of the page

Runs the tests that inject faults and counts what they record: faults, steps that were done twice because they came
after the last checkpoint, and inputs that were accepted or refused with one of fitune's own errors. A test that fails
fails the command. The page that it prints is docs/reliability.md.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from xml.etree import ElementTree

from fitune.runtime.machine.host import probe_cpu
from fitune.runtime.versions import find_versions

ROOT = Path(__file__).parent.parent
TESTS = ("test_faults.py", "test_resume.py", "test_oom.py", "test_fuzz.py")
INTRODUCTION = """\
# Reliability

Faults are injected for real into `fitune run` on small models: signals to processes, disks that are full or read-only,
files that are damaged. Inputs are made at random from valid ones by changing bytes and values.
`python -m benchmarks.reliability` prints this page; `tests/runtime` holds what it runs.
"""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One test, and what it recorded.

    name:       a sentence
    outcome:    passed, failed or skipped
    faults:     injected
    lost_steps: done twice, since they came after the last checkpoint
    inputs:     tried
    accepted, refused: how they ended
    """

    name: str
    outcome: str
    faults: int = 0
    lost_steps: int = 0
    inputs: int = 0
    accepted: int = 0
    refused: int = 0


def run_tests(only: str | None) -> list[Case]:
    """The cases of all tests that record something."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}"]
        command += ["-o", "junit_family=xunit1", *(str(ROOT / "tests" / "runtime" / name) for name in TESTS)]
        subprocess.run([*command, *(["-k", only] if only else [])], cwd=ROOT, stdout=sys.stderr, check=False)
        return list(parse_report(report.read_text(encoding="utf-8")))


def parse_report(xml: str) -> Iterator[Case]:
    """The cases of a JUnit report."""
    for found in ElementTree.fromstring(xml).iter("testcase"):
        recorded = {one.get("name", ""): int(one.get("value", "0")) for one in found.iter("property")}
        known = {name: recorded[name] for name in Case.__dataclass_fields__ if name in recorded}
        outcome = next((one for one in ("failure", "error", "skipped") if found.find(one) is not None), "passed")
        if known or outcome != "passed":
            yield Case(name=_make_sentence(found.get("name", "")), outcome=outcome, **known)


def _make_sentence(name: str) -> str:
    """`a run goes on (SIGTERM)` of `test_a_run_goes_on[SIGTERM]`."""
    words, _, parameters = name.removeprefix("test_").rstrip("]").partition("[")
    return words.replace("_", " ") + (f" ({parameters})" if parameters else "")


def render_page(cases: Sequence[Case]) -> str:
    """The page in Markdown."""
    faults, inputs = [one for one in cases if not one.inputs], [one for one in cases if one.inputs]
    tried = len(faults) - _count(faults, "skipped")
    versions = ", ".join(f"{name} {version}" for name, version in find_versions().items())
    cpu = probe_cpu()
    lines = [
        INTRODUCTION,
        f"{time.strftime('%Y-%m-%d')}, {cpu.name}, {cpu.cores} cores; {versions}.",
        "",
        f"{sum(one.faults for one in faults)} faults: {_count(faults, 'passed')} of {tried} cases passed; "
        f"{sum(one.lost_steps for one in faults)} steps were done twice, none was lost.",
        "",
        "| what happened, and what came of it | faults | steps done twice | |",
        "|---|---|---|---|",
        *(f"| {one.name} | {one.faults} | {one.lost_steps} | {one.outcome} |" for one in faults),
    ]
    if inputs:
        lines += [
            "",
            f"{sum(one.inputs for one in inputs):,} inputs: each ended in a result or in one of fitune's own errors, "
            "and nothing was written outside.",
            "",
            "| kind | inputs | accepted | refused | |",
            "|---|---|---|---|---|",
            *(
                f"| {one.name} | {one.inputs:,} | {one.accepted:,} | {one.refused:,} | {one.outcome} |"
                for one in inputs
            ),
        ]
    return "\n".join(lines) + "\n"


def _count(cases: Sequence[Case], outcome: str) -> int:
    return sum(one.outcome == outcome for one in cases)


def main() -> int:
    """Run, print, and return 0 where every case passed or was skipped."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.reliability")
    parser.add_argument("--only", metavar="WORD", help="tests whose names have it")
    parser.add_argument("--json", action="store_true", help="one JSON object")
    options = parser.parse_args()
    cases = run_tests(options.only)
    print(json.dumps({"cases": [asdict(one) for one in cases]}) if options.json else render_page(cases), end="")
    return 0 if cases and all(one.outcome in ("passed", "skipped") for one in cases) else 1


if __name__ == "__main__":
    sys.exit(main())
