"""Faults, injected for real into `fitune run`: signals, full and read-only disks, a GPU that is lost.

What each records with `record_property` is what `python -m benchmarks.reliability` prints.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from command_server import Command, CommandServer, count_steps_done, wait_for_steps
from small_models import save_small_model
from small_runs import read_lines, read_losses, write_recipe

from fitune.runtime.resume.checkpoints import verify

Record = Callable[[str, object], None]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small_model(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def commands() -> Iterator[CommandServer]:
    with CommandServer() as server:
        yield server


def read_report(folder: Path) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((folder / "run" / "report.json").read_text())
    return report


def read_model(folder: Path) -> bytes:
    return (folder / "run" / "model" / "model.safetensors").read_bytes()


def count_sessions(run: Path) -> int:
    """How often the run has started, read while it may be written."""
    path = run / "run.json"
    return len(json.loads(path.read_text())["sessions"]) if path.is_file() else 0


def check_said(said: str) -> None:
    assert "Traceback" not in said and "bug in fitune" not in said, said


def check_checkpoints(run: Path) -> None:
    """Every checkpoint that has its name is whole."""
    for folder in run.glob("checkpoints/step-*"):
        verify(folder, int(folder.name.removeprefix("step-")))


def wait_until_written(run: Path) -> bool:
    """Until a checkpoint is being written; False where that was not seen."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        if any(run.glob("checkpoints/.writing-*")):
            return True
    return False


@pytest.mark.slow
def test_a_run_killed_twenty_times_ends_as_one_that_was_not(
    llama: Path, tmp_path: Path, commands: CommandServer, record_property: Record
) -> None:
    """SIGKILL at random moments of start and training; a quarter of them aim at a checkpoint that is being written."""
    chance, kills, in_writing = random.Random(5), 20, 0
    tables: dict[str, Any] = {"train": {"max_steps": 400, "eval_every": 100}, "output": {"dir": "run", "save_every": 3}}
    for name in ("whole", "killed"):
        write_recipe(tmp_path / name, llama, **tables)
    code, said = commands.run(tmp_path / "whole", "run", "recipe.toml")
    assert code == 0, said
    folder, run = tmp_path / "killed", tmp_path / "killed" / "run"
    for number in range(kills):
        sessions = count_sessions(run)
        command = commands.start(folder, "run", "recipe.toml")
        if number % 4 == 3:
            time.sleep(chance.uniform(0, 1.5))
        else:
            while count_sessions(run) == sessions:
                time.sleep(0.001)
            wait_for_steps(run, count_steps_done(run) + chance.randint(1, 6))
            if number % 4 == 0:
                assert wait_until_written(run)
            time.sleep(chance.uniform(0, 0.02))
        command.send(signal.SIGKILL)
        assert command.wait() == -signal.SIGKILL, command.said
        in_writing += any(run.glob("checkpoints/.writing-*"))
        check_checkpoints(run)
        assert not (run / "report.json").exists()
    code, said = commands.run(folder, "run", "recipe.toml")
    assert code == 0, said
    report = read_report(folder)
    assert kills // 2 < len(report["resumed_from"]) <= kills
    assert read_losses(run) == read_losses(tmp_path / "whole" / "run")
    assert read_model(folder) == read_model(tmp_path / "whole")
    assert in_writing > 0
    record_property("faults", kills)
    record_property("in_writing", in_writing)
    record_property("lost_steps", report["lost_steps"])


@pytest.mark.parametrize(
    ("number", "code", "status"),
    [(signal.SIGTERM, 143, "terminated"), (signal.SIGINT, 130, "interrupted")],
    ids=["SIGTERM", "SIGINT"],
)
def test_a_signal_ends_a_run_with_a_checkpoint_of_its_last_step(
    llama: Path, tmp_path: Path, commands: CommandServer, number: int, code: int, status: str, record_property: Record
) -> None:
    for name in ("whole", "stopped"):
        write_recipe(tmp_path / name, llama, train={"max_steps": 60})
    assert commands.run(tmp_path / "whole", "run", "recipe.toml")[0] == 0
    folder, run = tmp_path / "stopped", tmp_path / "stopped" / "run"
    command = commands.start(folder, "run", "recipe.toml")
    wait_for_steps(run, 5)
    command.send(number)
    assert command.wait() == code, command.said
    check_said(command.said)
    assert "interrupted: saving what was trained so far" in command.said
    assert "next: fitune run recipe.toml --resume" in command.said
    report, steps = read_report(folder), count_steps_done(run)
    assert (report["status"], report["speed"]["steps"]) == (status, steps) and 5 <= steps < 60
    assert [one.name for one in run.glob("checkpoints/*")] == [f"step-{steps:06d}"]
    assert commands.run(folder, "run", "recipe.toml", "--resume")[0] == 0
    report = read_report(folder)
    assert (report["status"], report["resumed_from"], report["lost_steps"]) == ("finished", [steps], 0)
    assert read_losses(run) == read_losses(tmp_path / "whole" / "run")
    assert read_model(folder) == read_model(tmp_path / "whole")
    record_property("faults", 1)
    record_property("lost_steps", report["lost_steps"])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
