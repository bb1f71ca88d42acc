"""Whatever bytes a recipe, a dataset, a plan, a run's record or a checkpoint holds: one of fitune's own errors or a
right result, never another exception, and nothing written outside.

Each kind is tried with 1,000 inputs (`python -m benchmarks.reliability` prints how they ended).
"""

from __future__ import annotations

import copy
import io
import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from rich.console import Console
from small_models import save_small_model
from small_runs import execute_until, plan_recipe, write_recipe

from fitune.planner.show.plan import render_plan
from fitune.recipes.data_table import DataTable
from fitune.recipes.errors import FituneError
from fitune.recipes.load import load_recipe
from fitune.runtime.data.sources import load_rows
from fitune.runtime.model.build import build_model
from fitune.runtime.planning import load_plan
from fitune.runtime.report import load_report
from fitune.runtime.report_view import render_report
from fitune.runtime.resume.checkpoints import Checkpoint, Manifest, StoredFile, compute_sha256, verify, walk
from fitune.runtime.resume.content import list_weights, load_state, restore_training, restore_weights
from fitune.runtime.resume.run_record import is_unfinished, load_record
from fitune.runtime.training.loop import Progress, TrainingLoop

EXAMPLES = 1000
Record = Callable[[str, object], None]
Change = Callable[[bytes], bytes]
ODD = [
    *(b'"', b"{", b"}", b"[", b"]", b",", b":", b"=", b"\n", b"\0", b"\xff", b"\xed\xa0\x80", b"\xef\xbb\xbf", b"#"),
    *(b"null", b"true", b"-1", b"1e999", b"NaN", b"9" * 30, b"0.5", b'""', b"[]", b"{}", b'"../../x"', b'"\\ud800"'),
    *(b"\x1b[2J", b"/etc/passwd", b"[[[[[[[[", b'{"a":' * 20),
]


ODD_VALUES = [
    *(None, True, False, 0, -1, 1, 2**31, 2**63, 10**30, 0.5, -1e308, 1e308, "", "x", "auto", "../../x", "/etc/passwd"),
    *("\x1b[2J", "\u202e", "\ud800", "9" * 30, [], [[]], [None], {}, {"x": 1}, [1, 2, 3], ["a"] * 40, "0" * 64),
]


@st.composite
def byte_changes(draw: st.DrawFn) -> Change:
    """Bytes inserted, replaced, deleted, repeated, cut off or flipped."""
    how = st.sampled_from(["insert", "replace", "delete", "repeat", "cut", "flip"])
    what = st.sampled_from(ODD) | st.binary(min_size=1, max_size=4)
    one = st.tuples(how, st.floats(0, 1, exclude_max=True), st.integers(1, 40), what)
    todo = draw(st.lists(one, min_size=1, max_size=4))
    return lambda content: change_bytes(content, todo)


@st.composite
def value_changes(draw: st.DrawFn) -> Change:
    """Values of a JSON document, of a line of one, or of a safetensors header replaced, keys dropped or added."""
    how = st.sampled_from(["replace", "replace", "drop", "add"])
    one = st.tuples(how, st.floats(0, 1, exclude_max=True), st.sampled_from(ODD_VALUES))
    todo = draw(st.lists(one, min_size=1, max_size=3))
    return lambda content: change_values(content, todo)


def changes() -> st.SearchStrategy[Change]:
    return byte_changes() | value_changes()


def change_values(content: bytes, todo: list[tuple[str, float, Any]]) -> bytes:
    if content[8:10] == b'{"':
        size = int.from_bytes(content[:8], "little")
        header = change_document(json.loads(content[8 : 8 + size]), todo)
        return len(header).to_bytes(8, "little") + header + content[8 + size :]
    try:
        return change_document(json.loads(content), todo)
    except ValueError:
        lines = content.split(b"\n")
    at = int(todo[0][1] * len(lines))
    try:
        lines[at] = change_document(json.loads(lines[at]), todo)
    except ValueError:
        lines[at] = json.dumps(todo[0][2]).encode()
    return b"\n".join(lines)


def change_document(document: Any, todo: list[tuple[str, float, Any]]) -> bytes:
    for how, share, odd in todo:
        value = copy.deepcopy(odd)
        places = list(list_places(document))
        if not places:
            break
        table, key = places[int(share * len(places))]
        if how == "replace":
            table[key] = value
        elif how == "drop":
            del table[key]
        elif isinstance(table, list):
            table.append(value)
        else:
            table["odd"] = value
    return json.dumps(document).encode()


