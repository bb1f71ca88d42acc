"""`fitune data make` as a user types it, in processes of its own where it is stopped."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from commands import Commands, list_files
from stub_endpoint import Reply, Stub, answer_well, fail, run_stub

from fitune.recipes.make_spec import read_example

KEY = "sk-0123456789abcdefghij"


@pytest.fixture(autouse=True)
def without_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setenv("MY_KEY", KEY)


def write_spec(folder: Path, url: str, *, rows: int = 24, limits: str = "concurrency = 2") -> Path:
    path = folder / "cheese.toml"
    path.write_text(
        f"""
[source]
topics = ["feta", "brie", "gouda"]
[persona]
name = "Pavlos"
description = "You are Pavlos."
[output]
file = "made.jsonl"
rows = {rows}
eval = 0.25
[endpoint]
base_url = "{url}"
model = "m"
api_key_env = "MY_KEY"
price_input = 1.0
price_output = 2.0
timeout_seconds = 20
[limits]
{limits}
""",
        encoding="utf-8",
    )
    return path


def start(spec: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "fitune.runtime.cli", "data", "make", str(spec)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=spec.parent)


def wait_until(condition: Callable[[], bool]) -> None:
    for _ in range(600):
        if condition():
            return
        time.sleep(0.05)
    raise AssertionError("it did not happen within half a minute")


def count_answers(folder: Path) -> int:
    path = folder / "made.answers.jsonl"
    return path.read_bytes().count(b'\n{"kind":"answer"') if path.exists() else 0


def slowly(number: int, body: dict[str, Any]) -> Reply:
    return Reply(**{**vars(answer_well(number, body)), "delay_seconds": 0.15})


def test_the_whole_way_from_the_example_to_a_plan(fitune: Commands, workspace: Path) -> None:
    example = fitune("data", "make", "--example").out
    assert example == read_example()
    with run_stub() as stub:
        Path("cheese.toml").write_text(example.replace("http://localhost:8000/v1", stub.url), encoding="utf-8")
        dry = fitune("data", "make", "cheese.toml", "--dry-run")
        assert (dry.code, dry.err, stub.received) == (0, "", [])
        assert "Topic: how feta is made" in dry.out
        assert dry.out.splitlines()[-1] == "nothing was sent; next: fitune data make cheese.toml"
        made = fitune("data", "make", "cheese.toml")
    assert (made.code, made.err) == (0, "")
    assert "48 of 48 rows in pavlos.jsonl, 6 of them held out in pavlos.eval.jsonl" in made.out
    following = made.out.splitlines()[-1].removeprefix("next: fitune ")
    assert following == "init pavlos-recipe.toml --data pavlos.jsonl --eval pavlos.eval.jsonl"
    assert fitune(*following.split()).code == 0
    assert fitune("validate", "pavlos-recipe.toml").out.endswith("42 rows to train on (instruction), 6 held out\n")


def test_json_is_one_object(fitune: Commands, workspace: Path) -> None:
    with run_stub() as stub:
        spec = str(write_spec(workspace, stub.url))
        dry = json.loads(fitune("data", "make", spec, "--dry-run", "--json").out)
        made = json.loads(fitune("data", "make", spec, "--json").out)
    assert dry["requests"][0]["model"] == "m"
    assert (made["status"], made["rows"]) == ("finished", 24)
    assert made["cost"] <= dry["max_cost"]


def test_limits_of_the_command_line_come_before_the_specs(fitune: Commands, workspace: Path) -> None:
    with run_stub() as stub:
        spec = str(write_spec(workspace, stub.url, limits="max_requests = 100"))
        result = fitune("data", "make", spec, "--max-requests", "2", "--concurrency", "1")
    assert (result.code, len(stub.received), stub.most_at_once) == (0, 2, 1)
    assert result.err == "note: stopped: limits.max_requests = 2 is reached\n"
    assert f"next: fitune data make {spec}" in result.out


def test_a_refused_key_is_said_and_is_nowhere_to_be_read(fitune: Commands, workspace: Path) -> None:
    with run_stub(lambda number, body: fail(401, f"Incorrect API key provided: {KEY}")) as stub:
        result = fitune.apart("--debug", "data", "make", str(write_spec(workspace, stub.url)))
    assert result.code == 1
    assert "Traceback" in result.err
    assert stub.received[0].headers["Authorization"] == f"Bearer {KEY}"
    written = b"".join(content for _, content in list_files(workspace))
    assert KEY not in result.out + result.err + written.decode()


def test_a_refused_key_is_one_line_that_names_its_variable(fitune: Commands, workspace: Path) -> None:
    with run_stub(lambda number, body: fail(401, f"Incorrect API key provided: {KEY}")) as stub:
        result = fitune("data", "make", str(write_spec(workspace, stub.url)))
    assert result.code == 1
    assert result.err == ("error: HTTP 401: Incorrect API key provided: [key] (the key in $MY_KEY was refused)\n")


def test_a_variable_that_is_not_set_is_said_before_anything_is_sent(
    fitune: Commands, workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MY_KEY")
    with run_stub() as stub:
        spec = write_spec(workspace, stub.url)
        before = list_files(workspace)
        result = fitune("data", "make", str(spec))
        assert (result.code, stub.received, list_files(workspace)) == (1, [], before)
    assert "endpoint.api_key_env: there is no environment variable of that name" in result.err


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["data", "make"], 2, "give a SPEC.toml; --example prints one to start from"),
        (["data", "mak", "s.toml"], 2, 'there is no command and no recipe "mak" (did you mean "make"?)'),
        (["data", "make", "none.toml"], 1, "none.toml: cannot be read: No such file or directory"),
        (["data", "make", "."], 1, "cannot be read: Is a directory"),
        (["data", "make", "rows.jsonl"], 1, "rows.jsonl: is not valid TOML"),
        (["data", "make", "recipe.toml"], 1, "recipe.toml: model: is not a table of a spec"),
        (["data", "make", "s.toml", "--max-cost", "much"], 2, "'much' is not a valid float"),
        (["data", "make", "s.toml", "--requests-per-minute", "0"], 1, "--requests-per-minute: 0 is not a whole number"),
    ],
)
def test_a_mistake_of_the_command_line_is_one_message(
    fitune: Commands, workspace: Path, words: list[str], code: int, message: str
) -> None:
    write_spec(workspace, "http://localhost:1/v1").rename("s.toml")
    result = fitune(*words)
    assert result.code == code
    assert message in result.err


def kill_and_resume(folder: Path, stub: Stub, number: signal.Signals) -> tuple[int, str, str]:
    """Start, send the signal after a third of the answers, and start again; the first start's code and output."""
    spec = write_spec(folder, stub.url)
    process = start(spec)
    wait_until(lambda: count_answers(folder) >= 2)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    code = process.returncode
    again = start(spec)
    last, last_err = again.communicate(timeout=60)
    assert (again.returncode, last_err) == (0, "")
    assert "24 of 24 rows in made.jsonl, 6 of them held out in made.eval.jsonl" in last
    return code, out, err


