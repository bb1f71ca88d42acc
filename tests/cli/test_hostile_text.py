"""What recipes, datasets, models and endpoints say is shown, never obeyed by the terminal."""

from __future__ import annotations

import io
import json
import unicodedata
from collections.abc import Callable
from pathlib import Path

import pytest
from commands import RECIPE, Commands, write_rows
from hypothesis import given
from hypothesis import strategies as st
from rich.panel import Panel
from rich.table import Table
from rich.text import Text
from stub_endpoint import complete, fail, run_stub

from fitune.runtime.report import Loss, MeasuredMemory, RunReport, Sample, Speed
from fitune.runtime.shown import KEPT, ShownConsole, show_text

EVIL = "\x1b[31mred\x1b]0;title\x07 [bold]x[/bold] [/nonsense] \u202eesrever \x9b2J\r\x08"


def find_obeyed(text: str) -> set[str]:
    """Characters that a terminal would do something at."""
    return {one for one in text if one not in KEPT and unicodedata.category(one) in ("Cc", "Cf", "Cs")}


@given(st.text())
def test_no_text_is_obeyed_and_what_needs_no_escape_stays(text: str) -> None:
    shown = show_text(text)
    assert find_obeyed(shown) == set()
    assert show_text(shown) == shown
    assert shown == text or find_obeyed(text)


@given(text=st.text(alphabet=st.one_of(st.characters(), st.sampled_from(EVIL))), end=st.sampled_from(["", "\n"]))
def test_a_console_obeys_nothing_in_whatever_it_prints(text: str, end: str) -> None:
    file = io.StringIO()
    console = ShownConsole(file=file, width=60, highlight=False)
    console.print(text, end=end, markup=False, soft_wrap=True)
    table = Table("a")
    table.add_row(Text(text))
    console.print(Panel(table, title=Text(text)))
    assert find_obeyed(file.getvalue()) == set()


def test_colours_and_joined_characters_of_our_own_come_through() -> None:
    file = io.StringIO()
    console = ShownConsole(file=file, force_terminal=True, color_system="truecolor", width=60)
    console.print("[red]a[/red] می\u200cخواهم 👨\u200d👩")
    assert "\x1b[31ma\x1b[0m" in file.getvalue()
    assert "می\u200cخواهم 👨\u200d👩" in file.getvalue()


def write_report(folder: Path, plan: dict[str, object]) -> Path:
    """A run directory whose report says evil things."""
    run = folder / "run"
    run.mkdir()
    (run / "plan.json").write_text(json.dumps(plan))
    report = RunReport(
        recipe=EVIL,
        recipe_sha256="0",
        status="finished",
        started_unix_time=0,
        loss=Loss(before=1, after=1, first=1, last=1),
        sample=Sample(question=EVIL, before=EVIL, after=EVIL),
        measured=MeasuredMemory(
            peak_allocated_bytes=None,
            peak_reserved_bytes=None,
            peak_device_bytes=1,
            peak_host_bytes=1,
            disk_bytes=1,
            phases=(),
        ),
        speed=Speed(steps=1, tokens=1, train_seconds=1, total_seconds=1, tokens_per_second=1),
        events=({"kind": "x", "message": EVIL},),
        output={},
        versions={},
    )
    (run / "report.json").write_text(report.model_dump_json())
    return run


def test_a_report_is_shown_and_not_obeyed(fitune: Commands, workspace: Path) -> None:
    (plan,) = fitune("plan", "--quick", "--json", "recipe.toml").plans
    result = fitune("report", str(write_report(workspace, plan)))
    assert result.code == 0
    assert find_obeyed(result.out + result.err) == set()
    assert "\\x1b[31mred" in result.out and "[bold]x[/bold]" in result.out


Spoil = Callable[[Path], list[str]]


def in_the_recipes_name(folder: Path) -> list[str]:
    path = folder / f"{EVIL.replace('/', '')}.toml"
    path.write_text(RECIPE, encoding="utf-8")
    return [str(path)]


def in_the_datasets_name(folder: Path) -> list[str]:
    write_rows(folder / "\u202erows.jsonl")
    (folder / "recipe.toml").write_text(RECIPE.replace("rows.jsonl", "\u202erows.jsonl"), encoding="utf-8")
    return ["recipe.toml"]


def in_a_row(folder: Path) -> list[str]:
    write_rows(folder / "rows.jsonl", [{"instruction": EVIL, "output": EVIL, EVIL: 1}] * 3)
    return ["recipe.toml"]


def in_a_bad_row(folder: Path) -> list[str]:
    write_rows(folder / "rows.jsonl", [{EVIL: EVIL}])
    return ["recipe.toml"]


@pytest.mark.parametrize("command", ["plan", "validate", "gpus"])
@pytest.mark.parametrize("spoil", [in_the_recipes_name, in_the_datasets_name, in_a_row, in_a_bad_row])
def test_what_a_recipe_or_its_rows_say_is_not_obeyed(
    fitune: Commands, workspace: Path, command: str, spoil: Spoil
) -> None:
    words = [command, *(["--quick"] if command == "plan" else []), *spoil(workspace)]
    result = fitune(*words)
    assert result.code in (0, 1)
    assert find_obeyed(result.out + result.err) == set()


def test_what_an_endpoint_or_a_document_says_is_not_obeyed(fitune: Commands, workspace: Path) -> None:
    spec = fitune("data", "make", "--example").out.replace(
        '"what washed rinds', '"\\u001b[31m \\u202e what washed rinds'
    )
    replies = [complete(EVIL), fail(500, EVIL), fail(400, EVIL)]
    with run_stub(lambda number, body: replies[min(number, 2)]) as stub:
        Path("cheese.toml").write_text(spec.replace("http://localhost:8000/v1", stub.url), encoding="utf-8")
        results = [fitune("data", "make", "cheese.toml", *more) for more in (["--dry-run"], ["--concurrency", "1"])]
    assert [result.code for result in results] == [0, 1]
    assert find_obeyed("".join(result.out + result.err for result in results)) == set()