def list_places(document: Any) -> Iterator[tuple[Any, Any]]:
    """Every table or list in a document with every key of it."""
    pairs = (
        document.items() if isinstance(document, dict) else enumerate(document) if isinstance(document, list) else ()
    )
    for key, value in list(pairs):
        yield document, key
        yield from list_places(value)


def change_bytes(content: bytes, todo: list[tuple[str, float, int, bytes]]) -> bytes:
    for how, share, size, what in todo:
        at = int(share * len(content))
        before, middle, after = content[:at], content[at : at + size], content[at + size :]
        content = {
            "insert": before + what + middle + after,
            "replace": before + what + after,
            "delete": before + after,
            "repeat": before + middle + middle + after,
            "cut": before,
            "flip": before + bytes(byte ^ 1 for byte in middle[:1]) + middle[1:] + after,
        }[how]
    return content


def fuzz(test: Callable[..., None]) -> Callable[..., None]:
    checks = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
    phases = [Phase.explicit, Phase.generate]
    return settings(
        max_examples=EXAMPLES, derandomize=True, phases=phases, suppress_health_check=checks, deadline=None
    )(test)


class Outcomes:
    """Counts how inputs ended, and sees that nothing was written."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.counts = folder, Counter[str]()

    def list_files(self) -> list[tuple[str, int]]:
        return sorted((str(one), one.stat().st_mtime_ns) for one in self.folder.rglob("*"))

    def try_it(self, action: Callable[[], object]) -> None:
        before = self.list_files()
        try:
            action()
            self.counts["accepted"] += 1
        except FituneError as error:
            assert str(error).strip()
            self.counts["refused"] += 1
        assert self.list_files() == before

    def record(self, record_property: Record) -> None:
        assert sum(self.counts.values()) >= 0.9 * EXAMPLES
        assert self.counts["refused"] > 0
        record_property("inputs", sum(self.counts.values()))
        record_property("accepted", self.counts["accepted"])
        record_property("refused", self.counts["refused"])


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small_model(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def broken(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that ended after step 3, with a checkpoint of step 2 and the report of a finished run beside it."""
    folder = tmp_path_factory.mktemp("run")
    recipe = write_recipe(folder, llama, output={"dir": "run", "save_every": 2}, train={"max_steps": 3})
    execute_until(recipe, 3)
    return folder


def test_fuzzed_recipes(llama: Path, tmp_path: Path, record_property: Record) -> None:
    recipe = write_recipe(tmp_path, llama, output={"keep_best": False}, train={"eval_every": 2})
    content, outcomes = recipe.read_bytes(), Outcomes(tmp_path)

    @fuzz
    @given(changes())
    def run(change: Change) -> None:
        recipe.write_bytes(change(content))
        outcomes.try_it(lambda: load_recipe(str(recipe)))

    run()
    outcomes.record(record_property)


