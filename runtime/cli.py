"""The commands: parse, call one function, print. Nothing here imports torch before a command needs it."""

from __future__ import annotations

import errno
import json
import os
import shlex
import sys
from importlib.metadata import version
from io import TextIOWrapper
from pathlib import Path

import click
from rich.text import Text

from ..recipes.errors import FituneError
from .cli_data import data
from .cli_plan import gpus, plan, validate
from .cli_shared import (
    EXIT_ERROR,
    EXIT_INTERRUPTED,
    EXIT_USAGE,
    SET_OPTION,
    check_written,
    console,
    print_error,
    problems,
    write_text,
)
from .quiet import quiet_bitsandbytes_import


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(version("fitune"), prog_name="fitune")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
@click.pass_context
def cli(context: click.Context, debug: bool) -> None:
    """Fine-tune language models from a TOML recipe, with a memory plan that is certain to fit."""
    context.obj = {"debug": debug}


@cli.command()
@click.argument("recipe", metavar="RECIPE|PLAN.json")
@SET_OPTION
@click.option("--resume", is_flag=True, help="Go on with the unfinished run, which must be there.")
@click.option("--replan", is_flag=True, help="Go on with it and another plan, at the same method and global batch.")
def run(recipe: str, overrides: tuple[str, ...], resume: bool, replan: bool) -> None:
    """Plan, train, and report how right the plan was.

    An unfinished run of the same recipe in output.dir goes on from its last checkpoint.
    """
    from .running import RunOptions, run_recipe

    sys.exit(run_recipe(recipe, overrides, console, RunOptions(resume=resume, replan=replan)))


