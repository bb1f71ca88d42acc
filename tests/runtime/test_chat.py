from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from small_models import save_small_model
from small_runs import run_recipe_file, write_recipe

from fitune.recipes.errors import RunError
from fitune.runtime.chat import ChatModel, run_chat
from fitune.runtime.data.rows import Message

QUESTION = "What is feta?"
LEARNT = "A good cheese, my friend, feta it is."
ADAPTER_TRAIN = {"max_steps": 250, "learning_rate": 1e-2}


@pytest.fixture(scope="module", params=["full", "lora", "qlora"])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose model has learnt its answers by heart."""
    folder = tmp_path_factory.mktemp(request.param)
    recipe = write_recipe(
        folder,
        save_small_model(folder / "model"),
        method={"kind": request.param, "rank": 32},
        train={"max_steps": 80, "learning_rate": 5e-3} if request.param == "full" else ADAPTER_TRAIN,
    )
    directory, report = run_recipe_file(recipe)
    assert report.loss.after is not None and report.loss.after < 1.0
    return directory


def ask(run: Path, question: str = QUESTION, *, use_base: bool = False) -> str:
    console = Console(file=io.StringIO(), width=1000)
    run_chat(run, console, use_base=use_base, question=question)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_the_tuned_model_answers_as_it_was_trained_and_stops(run: Path) -> None:
    answer = ask(run)
    assert answer.startswith("A good cheese") and answer.endswith("\n")
    assert len(answer) < 3 * len(LEARNT)


def test_the_base_model_has_learnt_nothing(run: Path) -> None:
    assert "good cheese" not in ask(run, use_base=True)


def test_an_answer_comes_in_pieces_and_the_conversation_goes_on(run: Path) -> None:
    chat = ChatModel(run, use_base=False)
    pieces: list[str] = []
    answer = chat.stream(QUESTION, pieces.append)
    assert len(pieces) > 3 and "".join(pieces) == answer
    chat.stream("And manouri?", pieces.append)
    assert [one.role for one in chat.messages] == ["user", "assistant", "user", "assistant"]
    assert chat.messages[1].content == answer


def test_an_error_while_answering_reaches_the_caller(run: Path) -> None:
    """It happens in another thread: without care the answer would be empty, or never come."""
    chat = ChatModel(run, use_base=False)
    chat.model.get_output_embeddings().weight.data = torch.zeros(3, 3)
    with pytest.raises(RuntimeError, match=r"shapes|size"):
        chat.stream(QUESTION, lambda _: None)


def test_the_recipes_system_prompt_begins_the_conversation(tmp_path: Path) -> None:
    model = save_small_model(tmp_path / "model")
    recipe = write_recipe(tmp_path, model, data={"system": "You are Pavlos."}, train={"max_steps": 1})
    directory, _ = run_recipe_file(recipe)
    assert ChatModel(directory, use_base=False).messages == [Message(role="system", content="You are Pavlos.")]


def test_questions_are_asked_until_an_empty_line(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{QUESTION}\n\nnever asked\n"))
    file = io.StringIO()
    run_chat(run, Console(file=file), use_base=False, question=None)
    assert file.getvalue().count("you >") <= 2 and "A good cheese" in file.getvalue()


def copy_run(run: Path, folder: Path) -> Path:
    shutil.copytree(run.parent, folder, dirs_exist_ok=True)
    document = json.loads((folder / "run" / "plan.json").read_text())
    document["recipe"] = str(folder / "recipe.toml")
    document["resolved_recipe"]["model"]["id"] = str(folder / "model")
    (folder / "run" / "plan.json").write_text(json.dumps(document))
    text = (folder / "recipe.toml").read_text().replace(str(run.parent / "model"), str(folder / "model"))
    (folder / "recipe.toml").write_text(text)
    return folder / "run"


def test_weights_that_are_gone_are_said(run: Path, tmp_path: Path) -> None:
    copied = copy_run(run, tmp_path)
    for name in ("model", "adapter"):
        shutil.rmtree(copied / name, ignore_errors=True)
    with pytest.raises(RunError, match=r"run: its (model|adapter) is gone"):
        ask(copied)


def test_a_base_model_that_is_gone_is_said(run: Path, tmp_path: Path) -> None:
    copied = copy_run(run, tmp_path)
    assert "good cheese" not in ask(copied, use_base=True)
    shutil.rmtree(tmp_path / "model")
    with pytest.raises(RunError, match=r"the base model of this run cannot be found any more"):
        ask(copied, use_base=True)


def test_a_base_model_that_is_now_another_is_refused(run: Path, tmp_path: Path) -> None:
    copied = copy_run(run, tmp_path)
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.1}))
    with pytest.raises(RunError, match=r"is no longer what .*recipe\.toml names"):
        ask(copied, use_base=True)


def test_the_chat_uses_the_weights_that_the_run_saved(run: Path, tmp_path: Path) -> None:
    copied = copy_run(run, tmp_path)
    (path,) = [one for one in copied.rglob("*.safetensors") if one.parent.name in ("model", "adapter")]
    save_file({name: torch.zeros_like(one) for name, one in load_file(path).items()}, path, metadata={"format": "pt"})
    assert "good cheese" not in ask(copied)
