"""What `fitune data make` shows: what would be sent, before anything is, and what came of it."""

from __future__ import annotations

import math
import shlex
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from rich.console import Console
from rich.text import Text

from ...planner.strategy import Value
from ...recipes.make_spec import MakeSpec, SpecFile
from ..shown import show_text
from .dataset import MadeSoFar, MakeReport, find_files
from .journal import Journal, list_asked
from .sources import hash_passages, load_passages

SHOWN_REQUESTS = 2


class DryRun(Value):
    """What would be sent; nothing has been.

    passages:          passages of the documents, or topics
    rows, wanted_rows: made by earlier starts, and asked for
    cost:              of earlier starts
    requests_needed:   requests for the rows that are missing, if none is rejected
    max_requests:      most requests that are sent this time
    max_prompt_tokens, max_answer_tokens: most of one request
    max_cost:          most that all requests together can cost, earlier ones included; None without prices
    requests:          the needed requests, as they would be posted
    """

    passages: int
    rows: int
    wanted_rows: int
    cost: float
    requests_needed: int
    max_requests: int
    max_prompt_tokens: int
    max_answer_tokens: int
    max_cost: float | None
    requests: tuple[dict[str, Any], ...]


def make_dry_run(spec_file: SpecFile) -> DryRun:
    """What `fitune data make` would send next; reads the documents and the journal, needs no key, writes nothing."""
    spec, passages, files = spec_file.spec, load_passages(spec_file), find_files(spec_file)
    journal = Journal(files.answers)
    if files.answers.exists():
        with journal:
            journal.begin(list_asked(spec, hash_passages(passages)))
    made = MadeSoFar(spec, passages, journal, show_progress=_ignore, tell=_ignore)
    missing = spec.output.rows - len(made.harvest.rows)
    needed = math.ceil(missing / spec.generation.questions_per_request)
    left = max(0, spec.max_requests - made.ledger.requests) if missing else 0
    requests, prompt_tokens, bound = list[dict[str, Any]](), 0, 0.0
    for number in range(left):
        request = made.peek(0)
        assert request is not None, "rows are missing"
        made.pop()
        prompt_tokens = max(prompt_tokens, request.max_prompt_tokens)
        bound = max(bound, made.ledger.bound(request))
        if number < needed:
            requests.append(request.body)
    most = made.ledger.cost + left * bound
    return DryRun(
        passages=len(passages),
        rows=len(made.harvest.rows),
        wanted_rows=spec.output.rows,
        cost=made.ledger.cost,
        requests_needed=needed,
        max_requests=left,
        max_prompt_tokens=prompt_tokens,
        max_answer_tokens=spec.generation.max_tokens,
        max_cost=None if spec.endpoint.price_output is None else min(most, spec.limits.max_cost or most),
        requests=tuple(requests),
    )


def render_dry_run(dry_run: DryRun, spec: MakeSpec, console: Console) -> None:
    """Requests, bounds of tokens and cost; no prompts."""
    what = "topics" if spec.source.documents is None else "passages"
    done = f", {dry_run.rows:,} are made already" if dry_run.rows else ""
    lines = [
        f"{dry_run.wanted_rows:,} rows from {dry_run.passages:,} {what}{done}",
        f"{spec.endpoint.model} at {spec.endpoint.base_url}",
    ]
    if dry_run.requests_needed:
        lines += [
            f"{dry_run.requests_needed:,} requests if no row is rejected (questions in each: "
            f"{spec.generation.questions_per_request}), at most {dry_run.max_requests:,}",
            f"one request: at most {dry_run.max_prompt_tokens:,} prompt tokens (one a byte; English takes about a "
            f"quarter) and {dry_run.max_answer_tokens:,} answer tokens",
        ]
    if dry_run.max_cost is not None:
        limit = f", limits.max_cost is {spec.limits.max_cost:g}" if spec.limits.max_cost is not None else ""
        lines.append(f"cost: at most {dry_run.max_cost:.4f}, {dry_run.cost:.4f} of it is spent{limit}")
    else:
        lines.append("cost: not counted, as the spec has no prices (endpoint.price_input and price_output)")
    for line in lines:
        console.print(Text(show_text(line)), soft_wrap=True)
    parts = urlsplit(spec.endpoint.base_url)
    if spec.endpoint.api_key_env is not None and parts.scheme == "http" and not _is_here(parts.hostname):
        console.print(
            Text.assemble(("note: ", "yellow"), f"the key goes to {parts.hostname} unencrypted (http://)"),
            soft_wrap=True,
        )


