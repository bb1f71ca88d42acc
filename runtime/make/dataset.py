"""`fitune data make`: a dataset of questions and answers out of a spec, an endpoint and what was paid for before."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...planner.strategy import Value
from ...recipes.errors import DataError
from ...recipes.make_spec import MakeSpec, SpecFile
from ..rundir import write_whole
from .client import Answered, Client, read_key
from .journal import AnswerLine, Journal, LostLine, WroteLine, list_asked
from .limits import Ledger
from .prompts import Request, make_request
from .rows import Harvest, MadeRow, make_record, make_reference
from .sender import Ending, Sender, Status
from .sources import Passage, hash_passages, load_passages

USELESS_ANSWERS = 10
"""So many answers in a row without one new row end the run: what follows would cost and bring nothing either."""


class MakeReport(Value):
    """What `fitune data make` did.

    status, why, signal: as in `Ending`
    files:           what is written, by what it is: train, eval, sources, answers
    rows, held_out_rows: rows made in all, and those of them that are held out
    requests:        sent this time
    answers, lost, uncounted, prompt_tokens, answer_tokens, cost: as in `Ledger`, of earlier times too
    rejected_answers, rejected_rows: how many, by reason
    seconds:         of this time
    """

    status: Status
    why: str | None
    signal: int | None
    files: dict[str, str]
    rows: int
    held_out_rows: int
    requests: int
    answers: int
    lost: int
    uncounted: int
    prompt_tokens: int
    answer_tokens: int
    cost: float
    rejected_answers: dict[str, int]
    rejected_rows: dict[str, int]
    seconds: float


@dataclass(frozen=True, kw_only=True)
class OutputFiles:
    """The files of a spec: rows, held-out rows, where each row came from, and the journal of answers."""

    train: Path
    eval: Path
    sources: Path
    answers: Path


def find_files(spec_file: SpecFile) -> OutputFiles:
    """All beside output.file."""
    train = spec_file.resolve(spec_file.spec.output.file)
    beside = {name: train.with_suffix(f".{name}.jsonl") for name in ("eval", "sources", "answers")}
    return OutputFiles(train=train, **beside)


class MadeSoFar:
    """The rows and costs of all answers, and which request comes next: the `Work` of a Sender.

    `show_progress` gets a phrase after each change, `tell` what a user should know.
    """

    def __init__(
        self,
        spec: MakeSpec,
        passages: Sequence[Passage],
        journal: Journal,
        *,
        show_progress: Callable[[str], None],
        tell: Callable[[str], None],
    ) -> None:
        self.ledger, self.harvest = Ledger(spec), Harvest(spec)
        self.spec, self._passages, self._journal = spec, passages, journal
        self._show_progress, self.note = show_progress, tell
        self._next_index = 0
        self._begun = set[str]()
        self._useless = 0
        for line in journal.lines:
            self._replay(line)
        self._useless = 0

    def peek(self, coming: int) -> Request | None:
        """The next new request, None where the `coming` ones suffice if none of their rows is rejected."""
        wanted = self.spec.output.rows - len(self.harvest.rows)
        if coming * self.spec.generation.questions_per_request >= wanted:
            return None
        while True:
            request = make_request(self.spec, self._passages, self._next_index)
            if request.key not in self._begun:
                return request
            self._next_index += 1

    def pop(self) -> None:
        """The request that `peek` showed is being sent."""
        self._begun.add(make_request(self.spec, self._passages, self._next_index).key)

    def keep(self, request: Request, answer: Answered) -> str | None:
        """Write the answer down before anything else; a phrase where the last ones brought nothing."""
        line = AnswerLine(
            index=request.index,
            request=request.key,
            content=answer.content,
            finish_reason=answer.finish_reason,
            refusal=answer.refusal,
            prompt_tokens=answer.prompt_tokens,
            answer_tokens=answer.answer_tokens,
        )
        self._journal.append(line)
        self._count(request, line)
        if self._useless < USELESS_ANSWERS or len(self.harvest.rows) >= self.spec.output.rows:
            return None
        reasons = (self.harvest.rejected_answers + self.harvest.rejected_rows).most_common(2)
        said = "; ".join(f"{reason} ({count:,} times)" for reason, count in reasons)
        where = f"change the spec; the answers are in {self._journal.path}"
        return f"{USELESS_ANSWERS} answers in a row brought no new row: {said}: {where}"

    def lose(self, request: Request, why: str) -> None:
        """Write down that an answer which may be charged for never came."""
        self._journal.append(LostLine(index=request.index, request=request.key, why=why))
        self.ledger.count_lost(request)

    def show(self, under_way: int) -> None:
        """Rows, answers and cost so far."""
        cost = "" if self.spec.endpoint.price_output is None else f", cost {self.ledger.cost:.4f}"
        self._show_progress(
            f"{len(self.harvest.rows):,} of {self.spec.output.rows:,} rows, {self.ledger.answers:,} answers, "
            f"{self.harvest.rejected_rows.total():,} rows rejected, {under_way} requests under way{cost}"
        )

    def _replay(self, line: object) -> None:
        """Take what an earlier start paid for."""
        if not isinstance(line, AnswerLine | LostLine):
            return
        request = make_request(self.spec, self._passages, line.index)
        if request.key != line.request:
            raise DataError(f"{self._journal.path}: request {line.index} of it is not the spec's: name another file")
        self.ledger.requests += 1
        if isinstance(line, AnswerLine):
            self._begun.add(request.key)
            self._count(request, line)
        else:
            self.ledger.count_lost(request)

    def _count(self, request: Request, line: AnswerLine) -> None:
        self.ledger.count_answer(request, line.prompt_tokens, line.answer_tokens)
        self._useless = 0 if self.harvest.take(request, line) else self._useless + 1


def make_dataset(
    spec_file: SpecFile, *, show_progress: Callable[[str], None], tell: Callable[[str], None]
) -> MakeReport:
    """Go on where the last start ended, and write all rows; whatever ends it, no answer that came is lost."""
    started = time.monotonic()
    key, passages, files = read_key(spec_file), load_passages(spec_file), find_files(spec_file)
    with Journal(files.answers) as journal:
        for path in (files.train, files.eval, files.sources):
            journal.check_unchanged(path)
        journal.begin(list_asked(spec_file.spec, hash_passages(passages)))
        if journal.dropped:
            tell(f"{journal.path}: the last line was only half written, and was dropped")
        made = MadeSoFar(spec_file.spec, passages, journal, show_progress=show_progress, tell=tell)
        before = made.ledger.requests
        try:
            with Client(spec_file.spec.endpoint, key) as client:
                ending = Sender(spec_file.spec, client, made.ledger, made).run()
        finally:
            written = write_rows(journal, files, made.harvest.rows, spec_file.spec)
    return _make_report(made, ending, written, requests=made.ledger.requests - before, started=started)


def choose_held_out(rows: Sequence[MadeRow], share: float) -> frozenset[int]:
    """The places of the rows to hold out: at least one and never all, by the checksum of question and passage.

    Not by chance: a row that is held out stays so as rows are added, but where rows of a lower checksum come.
    """
    if share == 0 or len(rows) < 2:
        return frozenset()
    count = min(max(1, round(share * len(rows))), len(rows) - 1)

    def checksum(place: int) -> str:
        row = rows[place]
        return hashlib.sha256(f"{row.question}\0{row.passage.text}".encode()).hexdigest()

    return frozenset(sorted(range(len(rows)), key=checksum)[:count])


def write_rows(journal: Journal, files: OutputFiles, rows: Sequence[MadeRow], spec: MakeSpec) -> dict[str, Path]:
    """The rows, those held out, and where each came from, each file whole; nothing where there is no row."""
    if not rows:
        return {}
    held_out = choose_held_out(rows, spec.output.eval)
    parts = {"train": (files.train, [row for place, row in enumerate(rows) if place not in held_out])}
    if held_out:
        parts["eval"] = (files.eval, [row for place, row in enumerate(rows) if place in held_out])
    else:
        files.eval.unlink(missing_ok=True)  # of an earlier start: its rows are trained on now
    references = []
    for path, part in parts.values():
        _write_lines(journal, path, [make_record(row, spec.output) for row in part])
        references += [make_reference(row, path.name, number) for number, row in enumerate(part, start=1)]
    _write_lines(journal, files.sources, references)
    return {name: path for name, (path, _) in parts.items()} | {"sources": files.sources}


def _write_lines(journal: Journal, path: Path, records: Iterable[dict[str, Any]]) -> None:
    text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    journal.append(WroteLine(name=path.name, sha256=hashlib.sha256(text.encode()).hexdigest()))
    try:
        write_whole(path, text)
    except OSError as error:
        raise DataError(f"{path}: cannot be written: {error.strerror or error}") from error


def _make_report(
    made: MadeSoFar, ending: Ending, written: dict[str, Path], *, requests: int, started: float
) -> MakeReport:
    ledger, rows = made.ledger, made.harvest.rows
    return MakeReport(
        status=ending.status,
        why=ending.why,
        signal=ending.signal,
        files={name: str(path) for name, path in written.items()},
        rows=len(rows),
        held_out_rows=len(choose_held_out(rows, made.spec.output.eval)),
        requests=requests,
        answers=ledger.answers,
        lost=ledger.lost,
        uncounted=ledger.uncounted,
        prompt_tokens=ledger.prompt_tokens,
        answer_tokens=ledger.answer_tokens,
        cost=ledger.cost,
        rejected_answers=dict(made.harvest.rejected_answers),
        rejected_rows=dict(made.harvest.rejected_rows),
        seconds=time.monotonic() - started,
    )