@pytest.mark.slow
def test_fuzzed_datasets(tmp_path: Path, record_property: Record) -> None:
    rows = [
        {"messages": [{"role": "user", "content": "Feta?"}, {"role": "assistant", "content": "A cheese."}]},
        {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Brie?"}]},
        {"messages": [{"role": "user", "content": "\u00e9"}, {"role": "assistant", "content": "\ud83e\uddc0"}]},
    ]
    rows[1]["messages"].append({"role": "assistant", "content": "A cheese, too."})
    outcomes = Outcomes(tmp_path)
    contents = {
        "jsonl": "".join(json.dumps(row) + "\n" for row in rows).encode(),
        "json": json.dumps(
            [{"instruction": "Feta?", "output": "Yes."}, {"instruction": "Brie?", "output": "No."}]
        ).encode(),
        "csv": b'prompt,completion\nFeta?,"A cheese, my friend"\nBrie?,"Another\none"\n',
        "txt": b"Feta is a cheese.\n\nBrie is one, too.\n",
    }

    @fuzz
    @given(changes(), st.sampled_from(sorted(contents)))
    def run(change: Change, suffix: str) -> None:
        path = tmp_path / f"rows.{suffix}"
        path.write_bytes(change(contents[suffix]))
        outcomes.try_it(lambda: load_rows(DataTable(train=path.name), lambda written: tmp_path / written))
        path.unlink()

    run()
    outcomes.record(record_property)


@pytest.mark.slow
def test_fuzzed_plans(llama: Path, tmp_path: Path, record_property: Record) -> None:
    _, plan = plan_recipe(write_recipe(tmp_path, llama))
    content, outcomes = plan.model_dump_json(indent=1).encode(), Outcomes(tmp_path)
    path = tmp_path / "plan.json"

    @fuzz
    @given(changes())
    def run(change: Change) -> None:
        path.write_bytes(change(content))
        outcomes.try_it(lambda: render_plan(load_plan(path), Console(file=io.StringIO(), width=100)))

    run()
    outcomes.record(record_property)


@pytest.mark.slow
def test_fuzzed_records_and_reports(broken: Path, tmp_path: Path, record_property: Record) -> None:
    run_path = tmp_path / "run"
    shutil.copytree(broken / "run", run_path)
    names = ("run.json", "report.json")
    (run_path / "report.json").write_text(json.dumps(REPORT))
    contents, outcomes = {name: (run_path / name).read_bytes() for name in names}, Outcomes(tmp_path)

    def read() -> None:
        is_unfinished(run_path)
        load_record(run_path)
        render_report(*load_report(run_path), Console(file=io.StringIO(), width=100))

    @fuzz
    @given(changes(), st.sampled_from(names))
    def run(change: Change, name: str) -> None:
        (run_path / name).write_bytes(change(contents[name]))
        outcomes.try_it(read)
        (run_path / name).write_bytes(contents[name])

    run()
    outcomes.record(record_property)


REPORT: dict[str, Any] = {
    "recipe": "recipe.toml",
    "recipe_sha256": "0" * 64,
    "status": "finished",
    "started_unix_time": 1.0,
    "loss": {"before": 2.0, "after": 1.0, "first": 2.0, "last": 1.0},
    "sample": {"question": "Feta?", "before": "No.", "after": "A cheese."},
    "measured": {
        "peak_allocated_bytes": None,
        "peak_reserved_bytes": None,
        "peak_device_bytes": 10,
        "peak_host_bytes": 10,
        "disk_bytes": 10,
        "phases": [{"name": "load", "seconds": 1.0, "peak_device_bytes": 10}],
    },
    "speed": {"steps": 1, "tokens": 1, "train_seconds": 1.0, "total_seconds": 1.0, "tokens_per_second": 1.0},
    "output": {"model": "model"},
    "versions": {"torch": "2"},
}


@pytest.mark.slow
def test_fuzzed_checkpoints(llama: Path, broken: Path, tmp_path: Path, record_property: Record) -> None:
    """With the manifest as it was, when a changed file must be noticed; or made anew for the changed file, when what
    is in it must be read with care."""
    source = broken / "run" / "checkpoints" / "step-000002"
    folder = tmp_path / "run" / "checkpoints" / "step-000002"
    shutil.copytree(source, folder)
    contents, outcomes = {name: (folder / name).read_bytes() for name in [*walk(folder)]}, Outcomes(tmp_path)
    names = ["model.safetensors", "training_state.safetensors", "training_state.json", "manifest.json"]
    job, plan = plan_recipe(broken / "recipe.toml")
    built = build_model(llama, plan.strategy, torch.device("cpu"))
    loop = TrainingLoop(plan, job, built, FakeAccelerator(), None, Progress())  # type: ignore[arg-type]
    weights = {name: tensor.clone() for name, tensor in list_weights(built)[1].items()}
    checkpoint = Checkpoint(folder=folder, step=2)

    def read() -> None:
        verify(folder, 2)
        state = load_state(checkpoint)
        restore_weights(checkpoint, built)
        restore_training(checkpoint, state, built, loop)

    @fuzz
    @given(changes(), st.sampled_from(names), st.booleans())
    def run(change: Change, name: str, is_vouched_for: bool) -> None:
        changed = change(contents[name])
        (folder / name).write_bytes(changed)
        if is_vouched_for and name != "manifest.json":
            (folder / "manifest.json").write_text(make_manifest(folder).model_dump_json())
        accepted = outcomes.counts["accepted"]
        outcomes.try_it(read)
        if outcomes.counts["accepted"] > accepted and not is_vouched_for and name != "manifest.json":
            assert changed == contents[name], "a change that the manifest does not vouch for is noticed"
        for one in {name, "manifest.json"}:
            (folder / one).write_bytes(contents[one])
        loop.optimizer.state.clear()

    run()
    read()
    assert {name: tensor.shape for name, tensor in list_weights(built)[1].items()} == {
        name: tensor.shape for name, tensor in weights.items()
    }
    outcomes.record(record_property)


class FakeAccelerator:
    """What the loop asks of accelerate before its first step."""

    device = torch.device("cpu")


def make_manifest(folder: Path) -> Manifest:
    files = {
        name: StoredFile(bytes=(folder / name).stat().st_size, sha256=compute_sha256(folder / name))
        for name in walk(folder)
        if name != "manifest.json"
    }
    return Manifest(step=2, files=files)