def render_prompts(dry_run: DryRun, console: Console) -> None:
    """The first requests' messages, as they would be sent."""
    for number, body in enumerate(dry_run.requests[:SHOWN_REQUESTS], start=1):
        for message in body["messages"]:
            console.print(Text(f"\n--- request {number}, {message['role']} ---", style="bright_black"))
            console.print(Text(show_text(message["content"])), soft_wrap=True)
    left = len(dry_run.requests) - SHOWN_REQUESTS
    if left > 0:
        console.print(Text(f"\n--- {left:,} more: --dry-run --json prints all of them ---", style="bright_black"))


def render_made(report: MakeReport, spec_file: SpecFile, console: Console) -> None:
    """What was made, what it took, what was rejected and why, and the next command."""
    spec = spec_file.spec
    style = "green" if report.status == "finished" else "yellow"
    console.print(
        Text.assemble((f"{report.rows:,} of {spec.output.rows:,} rows", style), _say_where(report)), soft_wrap=True
    )
    tokens = f"{report.prompt_tokens:,} prompt + {report.answer_tokens:,} answer tokens"
    cost = "" if spec.endpoint.price_output is None else f", cost {report.cost:.4f}"
    unknown = report.uncounted + report.lost
    counted = f" ({unknown:,} of unknown length at their bound)" if unknown and cost else ""
    sent = f"{report.requests:,} requests in {report.seconds:,.0f} s; in all {report.answers:,} answers"
    console.print(Text(f"{sent}, {tokens}{cost}{counted}"), soft_wrap=True)
    rejected = {"answer": report.rejected_answers, "row": report.rejected_rows}
    for what, reasons in rejected.items():
        for reason, count in sorted(reasons.items(), key=lambda item: -item[1]):
            plural = "s" if count != 1 else ""
            console.print(Text(show_text(f"rejected: {count:,} {what}{plural}: {reason}")), soft_wrap=True)
    for words in find_next_commands(report, spec_file):
        console.print(Text.assemble("next: ", (shlex.join(words), "bold")), soft_wrap=True)


def find_next_commands(report: MakeReport, spec_file: SpecFile) -> list[list[str]]:
    """What a user would type now: go on where rows are missing, make a recipe for what is there."""
    commands = []
    if report.status != "finished":
        commands.append(["fitune", "data", "make", str(spec_file.path)])
    if "train" in report.files:
        train = Path(report.files["train"])
        recipe = f"{train.stem}-recipe.toml"
        held_out = ["--eval", _shorten(report.files["eval"])] if "eval" in report.files else []
        init = ["fitune", "init", recipe, "--data", _shorten(report.files["train"]), *held_out]
        commands.append(["fitune", "run", recipe] if Path(recipe).exists() else init)
    return commands


def _say_where(report: MakeReport) -> str:
    if "train" not in report.files:
        return ": nothing is written"
    where = f" in {_shorten(report.files['train'])}"
    if "eval" in report.files:
        where += f", {report.held_out_rows:,} of them held out in {_shorten(report.files['eval'])}"
    return where


def _shorten(path: str) -> str:
    """Relative to the current folder where it is below it."""
    absolute, here = Path(path).absolute(), Path.cwd()
    return str(absolute.relative_to(here)) if absolute.is_relative_to(here) else path


def _is_here(host: str | None) -> bool:
    return host is not None and (host in ("localhost", "::1") or host.startswith("127."))


def _ignore(message: str) -> None:
    pass
