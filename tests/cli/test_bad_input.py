"""Wrong input: one clear message on stderr, exit code 1 (2 for usage), no traceback, nothing written."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from commands import RECIPE, TINY_LLAMA, Commands, Result, list_files, write_rows

from fitune.runtime.machine.devices import probe_gpus

Spoil = Callable[[Path], object]


def replace(old: str, new: str) -> Spoil:
    """Changes the recipe's text."""

    def spoil(folder: Path) -> None:
        assert old in RECIPE
        (folder / "recipe.toml").write_text(RECIPE.replace(old, new), encoding="utf-8")

    return spoil


def add(text: str) -> Spoil:
    return lambda folder: (folder / "recipe.toml").write_text(RECIPE + text, encoding="utf-8")


def write(name: str, content: bytes | dict[str, object]) -> Spoil:
    data = content if isinstance(content, bytes) else json.dumps(content).encode()
    return lambda folder: (folder / name).write_bytes(data)


def use_config(config: bytes | dict[str, object]) -> Spoil:
    def spoil(folder: Path) -> None:
        replace('"smollm2-135m-instruct"', '"config.json"')(folder)
        write("config.json", config)(folder)

    return spoil


MODEL = '"smollm2-135m-instruct"'
RECIPES: dict[str, tuple[Spoil, str]] = {
    "empty": (write("recipe.toml", b"  \n"), "recipe.toml: is empty"),
    "not TOML": (write("recipe.toml", b"[model\n"), "recipe.toml: is not valid TOML"),
    "not UTF-8": (write("recipe.toml", b"\xff\xfe\x00"), "recipe.toml: is not UTF-8 text: byte 0xff at offset 0"),
    "nested too deeply": (write("recipe.toml", b"x = " + b"[" * 10_000), "nested too deeply"),
    "huge": (write("recipe.toml", b"#" * (2**20 + 1)), "is larger than 1 MiB"),
    "unknown table": (add("[modle]\n"), "modle: is not a table of a recipe"),
    "unknown key": (add("ephocs = 2\n"), 'train.ephocs: is not a key of [train] (did you mean "epochs"?)'),
    "wrong choice": (add('[method]\nkind = "qlra"\n'), '"qlra" is not one of auto, full, lora, qlora (did you mean'),
    "wrong type": (add("[method]\nrank = 1.5\n"), "method.rank: 1.5 is not a whole number from 1"),
    "size without a unit": (replace('"3GiB"', '"3"'), 'budget.memory: "3" has no unit: write "3GiB" or "3GB"'),
    "number for a size": (replace('"3GiB"', "3"), "budget.memory: 3 is not a size with its unit"),
    "unknown unit": (replace('"3GiB"', '"3 GiX"'), 'the unit "GiX" is not one of B, KB'),
    "nothing of a size": (replace('"3GiB"', '"0GiB"'), '"0GiB" is less than one byte'),
    "epochs and max_steps": (add("epochs = 1\nmax_steps = 2\n"), "train.epochs: excludes train.max_steps"),
    "micro-batch": (add("micro_batch_size = 3\n"), "3 does not divide train.global_batch_size = 4"),
    "infinite": (add("learning_rate = inf\n"), "train.learning_rate: inf is not"),
    "no model": (replace(f"id = {MODEL}", ""), "model.id: is required and missing"),
    "adapter and full": (add('[method]\nkind = "full"\nadapter = "a"\n'), "an adapter cannot be continued with"),
    "no such model": (
        replace(MODEL, '"lama-3.1-8b"'),
        "not in fitune's catalog and not a hub id (owner/name); did you",
    ),
    "no such folder": (replace(MODEL, '"./lost"'), "model.id: ./lost: there is no such folder or config.json"),
    "folder without config": (replace(MODEL, '"."'), "no such file; a model's folder has a config.json"),
    "config not JSON": (use_config(b"{"), "config.json: not a readable JSON file"),
    "config without type": (use_config({"hidden_size": 1}), 'not a model\'s config.json: it has no "model_type"'),
    "config is a list": (use_config(b"[1]"), "not a model's config.json"),
    "unsupported": (use_config({"model_type": "bert"}), "bert"),
    "impossible shape": (use_config(TINY_LLAMA | {"num_attention_heads": 0}), "num_attention_heads"),
    "text for a number": (use_config(TINY_LLAMA | {"hidden_size": "wide"}), "hidden_size"),
    "quantised for inference": (
        use_config(TINY_LLAMA | {"quantization_config": {"quant_method": "gptq", "bits": 4}}),
        "gptq",
    ),
    "no such target": (add('[method]\nkind = "lora"\ntargets = ["q_prj"]\n'), 'did you mean "q_proj"?'),
    "no such card": (replace("[budget]", '[budget]\ngpu = "RTX 4091"'), 'budget.gpu: "RTX 4091" is not in the GPU'),
    "a number for text": (replace(MODEL, MODEL + "\nrevision = 1"), "model.revision: 1 is not text"),
}
DEVICES: dict[str, tuple[Spoil, str]] = {
    "more GPUs than there are": (replace("[budget]", "[budget]\ngpus = 64"), "budget.gpus: 64 asked for, "),
    "fp16 on a CPU": (
        replace(MODEL, MODEL + '\ndtype = "fp16"'),
        'model.dtype: "fp16" is for GPUs without bf16; on a CPU use "bf16" or "fp32"',
    ),
    "no FlashAttention on a CPU": (
        replace(MODEL, MODEL + '\nattention = "flash_attention_2"'),
        'model.attention: "flash_attention_2" needs a GPU',
    ),
    "beyond learned positions": (
        replace(f"{MODEL}\n[data]", '"gpt2-medium"\n[data]\nsystem = "x"'),
        "data.max_length: 1025 is more than the 1024 learned positions of this model",
    ),
}


