"""Makes the parts of docs/ that come from the software: `python docs/generate.py recipe|accuracy|speed|images`.

recipe: docs/recipe.md from the recipe's schema, and the keys of docs/data_make.md from the schema of its spec.
speed: the tables of docs/speed.md and docs/images/speed.svg; takes four minutes.
accuracy: the tables of docs/accuracy.md and docs/images/accuracy.svg, from all measured rows; takes two minutes.
images: docs/images' other pictures, or those that are named, from real commands, recorded by rich. The run takes
        minutes, on an idle machine.
"""

from __future__ import annotations

import io
import os
import re
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from html import unescape
from pathlib import Path
from typing import Any

from rich.console import Console

from fitune.recipes import make_schema
from fitune.recipes.make_spec import MakeSpec
from fitune.recipes.schema import make_document_schema
from fitune.runtime.model.embedded import cache_folder

DOCS = Path(__file__).parent
RECIPES = DOCS.parent / "recipes"
WIDTH = 100


def make_recipe_reference() -> str:
    """docs/recipe.md: one table for each of the recipe's tables."""
    schema = make_schema()
    lines = [
        "# The recipe",
        "",
        "TOML; relative paths are relative to the recipe's folder. `fitune schema` prints the JSON schema, `fitune",
        'init` writes a commented recipe. `"auto"` is the planner\'s to decide. This page is made by',
        "`python docs/generate.py recipe`.",
    ]
    return "\n".join([*lines, *_make_tables(schema, "##")]) + "\n"


def make_spec_reference(page: str) -> str:
    """docs/data_make.md with the keys of the spec as its last section."""
    head = "## The spec\n"
    lines = [
        "TOML; relative paths are relative to the spec's folder.",
        *_make_tables(make_document_schema(MakeSpec), "###"),
    ]
    return page[: page.index(head)] + head + "\n" + "\n".join(lines) + "\n"


def _make_tables(schema: dict[str, Any], heading: str) -> list[str]:
    lines = list[str]()
    for name, node in schema["properties"].items():
        table = _follow(schema, node)
        lines += [
            "",
            f"{heading} [{name}]",
            "",
            table["description"],
            "",
            "| key | values | default | |",
            "|---|---|---|---|",
        ]
        for key, value in table["properties"].items():
            required = "required" if key in table.get("required", []) else ""
            default = _show(value["default"]) if "default" in value else required or "unset"
            meaning = " ".join(value.get("description", "").split())
            lines.append(f"| `{key}` | {_describe(schema, value)} | {default} | {meaning} |")
    return lines


def _follow(schema: dict[str, Any], node: dict[str, Any]) -> dict[str, Any]:
    if "$ref" in node:
        return dict(schema["$defs"][node["$ref"].rsplit("/", 1)[1]])
    return node


def _show(value: object) -> str:
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, list) and len(str(value)) > 60:
        return f"{len(value)} texts"
    return f'`"{value}"`' if isinstance(value, str) else f"`{value}`".replace("'", '"')


def _describe(schema: dict[str, Any], node: dict[str, Any]) -> str:
    node = _follow(schema, node)
    if "anyOf" in node:
        return " or ".join(dict.fromkeys(_describe(schema, one) for one in node["anyOf"]))
    if "enum" in node:
        return ", ".join(f"`{value}`" for value in node["enum"])
    if "const" in node:
        return f"`{node['const']}`"
    if node.get("type") == "array":
        return f"list of {_describe(schema, node['items'])}"
    if node.get("type") == "object":
        return "table {" + ", ".join(node["properties"]) + "}" if "properties" in node else "table"
    if "examples" in node:
        return "size such as " + ", ".join(f'`"{one}"`' for one in node["examples"])
    return {"string": "text", "integer": "whole number", "number": "number", "boolean": "`true`, `false`"}[node["type"]]


def make_images(names: Sequence[str]) -> None:
    """The pictures of the README that are named: real output of real commands, typed in a checkout."""
    os.chdir(RECIPES.parent)
    for name in names:
        PICTURES[name]()


def _draw_plan(name: str, recipe: str) -> None:
    from fitune.planner.show.plan import render_plan
    from fitune.runtime.planning import Job

    console = _record()
    render_plan(Job(recipe).make_plan(quick=False), console, next_command=f"fitune run {recipe}")
    _save(console, name, f"fitune plan {recipe}")


def _draw_explanation() -> None:
    from fitune.planner.lecture.explain import make_explanation, render_explanation

    console = _record()
    render_explanation(make_explanation("10B"), console)
    _save(console, "explain", "fitune explain 10B")


def _draw_doctor() -> None:
    from fitune.runtime.machine.doctor import render_doctor, run_doctor

    console = _record()
    render_doctor(run_doctor(), console)
    _save(console, "doctor", "fitune doctor")


