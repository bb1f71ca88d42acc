from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.text import Text
from small_models import save_small_model
from small_runs import plan_recipe, write_recipe

from fitune.recipes.errors import RunError
from fitune.runtime.redaction import redact
from fitune.runtime.report import load_report
from fitune.runtime.report_view import render_report
from fitune.runtime.rundir import RunDirectory
from fitune.runtime.shown import ShownConsole
from fitune.runtime.training.train import run_job


def print_on_terminal(*objects: object) -> str:
    file = io.StringIO()
    console = ShownConsole(file=file, force_terminal=True, width=200, highlight=False)
    for one in objects:
        console.print(one)
    return file.getvalue()


@pytest.mark.parametrize(
    ("text", "hidden"),
    [
        ("401 for https://me:s3cret@host/x", "s3cret"),
        ("token hf_abcdefghijklmnopqrstuv is refused", "hf_abcdefghijklmnopqrstuv"),
        ("Incorrect API key: sk-proj-abcdefghijklmnop1234", "sk-proj-abcdefghijklmnop1234"),
        ("the key is correct horse", "correct horse"),
    ],
)
def test_tokens_are_hidden(text: str, hidden: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_API_KEY", "correct horse")
    assert hidden not in redact(text) and "***" in redact(text)
    assert hidden not in print_on_terminal(Text(text))


def test_words_are_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHORT_TOKEN", "true")
    text = "it is true that hf_hub and sk-learn are at https://huggingface.co/a@b"
    assert redact(text) == text


def test_a_token_of_the_environment_is_in_no_file_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the data, where the sample question repeats it, and in a comment of the recipe."""
    secret = "hf_ThisIsNoRealTokenAtAll0"
    monkeypatch.setenv("HF_TOKEN", secret)
    recipe = write_recipe(tmp_path, save_small_model(tmp_path / "model"), train={"max_steps": 1})
    recipe.write_text(f"# {secret}\n" + recipe.read_text())
    rows = [{"instruction": f"What is {secret}?", "output": "No cheese."}]
    (tmp_path / "eval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    job, plan = plan_recipe(recipe)
    file = io.StringIO()
    run_job(job, plan, tmp_path / "run", ShownConsole(file=file, width=200))
    render_report(*load_report(tmp_path / "run"), ShownConsole(file=file, width=200))
    assert secret not in file.getvalue() and "What is ***?" in file.getvalue()
    for path in (tmp_path / "run").rglob("*"):
        assert not path.is_file() or secret.encode() not in path.read_bytes(), path


@pytest.mark.parametrize("name", ["metrics.jsonl", "report.json", "checkpoints", ".lock", "adapter"])
def test_a_link_out_of_the_run_directory_is_refused(tmp_path: Path, name: str) -> None:
    outside = tmp_path / "outside"
    outside.write_text("precious")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).symlink_to(outside)
    with pytest.raises(RunError, match="is a link: a run writes into its own directory only"):
        RunDirectory(tmp_path / "run", resume=True).__enter__()
    assert outside.read_text() == "precious"


def test_a_folder_is_not_written_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    with RunDirectory(tmp_path / "run") as run:
        (tmp_path / "run" / "checkpoints").symlink_to(tmp_path / "outside")
        with pytest.raises(RunError, match="leaves the run's directory"), run.write_folder("checkpoints/step-000001"):
            pass
    assert not list((tmp_path / "outside").iterdir())