def list_prompts(stub: Stub) -> list[str]:
    return [json.dumps(one.body, sort_keys=True) for one in stub.received]


def test_a_killed_run_goes_on_and_repeats_at_most_what_was_under_way(tmp_path: Path) -> None:
    with run_stub(slowly) as stub:
        code, _, _ = kill_and_resume(tmp_path, stub, signal.SIGKILL)
    prompts = list_prompts(stub)
    assert code == -signal.SIGKILL
    assert len(set(prompts)) == 6
    assert len(prompts) <= 6 + 2, "two requests were under way"


@pytest.mark.slow
def test_a_run_that_is_killed_at_20_random_moments_ends_with_all_rows(tmp_path: Path) -> None:
    rng, concurrency = random.Random(0), 3

    def reply(number: int, body: dict[str, Any]) -> Reply:
        return Reply(**{**vars(answer_well(number, body)), "delay_seconds": rng.uniform(0, 0.3)})

    with run_stub(reply) as stub:
        spec = write_spec(tmp_path, stub.url, rows=1200, limits=f"concurrency = {concurrency}\nmax_requests = 1000")
        kills = 0
        for _ in range(20):
            process = start(spec)
            before = len(stub.received)
            wait_until(lambda seen=before, one=process: len(stub.received) > seen or one.poll() is not None)  # type: ignore
            time.sleep(rng.uniform(0, 0.6))
            if process.poll() is None:
                process.kill()
                kills += 1
            process.communicate(timeout=60)
        last = start(spec)
        out, err = last.communicate(timeout=120)
    assert (kills, last.returncode) == (20, 0), err
    assert "1,200 of 1,200 rows" in out
    prompts = list_prompts(stub)
    assert len(prompts) - len(set(prompts)) <= kills * concurrency
    rows = [line for name in ("made", "made.eval") for line in (tmp_path / f"{name}.jsonl").open()]
    assert len(set(rows)) == 1200
    print(f"20 kills: {len(prompts)} requests for {len(set(prompts))} prompts, {len(rows)} rows")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_waits_for_what_is_under_way_and_pays_nothing_twice(
    tmp_path: Path, number: signal.Signals
) -> None:
    with run_stub(slowly) as stub:
        code, out, err = kill_and_resume(tmp_path, stub, number)
    prompts = list_prompts(stub)
    assert code == 128 + number
    assert len(prompts) == len(set(prompts)) == 6
    assert "note: stopped: interrupted" in err
    assert "next: fitune data make" in out


def test_a_second_interrupt_ends_it_at_once_and_the_next_start_has_the_answers(tmp_path: Path) -> None:
    def reply(number: int, body: dict[str, Any]) -> Reply:
        return Reply(**{**vars(answer_well(number, body)), "delay_seconds": 15 if 2 <= number < 4 else 0})

    with run_stub(reply) as stub:
        spec = write_spec(tmp_path, stub.url)
        process = start(spec)
        wait_until(lambda: len(stub.received) == 4 and count_answers(tmp_path) == 2)
        process.send_signal(signal.SIGINT)
        time.sleep(1)
        assert process.poll() is None, "the first one waits for what is under way"
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=10)
        assert process.returncode == -signal.SIGINT
        assert "what is under way will be charged for and is waited for; once more to stop at once" in err
        last, _ = start(spec).communicate(timeout=60)
    assert "24 of 24 rows" in last
    assert len(stub.received) == 8


def test_a_file_that_cannot_be_written_is_said_before_anything_is_sent(fitune: Commands, workspace: Path) -> None:
    with run_stub() as stub:
        spec = write_spec(workspace, stub.url)
        spec.write_text(spec.read_text().replace("made.jsonl", "rows.jsonl/made.jsonl"))
        result = fitune("data", "make", str(spec))
        assert (result.code, stub.received) == (1, [])
    assert result.err == f"error: {workspace}/rows.jsonl/made.answers.jsonl: cannot be written: File exists\n"