def test_a_second_signal_ends_a_run_at_once_and_leaves_it_to_be_resumed(
    llama: Path, tmp_path: Path, commands: CommandServer, number: int, record_property: Record
) -> None:
    """The step that the first one waits for takes some seconds."""
    write_recipe(
        tmp_path,
        llama,
        data={"max_length": 512, "eval": None},
        train={"max_steps": 2, "global_batch_size": 600, "micro_batch_size": 4},
    )
    (tmp_path / "train.jsonl").write_text(600 * ('{"text": "' + 150 * "feta cheese " + '"}\n'))
    command = commands.start(tmp_path, "run", "recipe.toml", "--set", "data.max_truncated=1.0")
    wait_for_phase(tmp_path / "run", "backward", command)
    command.send(number)
    wait_for_words(command, "this step is finished first")
    command.send(number)
    assert command.wait() == -number
    check_said(command.said)
    assert count_steps_done(tmp_path / "run") == 0 and not (tmp_path / "run" / "report.json").exists()
    again = commands.start(tmp_path, "run", "recipe.toml", "--set", "data.max_truncated=1.0")
    wait_for_words(again, "the run starts again")
    again.send(signal.SIGKILL)
    again.wait()
    record_property("faults", 2)


def wait_for_phase(run: Path, phase: str, command: Command) -> None:
    deadline = time.monotonic() + 60
    while f'"{phase}"' not in ((run / "samples.jsonl").read_text() if (run / "samples.jsonl").is_file() else ""):
        assert time.monotonic() < deadline, command.said
        time.sleep(0.01)


def wait_for_words(command: Command, words: str) -> None:
    deadline = time.monotonic() + 60
    while words not in command.said:
        assert time.monotonic() < deadline, command.said
        time.sleep(0.01)


def test_a_signal_before_the_first_step_leaves_nothing(llama: Path, tmp_path: Path, commands: CommandServer) -> None:
    write_recipe(tmp_path, llama)
    command = commands.start(tmp_path, "run", "recipe.toml")
    wait_for_words(command, "loading the model")
    command.send(signal.SIGTERM)
    assert command.wait() in (143, 0)
    assert not (tmp_path / "run").exists() or (tmp_path / "run" / "report.json").exists()


@pytest.fixture
def mount_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """Makes a disk of so many KiB; skips where this user may not mount one."""
    mounted: list[Path] = []

    def mount(kibibytes: int) -> Path:
        folder = tmp_path / "disk"
        folder.mkdir()
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={kibibytes}k", "tmpfs", str(folder)], capture_output=True, check=False
        )
        if done.returncode:
            pytest.skip("only root mounts a small disk")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def write_recipe_on(disk: Path, folder: Path, llama: Path, **tables: Any) -> Path:
    """The plan is told of a large disk; what there is of it shows in the run."""
    output = {"dir": str(disk / "run"), "save_every": 2} | tables.pop("output", {})
    return write_recipe(folder, llama, budget={"memory": "8GiB", "disk": "10GB"}, output=output, **tables)


def test_a_disk_too_small_for_a_second_checkpoint_keeps_the_first_and_the_run_goes_on(
    llama: Path, tmp_path: Path, commands: CommandServer, mount_disk: Callable[[int], Path], record_property: Record
) -> None:
    disk = mount_disk(2900)
    write_recipe_on(disk, tmp_path, llama)
    code, said = commands.run(tmp_path, "run", "recipe.toml")
    assert code == 0, said
    check_said(said)
    assert (
        "no checkpoint of step 4: " in said
        and "of disk is free; the run goes on, and the last checkpoint stays" in said
    )
    assert [one.name for one in (disk / "run" / "checkpoints").iterdir()] == ["step-000002"]
    check_checkpoints(disk / "run")
    record_property("faults", 1)