@cli.command()
@click.argument("run_dir", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
@click.option(
    "--html",
    type=click.Path(dir_okay=False),
    callback=check_written,
    metavar="FILE.html",
    help="Write the losses, the memory over time and all figures as one HTML page.",
)
def report(run_dir: Path, as_json: bool, html: str | None) -> None:
    """Show a run's result: predicted against measured."""
    from .report import load_report, make_report_json
    from .report_view import render_report

    made, found = load_report(run_dir)
    if html is not None:
        from .report_page import render_report_page

        write_text(Path(html), render_report_page(made, found, run_dir))
    if as_json:
        click.echo(make_report_json(made, found))
    else:
        render_report(made, found, console)


@cli.command()
@click.argument("run_dirs", nargs=-1, type=click.Path(path_type=Path), metavar="[RUN_DIR...]")
@click.option("--measure", is_flag=True, help="Make some short runs on this machine's GPU, and learn from them.")
@click.option("--show", is_flag=True, help="Show what is known, of every device.")
def calibrate(run_dirs: tuple[Path, ...], measure: bool, show: bool) -> None:
    """Learn from finished runs how much memory this machine adds.

    Later plans for it use what was learnt.
    """
    from .machine.calibrating import calibrate_gpu, calibrate_runs, probe_stacks, render_calibration
    from .machine.calibration import load_calibration

    if not (run_dirs or measure or show):
        raise click.UsageError("give directories of finished runs, --measure or --show")
    refused = calibrate_runs(run_dirs)
    for error in refused:
        print_error(str(error))
    if measure:
        with console.status("measuring: three short runs"):
            failed = calibrate_gpu()
        for error in failed:
            print_error(str(error))
        refused += failed
    render_calibration(load_calibration(), console, here=probe_stacks())
    sys.exit(EXIT_ERROR if refused else 0)


@cli.command()
@click.argument("run_dir", type=click.Path(path_type=Path))
@click.option("--base", is_flag=True, help="The base model, without what was trained.")
@click.option("-q", "--question", help="Answer one question and end.")
def chat(run_dir: Path, base: bool, question: str | None) -> None:
    """Talk to the tuned model of a run."""
    from .report import load_report

    load_report(run_dir)  # what is wrong with the directory is said before libraries are loaded for seconds
    from .chat import run_chat

    run_chat(run_dir, console, use_base=base, question=question)


@cli.command()
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
def doctor(as_json: bool) -> None:
    """Check this machine, and say what to do about what is wrong.

    It looks at versions, CUDA, bitsandbytes, memory and disk.
    """
    from .machine.doctor import render_doctor, run_doctor

    found = run_doctor()
    if as_json:
        click.echo(found.model_dump_json())
    else:
        render_doctor(found, console)
    sys.exit(0 if found.healthy else EXIT_ERROR)


@cli.group(invoke_without_command=True)
@click.pass_context
def recipes(context: click.Context) -> None:
    """List the recipes that ship with fitune."""
    if context.invoked_subcommand is None:
        from ..recipes.shipped import list_shipped

        for one in list_shipped():
            console.print(Text.assemble((one.name, "bold"), f"  {one.description}"), soft_wrap=True)


@recipes.command("show")
@click.argument("name")
def show_recipe(name: str) -> None:
    """Print a shipped recipe."""
    from ..recipes.shipped import read_shipped

    click.echo(read_shipped(name), nl=False)


@cli.command()
@click.argument("path", default="recipe.toml", type=click.Path(path_type=Path))
@click.option("--model", help="The model: a folder, a catalog name or a hub id.")
@click.option("--data", "train", help="The training rows: a file or a hub id.")
@click.option("--eval", "held_out", help="The held-out rows: a file or a hub id.")
def init(path: Path, model: str | None, train: str | None, held_out: str | None) -> None:
    """Write a commented starter recipe to PATH (recipe.toml).

    An existing file is never overwritten.
    """
    from ..recipes.shipped import make_starter

    text = make_starter(model, train, held_out, path=path)
    if path.exists():
        raise FituneError(f"{path} {'is a folder' if path.is_dir() else 'exists already'}: name another file")
    write_text(path, text)
    command = shlex.join(["fitune", "plan", str(path)])
    console.print(Text.assemble(f"wrote {path}; next: ", (command, "bold")), soft_wrap=True)


for command in (plan, gpus, validate, data):
    cli.add_command(command)


@cli.command()
def schema() -> None:
    """Print the JSON schema of a recipe, for editors."""
    from ..recipes.schema import make_schema

    click.echo(json.dumps(make_schema(), indent=2))


@cli.command()
@click.argument("size")
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
def explain(size: str, as_json: bool) -> None:
    """Show the memory arithmetic for SIZE: 10B, 354.8M, gpt2-medium.

    SIZE is a number of parameters or a model of the catalog.
    """
    from ..planner.lecture.explain import make_explanation, render_explanation

    explanation = make_explanation(size)
    if as_json:
        click.echo(explanation.model_dump_json())
    else:
        render_explanation(explanation, console)


def _explain_unexpected(error: Exception) -> str:
    """An error that nothing else has explained: output into a file on a full disk, or a bug."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT) and error.filename is None:
        return f"the output cannot be written: {error.strerror}"
    return (
        f"this is a bug in fitune: {type(error).__name__}: {error}\n"
        "run the command again as `fitune --debug ...` and report what it prints"
    )


def main() -> None:
    """The `fitune` command: errors become one clear message here, and nowhere else."""
    # CUDA numbers mixed cards by speed, NVML by slot: both must mean the same card by 0.
    os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    # OpenMP's threads wait for each other by spinning, for milliseconds: beside other work on the same cores a step
    # took 16 s instead of 3. So many turns are what libgomp itself takes where it knows that cores are short.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    quiet_bitsandbytes_import()
    debug = "--debug" in sys.argv[1:]
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")  # a name or a bar that the terminal cannot show is no error
    try:
        cli(prog_name="fitune", standalone_mode=False)
    except click.exceptions.Abort as error:
        problems.print("interrupted")
        sys.exit(getattr(error.__context__, "exit_code", EXIT_INTERRUPTED))
    except click.ClickException as error:
        error.show()
        sys.exit(EXIT_USAGE)
    except FituneError as error:
        if debug:
            raise
        print_error(str(error))
        sys.exit(EXIT_ERROR)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(EXIT_ERROR)
    except Exception as error:
        if debug:
            raise
        print_error(_explain_unexpected(error))
        sys.exit(EXIT_ERROR)


if __name__ == "__main__":
    main()