def _draw_run() -> None:
    """The quick start, and its report."""
    from fitune.runtime.report import load_report
    from fitune.runtime.report_view import render_report
    from fitune.runtime.running import run_recipe

    with tempfile.TemporaryDirectory() as scratch:
        (Path(scratch) / "recipes").symlink_to(RECIPES)
        os.chdir(scratch)
        console = _record(132)  # the lines of a run's steps are longer than others
        run_recipe("recipes/quickstart.toml", [], console)
        _save(console, "run", "fitune run recipes/quickstart.toml")
        [run] = Path("runs").iterdir()
        console = _record()
        render_report(*load_report(run), console)
        _save(console, "report", f"fitune report {run}")
        os.chdir(RECIPES.parent)


PICTURES: dict[str, Callable[[], None]] = {
    "plan": partial(_draw_plan, "plan", "recipes/lecture-10b.toml"),
    "timeline": partial(_draw_plan, "timeline", "recipes/llama-3.1-8b-lora.toml"),
    "explain": _draw_explanation,
    "doctor": _draw_doctor,
    "run": _draw_run,
}


def make_speed() -> None:
    """docs/speed.md's tables and its plot: every measured step beside the time that is predicted for it."""
    from accuracy_page import fill_page
    from speed_page import make_speed_parts, make_speed_plot

    from fitune.runtime.rehearsal.accuracy_speed import load_timed_rows

    data, page = DOCS.parent / "tests" / "data", DOCS / "speed.md"
    architectures = data / "architectures.json"
    measured = [data / "h100_reference_step.jsonl", data / "h100_speed_levers.jsonl"]
    rows = load_timed_rows(architectures, measured, short=True)
    page.write_text(fill_page(page.read_text(encoding="utf-8"), make_speed_parts(rows)), encoding="utf-8")
    (DOCS / "images" / "speed.svg").write_text(make_speed_plot(rows), encoding="utf-8")


def make_accuracy() -> None:
    """docs/accuracy.md's tables and its plot: every measured row beside what is predicted for it."""
    from accuracy_page import fill_page, make_parts, make_plot

    from fitune.runtime.rehearsal.accuracy import load_comparisons

    data, page = DOCS.parent / "tests" / "data", DOCS / "accuracy.md"
    rows = load_comparisons(data / "h100_reference_step.jsonl", data / "architectures.json")
    page.write_text(fill_page(page.read_text(encoding="utf-8"), make_parts(rows)), encoding="utf-8")
    (DOCS / "images").mkdir(exist_ok=True)
    (DOCS / "images" / "accuracy.svg").write_text(make_plot(rows), encoding="utf-8")


def _record(width: int = WIDTH) -> Console:
    return Console(record=True, width=width, file=io.StringIO(), color_system="truecolor", highlight=False)


def _save(console: Console, name: str, title: str) -> None:
    (DOCS / "images").mkdir(exist_ok=True)
    # rich's template fetches its font from a network; the reader's own monospace font does as well.
    svg = re.sub(r"@font-face \{.*?\}\s*", "", console.export_svg(title=title, unique_id=name), flags=re.DOTALL)
    for folder, shown in ((cache_folder(), "~/.cache/fitune"), (Path.home(), "~")):
        svg = _rename(svg, str(folder), shown)
    (DOCS / "images" / f"{name}.svg").write_text(svg, encoding="utf-8")


def _rename(svg: str, folder: str, shown: str) -> str:
    """The picture with a folder of this machine shown in another way; rich stretches each text to a length."""

    def replace(found: re.Match[str]) -> str:
        text = found[3].replace(folder, shown)
        share = len(unescape(text)) / len(unescape(found[3]))
        return f'textLength="{float(found[1]) * share:.1f}"{found[2]}>{text}<'

    return re.sub(rf'textLength="([\d.]+)"([^>]*)>([^<]*{re.escape(folder)}[^<]*)<', replace, svg)


if __name__ == "__main__":
    what = sys.argv[1:]
    if what == ["recipe"]:
        (DOCS / "recipe.md").write_text(make_recipe_reference(), encoding="utf-8")
        page = DOCS / "data_make.md"
        page.write_text(make_spec_reference(page.read_text(encoding="utf-8")), encoding="utf-8")
    elif what == ["accuracy"]:
        make_accuracy()
    elif what == ["speed"]:
        make_speed()
    elif what[:1] == ["images"] and set(what[1:]) <= set(PICTURES):
        make_images(what[1:] or list(PICTURES))
    else:
        sys.exit("usage: python docs/generate.py recipe|accuracy|speed|images [plan|timeline|explain|doctor|run]...")
