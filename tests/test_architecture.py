"""What docs/architecture.md and design.md promise about the code itself."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fitune.runtime.cli import cli

ROOT = Path(__file__).parents[1]
ROOMS = ("recipes", "planner", "runtime")
MODULES = [path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))]
EVERY_MODULE = pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
HEAVY = {"torch", "transformers", "peft", "bitsandbytes", "accelerate", "datasets", "safetensors", "tokenizers"}
MOST_LINES = 400


def find_imports(path: Path, *, top_only: bool = False) -> set[str]:
    """Absolute names of everything a module imports: `fitune.planner.plan`, `torch`; types alone do not count."""
    package = ["fitune", *path.relative_to(ROOT).with_suffix("").parts[:-1]]
    tree = ast.parse(path.read_text(encoding="utf-8"))
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    nodes = tree.body if top_only else ast.walk(tree)
    found = set()
    for node in nodes:
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) + 1 - node.level] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            found |= {base} if node.module else {f"{base}.{alias.name}" for alias in node.names}
    return found


@EVERY_MODULE
def test_arrows_point_one_way(path: Path) -> None:
    room = ROOMS.index(path.relative_to(ROOT).parts[0])
    later = tuple(f"fitune.{name}" for name in ROOMS[room + 1 :])
    assert {name for name in find_imports(path) if name.startswith(later)} == set()


@EVERY_MODULE
def test_rooms_import_each_other_relatively(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    modules = [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and not node.level]
    assert not any(module.split(".")[0] in ("fitune", *ROOMS) for module in modules)


@EVERY_MODULE
def test_only_the_runtime_knows_torch(path: Path) -> None:
    heavy = {name for name in find_imports(path) if name.split(".")[0] in HEAVY}
    assert path.is_relative_to(ROOT / "runtime") or heavy == set()


@EVERY_MODULE
def test_a_module_stays_short_and_says_what_it_is(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= MOST_LINES
    assert ast.get_docstring(ast.parse(text))


@EVERY_MODULE
def test_there_is_nothing_left_to_do_in_comments(path: Path) -> None:
    assert not re.search(r"\b(TODO|FIXME|XXX|HACK)\b", path.read_text(encoding="utf-8"))


LIGHT = {
    "plan": ["plan", "--quick", "quickstart"],
    "plan as JSON": ["plan", "--quick", "--json", "quickstart", "llama-3.1-8b-qlora"],
    "sweep": ["plan", "--quick", "quickstart", "--sweep", "train.seed=1,2"],
    "what fits": ["plan", "--quick", "quickstart", "--what-fits"],
    "gpus": ["gpus", "--quick", "quickstart"],
    "validate": ["validate", "quickstart"],
    "explain": ["explain", "10B"],
    "schema": ["schema"],
    "recipes": ["recipes"],
    "show": ["recipes", "show", "quickstart"],
    "init": ["init", "new.toml"],
    "example of data make": ["data", "make", "--example"],
    "data make": ["data", "make", "no-such-spec.toml", "--dry-run"],
    "help": ["--help"],
    "help of run": ["run", "--help"],
    "version": ["--version"],
    "an error": ["plan", "no-such-recipe"],
}


@pytest.mark.parametrize("words", LIGHT.values(), ids=LIGHT)
def test_a_light_command_never_imports_torch(words: list[str], tmp_path: Path) -> None:
    code = (
        "import sys; from fitune.runtime.cli import main; sys.argv = ['fitune', *sys.argv[1:]]\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        f"print('HEAVY', sorted({HEAVY!r} & set(sys.modules)))"
    )
    command = [sys.executable, "-c", code, *words]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=True)
    assert done.stdout.splitlines()[-1] == "HEAVY []", done.stderr


@pytest.mark.parametrize(
    ("given", "spins"), [({}, "1000"), ({"OMP_WAIT_POLICY": "active"}, None), ({"GOMP_SPINCOUNT": "7"}, "7")]
)
def test_threads_that_wait_for_each_other_soon_sleep_unless_the_user_says_otherwise(
    given: dict[str, str], spins: str | None
) -> None:
    code = "import os, sys; from fitune.runtime import cli\ntry: cli.main()\nexcept SystemExit: pass\n"
    code += "print(os.environ.get('GOMP_SPINCOUNT'))"
    kept = {name: value for name, value in os.environ.items() if name not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    command = [sys.executable, "-c", code, "--version"]
    done = subprocess.run(command, env=kept | given, capture_output=True, text=True, timeout=300, check=True)
    assert done.stdout.splitlines()[-1] == str(spins)


def test_every_command_is_documented() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    undocumented = [name for name in cli.commands if f"fitune {name}" not in readme]
    assert undocumented == []


def test_every_module_on_the_map_exists() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`((?:recipes|planner|runtime)/\w+\.py)`", text))
    assert len(named) > 30
    assert named - {str(path.relative_to(ROOT)) for path in MODULES} == set()