def check_refusal(result: Result, words: str, code: int = 1) -> None:
    assert result.code == code, result
    assert words in result.err
    assert result.out == ""
    assert result.err.startswith("error: " if code == 1 else "Usage: ")
    assert "Traceback" not in result.err
    assert "bug in fitune" not in result.err
    assert len(result.err) < 1500


@pytest.mark.parametrize(("spoil", "words"), RECIPES.values(), ids=RECIPES)
@pytest.mark.parametrize("command", ["plan", "validate", "run"])
def test_a_wrong_recipe_is_one_clear_message(
    fitune: Commands, workspace: Path, command: str, spoil: Spoil, words: str
) -> None:
    spoil(workspace)
    before = list_files(workspace)
    check_refusal(fitune(command, "recipe.toml"), words)
    assert list_files(workspace) == before


@pytest.mark.skipif(bool(probe_gpus().visible), reason="this machine has a GPU")
@pytest.mark.parametrize(("spoil", "words"), DEVICES.values(), ids=DEVICES)
@pytest.mark.parametrize("command", ["plan", "run"])
def test_what_the_device_cannot_do_is_said_before_anything_is_fetched(
    fitune: Commands, workspace: Path, command: str, spoil: Spoil, words: str
) -> None:
    spoil(workspace)
    before = list_files(workspace)
    longer = ["--set", "data.max_length=1025"]
    check_refusal(fitune(command, "recipe.toml", *longer), words)
    assert list_files(workspace) == before


ROWS: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "rows.jsonl"),
    "not JSON": (b'{"prompt": "a", "completion": "b"}\n{"prompt": \n', "rows.jsonl:2"),
    "a list": (b"[1, 2]\n", "rows.jsonl:1"),
    "other columns": (b'{"title": "a", "body": "b"}\n', "rows.jsonl:1"),
    "a missing column": (b'{"prompt": "a", "completion": "b"}\n{"prompt": "a"}\n', "rows.jsonl:2"),
    "a number for text": (b'{"prompt": 1, "completion": "b"}\n', "rows.jsonl:1"),
    "not UTF-8": (b'{"prompt": "\xff", "completion": "b"}\n', "rows.jsonl"),
}