@pytest.mark.slow
def test_a_disk_that_fills_up_ends_no_training_and_the_run_is_resumed_when_there_is_room(
    llama: Path, tmp_path: Path, commands: CommandServer, mount_disk: Callable[[int], Path], record_property: Record
) -> None:
    """Filled to the last byte after some steps: metrics wait, checkpoints fail, and at last the result does."""
    disk = mount_disk(9000)
    write_recipe_on(disk, tmp_path / "full", llama, train={"max_steps": 40})
    write_recipe(tmp_path / "whole", llama, train={"max_steps": 40})
    assert commands.run(tmp_path / "whole", "run", "recipe.toml")[0] == 0
    command = commands.start(tmp_path / "full", "run", "recipe.toml")
    wait_for_steps(disk / "run", 6)
    with stopped_between_checkpoints(command, disk / "run"):
        fill(disk / "filler")
    assert command.wait() == 1, command.said
    check_said(command.said)
    assert "no checkpoint of step " in command.said
    assert "No space left on device" in command.said and "error: " in command.said
    check_checkpoints(disk / "run")
    (disk / "filler").unlink()
    code, said = commands.run(tmp_path / "full", "run", "recipe.toml")
    assert code == 0, said
    report = json.loads((disk / "run" / "report.json").read_text())
    assert read_losses(disk / "run") == read_losses(tmp_path / "whole" / "run")
    assert (disk / "run/model/model.safetensors").read_bytes() == read_model(tmp_path / "whole")
    record_property("faults", 1)
    record_property("lost_steps", report["lost_steps"])


@contextlib.contextmanager
def stopped_between_checkpoints(command: Command, run: Path) -> Iterator[None]:
    """Inside, the run stands still with whole checkpoints only: none that breaks off or is removed later leaves room
    beyond what it took."""
    while True:
        command.send(signal.SIGSTOP)
        while not has_stopped(command.pid):
            time.sleep(0.001)
        found = [one.name for one in run.glob("checkpoints/*")]
        if len(found) <= 2 and all(name.startswith("step-") for name in found):
            break
        command.send(signal.SIGCONT)
        time.sleep(0.002)
    try:
        yield
    finally:
        command.send(signal.SIGCONT)


def has_stopped(pid: int) -> bool:
    """Whether every thread of a process stands still after SIGSTOP."""
    states = [stat.read_text().rpartition(") ")[2][0] for stat in Path("/proc", str(pid), "task").glob("*/stat")]
    assert "Z" not in states, "the run ended before its disk was filled"
    return all(state == "T" for state in states)


def fill(path: Path) -> None:
    """Write until nothing more goes."""
    with path.open("ab", buffering=0) as file:
        for size in (2**16, 2**10, 1):
            try:
                while file.write(b"\0" * size):
                    pass
            except OSError:
                continue


def test_a_checkpoint_that_breaks_off_in_the_middle_leaves_no_trace(
    llama: Path, tmp_path: Path, commands: CommandServer, record_property: Record
) -> None:
    """Files end at 1 MB, which the weights fit into and the optimizer's states do not."""
    write_recipe(tmp_path, llama, output={"dir": "run", "save_every": 2})
    code, said = commands.run(tmp_path, "run", "recipe.toml", largest_file=1_000_000)
    assert code == 0, said
    check_said(said)
    assert "no checkpoint of step 2: " in said and "File too large; the run goes on" in said
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []
    record_property("faults", 2)


def test_metrics_that_the_disk_does_not_take_wait_and_are_written_later(
    llama: Path, tmp_path: Path, commands: CommandServer, mount_disk: Callable[[int], Path], record_property: Record
) -> None:
    disk = mount_disk(9000)
    write_recipe_on(disk, tmp_path, llama, train={"max_steps": 80}, output={"save_every": "never"})
    command = commands.start(tmp_path, "run", "recipe.toml")
    wait_for_steps(disk / "run", 4)
    fill(disk / "filler")
    while "its lines wait" not in command.said:
        fill(disk / "filler")
    (disk / "filler").unlink()
    assert command.wait() == 0, command.said
    assert [line["step"] for line in read_lines(disk / "run/metrics.jsonl") if "loss" in line] == list(range(1, 81))
    record_property("faults", 1)


