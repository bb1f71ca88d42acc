from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from fitune.recipes.errors import RunError
from fitune.runtime.resume.checkpoints import CheckpointStore
from fitune.runtime.rundir import RunDirectory

HOLD = """
import sys
from pathlib import Path
from fitune.runtime.resume.checkpoints import CheckpointStore
from fitune.runtime.rundir import RunDirectory
with RunDirectory(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def list_files(folder: Path) -> list[str]:
    return sorted(str(one.relative_to(folder)) for one in folder.rglob("*"))


def test_a_run_makes_its_directory_with_all_its_parents(tmp_path: Path) -> None:
    with RunDirectory(tmp_path / "runs" / "mine" / "first") as run:
        run.write_text("notes.txt", "feta")
    assert list_files(tmp_path / "runs" / "mine") == ["first", "first/notes.txt"]


def test_a_directory_that_is_empty_may_be_used(tmp_path: Path) -> None:
    with RunDirectory(tmp_path) as run:
        run.write_text("notes.txt", "feta")
    assert list_files(tmp_path) == ["notes.txt"]


def test_a_directory_held_by_a_live_run_is_refused_with_its_process(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLD, str(tmp_path / "run")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdin is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(RunError, match=rf"output\.dir: .*run is held by .* going \(process {other.pid}\)"):
            RunDirectory(tmp_path / "run").__enter__()
        other.stdin.close()
    with RunDirectory(tmp_path / "run"):
        pass


def test_a_run_that_was_killed_holds_its_directory_no_longer(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLD, str(tmp_path / "run")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        other.stdout.readline()
        other.kill()
    assert list_files(tmp_path / "run") == [".lock"]
    with RunDirectory(tmp_path / "run"):
        assert (tmp_path / "run" / ".lock").read_text() == str(os.getpid())


@pytest.mark.parametrize(
    ("name", "what"), [("report.json", "a finished run"), ("notes.txt", "files of something else")]
)
def test_a_directory_with_files_in_it_is_refused_and_left_as_it_is(tmp_path: Path, name: str, what: str) -> None:
    (tmp_path / name).write_text("mine")
    with pytest.raises(RunError, match=rf"output\.dir: .* holds {what}.*\({name}\)"):
        RunDirectory(tmp_path).__enter__()
    assert list_files(tmp_path) == [name] and (tmp_path / name).read_text() == "mine"


def test_a_file_in_the_place_of_the_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("mine")
    with pytest.raises(RunError, match=r"output\.dir: .*run is a file, not a folder"):
        RunDirectory(tmp_path / "run").__enter__()


def test_a_place_that_cannot_be_written_is_refused() -> None:
    with pytest.raises(RunError, match=r"output\.dir: /proc/.* cannot be written"):
        RunDirectory(Path("/proc/fitune/run")).__enter__()


def test_clearing_removes_what_the_run_wrote_and_the_directory_that_it_made(tmp_path: Path) -> None:
    with RunDirectory(tmp_path / "run") as run:
        run.write_text("notes.txt", "feta")
        with run.write_folder("checkpoints/one") as folder:
            (folder / "weights").write_text("feta")
        run.clear()
        assert list_files(tmp_path / "run") == [".lock"]
    assert list_files(tmp_path) == []


def test_clearing_leaves_a_directory_that_was_there_before(tmp_path: Path) -> None:
    with RunDirectory(tmp_path) as run:
        run.write_text("notes.txt", "feta")
        run.clear()
    assert tmp_path.is_dir() and list_files(tmp_path) == []


def test_a_document_is_json_without_nan_and_readable_by_others(tmp_path: Path) -> None:
    with RunDirectory(tmp_path) as run:
        run.write_json("plan.json", {"a": 1})
        assert json.loads((tmp_path / "plan.json").read_text()) == {"a": 1}
        assert stat.S_IMODE((tmp_path / "plan.json").stat().st_mode) == 0o644
        with pytest.raises(ValueError, match="JSON"):
            run.write_json("plan.json", {"a": float("nan")})
        assert json.loads((tmp_path / "plan.json").read_text()) == {"a": 1}
    assert list_files(tmp_path) == ["plan.json"]


def test_a_folder_appears_only_once_it_is_whole(tmp_path: Path) -> None:
    with RunDirectory(tmp_path) as run:
        with run.write_folder("adapter") as folder:
            (folder / "weights").write_text("feta")
            assert not (tmp_path / "adapter").exists()
        assert list_files(tmp_path / "adapter") == ["weights"]
        assert stat.S_IMODE((tmp_path / "adapter").stat().st_mode) == 0o755


def test_a_folder_whose_writing_fails_leaves_nothing(tmp_path: Path) -> None:
    with RunDirectory(tmp_path) as run:
        with pytest.raises(KeyboardInterrupt), run.write_folder("adapter") as folder:
            (folder / "weights").write_text("half")
            raise KeyboardInterrupt
        assert list_files(tmp_path) == [".lock"]


def test_a_folder_replaces_the_one_of_that_name(tmp_path: Path) -> None:
    with RunDirectory(tmp_path) as run:
        for name in ("old", "new"):
            with run.write_folder("adapter") as folder:
                (folder / name).write_text(name)
    assert list_files(tmp_path) == ["adapter", "adapter/new"]


def test_a_full_disk_is_said_in_one_message(tmp_path: Path) -> None:
    with (
        RunDirectory(tmp_path) as run,
        pytest.raises(RunError, match=r"adapter cannot be written: No space left"),
        run.write_folder("adapter"),
    ):
        Path("/dev/full").write_text("feta")
    assert list_files(tmp_path) == []


def test_a_checkpoint_whose_removal_breaks_off_is_none_and_is_swept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Regression: a kill during rotation left a checkpoint that lacked files under its name."""

    def fill(folder: Path) -> dict[str, str]:
        (folder / "state.json").write_text("{}")
        return {}

    def break_off(folder: Path, **_: object) -> None:
        (folder / "state.json").unlink()
        raise OSError("killed")

    with RunDirectory(tmp_path / "run") as directory:
        store = CheckpointStore(directory)
        for step in (1, 2, 3):
            store.write(step, fill, needed_bytes=0)
        with monkeypatch.context() as broken:
            broken.setattr("fitune.runtime.resume.checkpoints.shutil.rmtree", break_off)
            store.rotate(2, None)
        assert store.list_steps() == [2, 3]
        assert all(store.find(step) for step in (2, 3))
    with RunDirectory(tmp_path / "run", resume=True):
        assert sorted(one.name for one in (tmp_path / "run" / "checkpoints").iterdir()) == [
            "step-000002",
            "step-000003",
        ]