@pytest.mark.parametrize(("content", "words"), ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("command", ["plan", "validate"])
def test_wrong_rows_are_named_by_file_and_line(
    fitune: Commands, workspace: Path, command: str, content: bytes, words: str
) -> None:
    (workspace / "rows.jsonl").write_bytes(content)
    check_refusal(fitune(command, "recipe.toml"), words)


@pytest.mark.parametrize("command", ["validate", "run"])
def test_missing_rows_stop_everything_but_a_plan(fitune: Commands, workspace: Path, command: str) -> None:
    (workspace / "rows.jsonl").unlink()
    before = list_files(workspace)
    check_refusal(fitune(command, "recipe.toml"), "rows.jsonl: no such file")
    assert list_files(workspace) == before
    assert fitune("plan", "recipe.toml").code == 0


def test_all_problems_of_a_recipe_are_said_at_once(fitune: Commands, workspace: Path) -> None:
    add('rank = 4\n[method]\nkind = "qlra"\nrank = 0\n[output]\nmerge = "yes"\n')(workspace)
    result = fitune("plan", "recipe.toml")
    for key in ("train.rank", "method.kind", "method.rank", "output.merge"):
        assert f"recipe.toml: {key}: " in result.err
    assert len(result.err.splitlines()) == 4


COMMANDS: dict[str, tuple[list[str], str]] = {
    "no such recipe": (["plan", "quikstart"], 'did you mean the shipped recipe "quickstart"?'),
    "a folder as recipe": (["plan", "."], "is a folder"),
    "--set without a value": (["plan", "recipe.toml", "--set", "train.max_steps"], "not of the form table.key=value"),
    "--set of an unknown key": (["plan", "recipe.toml", "--set", "train.max_step=1"], 'did you mean "max_steps"?'),
    "--set of a wrong value": (
        ["plan", "recipe.toml", "--set", "train.max_steps=0"],
        "--set train.max_steps: 0 is not",
    ),
    "an output that cannot be written": (
        ["plan", "recipe.toml", "-o", "no/plan.json"],
        "no/plan.json: cannot be written: there is no folder no",
    ),
    "run of a lost plan": (["run", "lost.json"], "lost.json: cannot be read: No such file or directory"),
    "run of a recipe that is not there": (["run", "lost.toml"], "lost.toml: no such recipe"),
    "report of what is no run": (["report", "."], "no report.json"),
    "report of nothing": (["report", "lost"], "lost: there is no such run directory"),
    "report of a file": (["report", "recipe.toml"], "recipe.toml: a file, not a run directory"),
    "chat with what is no run": (["chat", "."], "no report.json"),
    "chat with a file": (["chat", "recipe.toml"], "recipe.toml: a file, not a run directory"),
    "chat with nothing": (["chat", "lost"], "lost: there is no such run directory"),
    "explain nonsense": (["explain", "nonsense"], '"nonsense" is not a count such as "10B"'),
    "explain nothing at all": (["explain", ""], '"" is not a count'),
    "explain no parameters": (["explain", "0B"], "is not a whole number of at least 1"),
    "init over a file": (["init", "recipe.toml"], "recipe.toml exists already"),
    "init over a folder": (["init", "."], ". is a folder: name another file"),
    "--set of an unknown table": (["plan", "recipe.toml", "--set", "metod.kind=lora"], "--set metod: is not a table"),
    "init in a lost folder": (["init", "no/recipe.toml"], "no/recipe.toml: cannot be written"),
    "init without a model": (["init", "new.toml", "--model", ""], "model.id"),
    "show of no recipe": (["recipes", "show", "lost"], "lost: no such recipe"),
}


@pytest.mark.parametrize(("words", "message"), COMMANDS.values(), ids=COMMANDS)
def test_a_wrong_argument_is_one_clear_message(
    fitune: Commands, workspace: Path, words: list[str], message: str
) -> None:
    before = list_files(workspace)
    check_refusal(fitune(*words), message)
    assert list_files(workspace) == before


@pytest.mark.parametrize(
    "words",
    [
        ["plan"],
        ["plna"],
        ["plan", "--no-such-option"],
        ["plan", "recipe.toml", "recipe.toml", "-o", "x.json"],
        ["plan", "recipe.toml", "-o", "recipe.toml"],
        ["plan", "recipe.toml", "--html", "recipe.toml"],
        ["plan", "recipe.toml", "-o", "plan"],
        ["run"],
        ["run", "a.toml", "b.toml"],
        ["report"],
        ["chat", ".", "extra"],
        ["explain"],
        ["init", "a", "b"],
        ["recipes", "lost"],
    ],
    ids=" ".join,
)
def test_wrong_usage_says_how_it_is_used(fitune: Commands, workspace: Path, words: list[str]) -> None:
    before = list_files(workspace)
    check_refusal(fitune(*words), "--help", code=2)
    assert list_files(workspace) == before


@pytest.mark.parametrize("words", [["validate", "lost.toml"], ["plan", "lost.toml"], ["report", "lost"]], ids=" ".join)
def test_debug_shows_the_traceback(fitune: Commands, workspace: Path, words: list[str]) -> None:
    plain, debugged = fitune.apart(*words), fitune.apart("--debug", *words)
    assert (plain.code, debugged.code) == (1, 1)
    assert "Traceback" not in plain.err
    assert "Traceback (most recent call last)" in debugged.err
    assert plain.err.removeprefix("error: ").splitlines()[0] in debugged.err


def test_square_brackets_in_a_message_are_no_markup(fitune: Commands, workspace: Path) -> None:
    assert "[bold red]lost[/].toml: no such recipe" in fitune("plan", "[bold red]lost[/].toml").err
    assert fitune("report", "[link=x]lost").err == "error: [link=x]lost: there is no such run directory\n"


def test_a_long_message_is_not_broken_into_lines(fitune: Commands, workspace: Path) -> None:
    name = "folder/" * 30 + "recipe.toml"
    assert len(fitune("plan", name).err.splitlines()) == 1


@pytest.mark.parametrize("words", [["plan", "--quick", "recipe.toml"], ["recipes"], ["schema"], ["explain", "10B"]])
def test_a_reader_that_goes_away_is_no_error_message(workspace: Path, words: list[str]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "fitune.runtime.cli", *words]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=120, check=False)
    os.close(writer)
    assert done.stderr == ""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("words", [["recipes"], ["plan", "--quick", "--json", "recipe.toml"]], ids=" ".join)