def test_a_read_only_directory_is_refused_before_anything_is_loaded(
    llama: Path, tmp_path: Path, commands: CommandServer, mount_disk: Callable[[int], Path], record_property: Record
) -> None:
    disk = mount_disk(4000)
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    write_recipe_on(disk, tmp_path, llama)
    code, said = commands.run(tmp_path, "run", "recipe.toml")
    assert code == 1
    check_said(said)
    assert f"output.dir: {disk / 'run'} cannot be written: Read-only file system" in said
    assert "loading the model" not in said
    record_property("faults", 1)


def test_a_directory_of_another_user_is_refused(llama: Path, tmp_path: Path, commands: CommandServer) -> None:
    if os.geteuid() == 0:
        pytest.skip("root writes everywhere")
    (tmp_path / "locked").mkdir(mode=0o555)
    write_recipe(tmp_path, llama, output={"dir": "locked/run"})
    code, said = commands.run(tmp_path, "run", "recipe.toml")
    assert code == 1 and "cannot be written: Permission denied" in said


def test_two_runs_in_one_directory_are_one_too_many(
    llama: Path, tmp_path: Path, commands: CommandServer, record_property: Record
) -> None:
    write_recipe(tmp_path, llama, train={"max_steps": 2000})
    first = commands.start(tmp_path, "run", "recipe.toml")
    wait_for_steps(tmp_path / "run", 2)
    for words in ([], ["--resume"]):
        code, said = commands.run(tmp_path, "run", "recipe.toml", *words)
        assert code == 1
        assert f"is held by a run that is still going (process {first.pid})" in said
    steps = count_steps_done(tmp_path / "run")
    wait_for_steps(tmp_path / "run", steps + 2)
    first.send(signal.SIGKILL)
    first.wait()
    record_property("faults", 2)


@pytest.mark.slow
def test_a_gpu_lost_in_mid_run_is_an_event_and_the_training_goes_on(
    llama: Path, tmp_path: Path, run_on_fake_gpus: Any, record_property: Record
) -> None:
    """The stand-in for NVML answers, then says that the GPU is gone; the training itself is on the CPU."""
    recipe = write_recipe(tmp_path / "lost", llama)
    report = run_on_fake_gpus(
        f"""
        import sys, time
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        import fitune.runtime.training.meter as meter
        from fitune.runtime.training.live import LiveLine
        from fitune.runtime.machine.monitor import Monitor
        from small_runs import run_recipe_file

        class WatchingMeter(meter.Meter):
            def __init__(self, path, plan, device, console):
                super().__init__(path, plan, device, console)
                del os.environ["CUDA_VISIBLE_DEVICES"]
                self._nvml = meter.open_nvml()
                self._monitor = Monitor(path, nvml=self._nvml, on_event=self._show_event, interval_seconds=0.001)

        import fitune.runtime.training.train as train
        train.Meter = WatchingMeter
        update = LiveLine.update

        def lose_gpu(line, step, **figures):
            if step == 2:
                set_state(error=15)
            time.sleep(0.05)
            return update(line, step, **figures)

        LiveLine.update = lose_gpu
        _, report = run_recipe_file(Path({str(recipe)!r}))
        show(report.model_dump(mode="json"))
        """,
        visible="",
        used_mib=1000,
    )
    assert report["status"] == "finished" and report["speed"]["steps"] == 6
    assert [event["kind"] for event in report["events"]] == ["gpu_lost"]
    record_property("faults", 1)


def test_a_gpu_without_nvml_is_an_event_and_no_error(
    llama: Path, tmp_path: Path, run_on_fake_gpus: Any, record_property: Record
) -> None:
    """The driver's library is there and does not start, as with a kernel module of another version."""
    recipe = write_recipe(tmp_path / "run", llama)
    shown = run_on_fake_gpus(
        f"""
        import sys
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        import torch
        from rich.console import Console
        from small_runs import plan_recipe
        from fitune.runtime.training.meter import Meter

        _, plan = plan_recipe(Path({str(recipe)!r}))
        console = Console(record=True, quiet=True)
        meter = Meter(Path("samples.jsonl"), plan, torch.device("cuda"), console)
        meter.__enter__()
        show([event.message for event in meter.summary.events])
        """,
        init_error=18,
    )
    assert shown == ["the GPU is not watched: the NVIDIA kernel module and the driver's library differ in version"]
    record_property("faults", 1)
