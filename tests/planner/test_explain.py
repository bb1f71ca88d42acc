"""`fitune explain` as text and as JSON."""

from __future__ import annotations

import json
import subprocess
import sys
from io import StringIO

import pytest
from rich.console import Console

from fitune.planner.lecture.explain import Explanation, make_explanation, render_explanation


def render(size: str, *, width: int = 100) -> str:
    console = Console(width=width, file=StringIO())
    render_explanation(make_explanation(size), console)
    assert isinstance(console.file, StringIO)
    return console.file.getvalue()


@pytest.fixture(scope="module")
def text() -> str:
    return render("10B")


def find_line(text: str, start: str) -> list[str]:
    """The words of the only line that starts so, less the start."""
    lines = [line for line in text.splitlines() if line.startswith(start)]
    assert len(lines) == 1, f"{len(lines)} lines start with {start!r}"
    return lines[0].removeprefix(start).split()


def test_the_lectures_sum_comes_first(text: str) -> None:
    assert "20 + 20 + 80 = 120 GB" in "\n".join(text.splitlines()[:3])


def test_plain_adamw_stands_beside_it(text: str) -> None:
    assert find_line(text, "bf16, AdamW")[:5] == ["20.00", "20.00", "40.00", "80.00", "8.00"]


def test_the_architecture_behind_the_account_is_named(text: str) -> None:
    assert "falcon3-10b-base (10,305,653,760" in text


def test_lora_and_qlora_stand_beside_each_other(text: str) -> None:
    lora, qlora = make_explanation("10B").accounts
    shown = find_line(text, "together")
    assert shown == [f"{lora.fixed_bytes / 10**9:.2f}", f"{qlora.fixed_bytes / 10**9:.2f}"]


def test_what_is_off_in_the_rank_table_stands_beside_what_is_right(text: str) -> None:
    assert find_line(text, "512              86M") == ["117M", "270M", "is", "271M", "434M", "102.4M"]


def test_exact_counts_have_a_row_for_every_rank(text: str) -> None:
    assert "40.0M / 8.4M" in text
    assert "The catalog has no architecture of 180B" in " ".join(text.split())


def test_gpt2_is_shown_printed_and_exact(text: str) -> None:
    assert find_line(text, "gpt2-medium, all parameters") == ["354.92M", "354,823,168"]
    assert find_line(text, "gpt2-large, LoRA of rank 4") == ["0.77M", "737,280"]


def test_the_int8_values_stand_above_the_lectures(text: str) -> None:
    assert find_line(text, "int8  ") == ["19", "29", "46", "51", "70", "85", "98", "105", "115", "127"]
    assert find_line(text, "the lecture  ")[:5] == ["18", "29", "46", "51", "69"]


def test_the_matrix_goes_from_100_to_34_bytes(text: str) -> None:
    assert find_line(text, "int8 by rows, constants in int8")[:4] == ["34", "25", "+", "9"]


def test_all_16_levels_of_nf4_are_on_the_line_and_in_figures(text: str) -> None:
    line = next(line for line in text.splitlines() if line.startswith("┼"))
    assert line.count("┼") == 16
    assert "-0.69619" in text and "+0.72296" in text


def test_a_size_of_the_lecture_gets_no_column_of_its_own(text: str) -> None:
    assert find_line(text, "rank              7B") == ["13B", "70B", "180B", "10B"]
    assert find_line(render("13B"), "rank              7B") == ["13B", "70B", "180B"]


@pytest.mark.parametrize("size", ["10B", "gpt2-medium", "180B", "mixtral-8x7b", "deepseek-r1-distill-llama-8b", "999T"])
def test_100_columns_are_enough_for_every_word(size: str) -> None:
    rendered = render(size)
    assert "…" not in rendered
    assert max(map(len, rendered.splitlines())) <= 100


def test_a_narrow_terminal_gets_every_section_too() -> None:
    assert "The lecture's figures that are off" in render("10B", width=60)


def test_an_explanation_survives_json() -> None:
    explanation = make_explanation("10B")
    document = explanation.model_dump(mode="json")
    assert document["format_version"] == 1
    assert document["full"][0]["total_bytes"] == 120 * 10**9
    assert Explanation.model_validate_json(json.dumps(document)) == explanation


def test_an_explanation_needs_no_torch() -> None:
    code = (
        "import sys; from fitune.planner.lecture.explain import make_explanation as m; m('10B'); "
        "print('torch' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"