def test_output_into_a_file_on_a_full_disk_is_no_bug(workspace: Path, words: list[str]) -> None:
    command = [sys.executable, "-m", "fitune.runtime.cli", *words]
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=120, check=False)
    assert (done.returncode, done.stderr) == (1, "error: the output cannot be written: No space left on device\n")


def test_ctrl_c_while_the_program_is_loaded_leaves_no_traceback(workspace: Path) -> None:
    """The signal comes with the first of fitune's own modules, before any command could handle it."""
    script = (
        "import os, signal, sys\n"
        "from importlib.abc import MetaPathFinder\n"
        "class Interrupt(MetaPathFinder):\n"
        "    def find_spec(self, name, path, target=None):\n"
        "        if name == 'fitune.runtime.cli':\n"
        "            os.kill(os.getpid(), signal.SIGINT)\n"
        "from fitune.runtime.__main__ import main\n"
        "sys.meta_path.insert(0, Interrupt())\n"
        "main()\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, "", "")


def test_a_cache_that_is_a_file_costs_a_plan_nothing(
    fitune: Commands, workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FITUNE_CACHE", str(workspace / "rows.jsonl"))
    result = fitune("plan", "--quick", "recipe.toml")
    assert (result.code, result.err) == (0, "")


def test_a_run_directory_that_is_not_there_offers_the_last_one(fitune: Commands, workspace: Path) -> None:
    for name in ("runs/recipe-20261123-101530", "elsewhere"):
        Path(name).mkdir(parents=True)
        Path(name, "report.json").write_text("{}", encoding="utf-8")
    assert fitune("report", "runs/recipe-2026112-101530").err.endswith("(did you mean runs/recipe-20261123-101530?)\n")
    assert fitune("report", "lost").err.endswith("(did you mean runs/recipe-20261123-101530?)\n")


def test_a_report_of_another_version_says_which_file_and_what(fitune: Commands, workspace: Path) -> None:
    assert fitune("plan", "--quick", "recipe.toml", "-o", "plan.json").code == 0
    Path("report.json").write_text('{"format_version": 1}', encoding="utf-8")
    check_refusal(fitune("report", "."), "report.json: not a report of this version of fitune: recipe: Field required")
    Path("plan.json").write_text('{"format_version": 7}', encoding="utf-8")
    check_refusal(fitune("report", "."), "plan.json: not a plan of this version of fitune: ")


def test_a_terminal_that_cannot_show_a_name_is_no_error(fitune: Commands, workspace: Path) -> None:
    Path("τυρί.toml").write_text(RECIPE, encoding="utf-8")
    result = fitune.apart("plan", "--quick", "τυρί.toml", env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert (result.code, result.err) == (0, "")
    assert "fits: " in result.out


@pytest.mark.parametrize("words", [["plan", "--quick", "--json"], ["validate"]], ids=" ".join)
def test_a_name_that_json_cannot_hold_is_refused(fitune: Commands, workspace: Path, words: list[str]) -> None:
    name = os.fsdecode(b"\xff.toml")
    Path(name).write_text(RECIPE, encoding="utf-8")
    result = fitune(*words, name)
    assert result.code == 1
    message = result.plans[0]["error"] if "--json" in words else result.err
    assert "'\\udcff.toml': the name is not UTF-8 text" in message


def test_one_wrong_recipe_leaves_the_others_their_plans(fitune: Commands, workspace: Path) -> None:
    result = fitune("plan", "--quick", "lost.toml", "recipe.toml")
    assert result.code == 1
    assert "Plan for recipe.toml" in result.out
    assert "lost.toml: no such recipe" in result.err


def test_one_wrong_recipe_leaves_the_others_their_validation(fitune: Commands, workspace: Path) -> None:
    write_rows(workspace / "other.jsonl")
    Path("second.toml").write_text(RECIPE.replace("rows.jsonl", "other.jsonl"), encoding="utf-8")
    result = fitune("validate", "recipe.toml", "lost.toml", "second.toml")
    assert result.code == 1
    assert result.out.splitlines() == [
        f"ok {name}: smollm2-135m-instruct (embedded), 8 rows to train on (completion), 0 held out"
        for name in ("recipe.toml", "second.toml")
    ]
