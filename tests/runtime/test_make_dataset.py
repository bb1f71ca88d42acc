"""`fitune data make` against a real server: rows, limits, failures, and going on after an interruption."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from stub_endpoint import Reply, answer_well, complete, fail, make_pairs, run_stub

from fitune.recipes.errors import DataError
from fitune.recipes.make_spec import MakeSpec, SpecFile
from fitune.runtime.data.sources import load_rows_from
from fitune.runtime.make import limits as make_limits
from fitune.runtime.make.dataset import MakeReport, make_dataset
from fitune.runtime.make.render import make_dry_run

PRICES = {"price_input": 10.0, "price_output": 20.0}


@pytest.fixture(autouse=True)
def without_long_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Backoff of a twentieth of its length; no proxy between the test and its server."""
    choose = make_limits.choose_wait
    monkeypatch.setattr("fitune.runtime.make.sender.choose_wait", lambda *given: choose(*given) / 20)
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


def make_spec_file(folder: Path, url: str, **tables: dict[str, Any]) -> SpecFile:
    whole: dict[str, dict[str, Any]] = {
        "source": {"topics": ["feta", "brie", "gouda"]},
        "persona": {"name": "Pavlos", "description": "You are Pavlos.", "style": "Short."},
        "output": {"file": "out.jsonl", "rows": 24},
        "endpoint": {"base_url": url, "model": "m", "timeout_seconds": 5.0},
        "limits": {"concurrency": 3},
    }
    spec = {key: {**whole.get(key, {}), **tables.get(key, {})} for key in {**whole, **tables}}
    return SpecFile(path=folder / "spec.toml", spec=MakeSpec.model_validate(spec))


def make(spec_file: SpecFile, notes: list[str] | None = None) -> MakeReport:
    tell = [].append if notes is None else notes.append
    return make_dataset(spec_file, show_progress=lambda text: None, tell=tell)


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_all_rows_are_made_held_out_and_referenced(tmp_path: Path) -> None:
    with run_stub() as stub:
        report = make(make_spec_file(tmp_path, stub.url, output={"eval": 0.25}))
    train, held_out, sources = (read(tmp_path / f"out{kind}.jsonl") for kind in ("", ".eval", ".sources"))
    assert (report.status, report.rows, report.held_out_rows, report.requests) == ("finished", 24, 6, 6)
    assert (len(train), len(held_out)) == (18, 6)
    assert len({row["instruction"] for row in train + held_out}) == 24
    assert [(one["file"], one["line"]) for one in sources] == [
        *(("out.jsonl", number) for number in range(1, 19)),
        *(("out.eval.jsonl", number) for number in range(1, 7)),
    ]
    assert {one["topic"] for one in sources} == {"feta", "brie", "gouda"}
    assert len(load_rows_from(tmp_path / "out.jsonl")) == 18


def test_a_request_says_who_answers_about_what_and_how(tmp_path: Path) -> None:
    spec_file = make_spec_file(
        tmp_path,
        "http://localhost/v1",
        generation={"temperature": 0.5, "seed": 7, "extra": {"reasoning_effort": "low"}, "instructions": "Be brave."},
        persona={"language": "Greek"},
    )
    first, second, *_ = make_dry_run(spec_file).requests
    system, user = (message["content"] for message in first["messages"])
    assert "You are Pavlos." in system
    assert "Short." in system
    assert "Greek" in system
    assert "Topic: feta" in user
    assert "Be brave." in user
    assert "exactly 4 pairs" in user
    assert (first["model"], first["temperature"], first["max_tokens"]) == ("m", 0.5, 2048)
    assert (first["seed"], second["seed"]) == (7, 8)
    assert first["reasoning_effort"] == "low"
    assert first["response_format"]["json_schema"]["schema"]["required"] == ["pairs"]


def test_each_pass_over_the_sources_asks_something_else(tmp_path: Path) -> None:
    requests = make_dry_run(make_spec_file(tmp_path, "http://localhost/v1", output={"rows": 200})).requests
    prompts = [request["messages"][1]["content"] for request in requests]
    assert len(prompts) == 50
    assert len(set(prompts)) == 50


def test_documents_are_quoted_and_rows_know_their_characters(tmp_path: Path) -> None:
    text = "Feta is white. " * 40
    (tmp_path / "feta.md").write_text(text)
    source = {"documents": "*.md", "topics": None, "chunk_characters": 300}
    with run_stub() as stub:
        make(make_spec_file(tmp_path, stub.url, source=source, output={"rows": 8, "include_passage": True}))
    rows, sources = read(tmp_path / "out.jsonl"), read(tmp_path / "out.sources.jsonl")
    for row, place in zip(rows, sources, strict=True):
        assert place["document"] == "feta.md"
        assert row["context"] == text[place["start"] : place["end"]]
    assert all("<passage>\nFeta is white." in one.body["messages"][1]["content"] for one in stub.received)


def test_requests_go_out_at_once_up_to_the_limit_and_no_more_than_are_needed(tmp_path: Path) -> None:
    with run_stub(lambda number, body: Reply(**{**vars(answer_well(number, body)), "delay_seconds": 0.1})) as stub:
        make(make_spec_file(tmp_path, stub.url, output={"rows": 40}))
    assert stub.most_at_once == 3
    assert len(stub.received) == 10


def test_what_fails_is_tried_again_until_all_rows_are_there(tmp_path: Path) -> None:
    bad = {
        1: fail(429, Retry_After="1"),
        2: fail(500),
        3: Reply(hang_up=True),
        4: Reply(body=b"<html>"),
        6: fail(503),
    }
    notes = list[str]()
    with run_stub(lambda number, body: bad.get(number) or answer_well(number, body)) as stub:
        report = make(make_spec_file(tmp_path, stub.url, endpoint=PRICES), notes)
    assert (report.status, report.rows, report.answers, report.lost) == ("finished", 24, 6, 2)
    assert report.requests == len(stub.received) == 11
    reasons = r"HTTP (429|500|503): try later|the connection broke: .+|HTTP 200 without a chat completion: <html>"
    told = [note for note in notes if "trying again" in note]
    assert told, "the first to come back of those that fail at the same time"
    assert all(re.fullmatch(rf"({reasons}): trying again in [0-9.]+ s", note) for note in told)


def test_retry_after_holds_for_all_requests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fitune.runtime.make.sender.choose_wait", make_limits.choose_wait)
    with run_stub(lambda number, body: fail(429, Retry_After="1") if number < 3 else answer_well(number, body)) as stub:
        make(make_spec_file(tmp_path, stub.url))
    first, later = stub.received[2].at, stub.received[3].at
    assert later - first >= 0.9


def test_an_endpoint_that_never_answers_ends_the_run_with_its_last_word(tmp_path: Path) -> None:
    with run_stub(lambda number, body: fail(503, "overloaded")) as stub:
        report = make(make_spec_file(tmp_path, stub.url, output={"rows": 400}))
    assert (report.status, report.rows, report.files) == ("failed", 0, {})
    assert report.why == "6 attempts failed, the last one: HTTP 503: overloaded"
    assert len(stub.received) <= 3 + 6, "one at a time after the first failure"
    assert list(tmp_path.iterdir()) == []


def test_an_endpoint_that_asks_to_wait_for_long_is_not_waited_for(tmp_path: Path) -> None:
    with run_stub(lambda number, body: fail(429, "daily limit", Retry_After="7200")) as stub:
        report = make(make_spec_file(tmp_path, stub.url))
    assert report.status == "failed"
    assert "the endpoint asks to wait 7,200 s" in str(report.why)


def test_answers_that_bring_nothing_end_the_run_before_all_is_spent(tmp_path: Path) -> None:
    same = json.dumps({"pairs": make_pairs({})})
    with run_stub(lambda number, body: complete(same)) as stub:
        report = make(make_spec_file(tmp_path, stub.url, output={"rows": 1000}))
    assert (report.status, report.rows) == ("failed", 4)
    assert "the question is like an earlier one" in str(report.why)
    assert len(stub.received) <= 14
    assert len(read(tmp_path / "out.jsonl")) == 4


def test_rejected_answers_and_rows_are_counted_by_reason_and_asked_for_again(tmp_path: Path) -> None:
    def reply(number: int, body: dict[str, Any]) -> Reply:
        pairs = make_pairs(body)
        bad = {
            0: complete(json.dumps({"pairs": pairs})[:-40], finish_reason="length"),
            1: complete("Here you are: ..."),
            2: complete(json.dumps({"pairs": [pairs[0], pairs[0], *pairs[1:3]]})),
        }
        return bad.get(number) or answer_well(number, body)

    with run_stub(reply) as stub:
        report = make(make_spec_file(tmp_path, stub.url))
    assert (report.status, report.rows) == ("finished", 24)
    assert report.rejected_answers == {"cut off at max_tokens": 1, "not JSON": 1}
    assert report.rejected_rows["the question is like an earlier one"] == 1


def test_the_budget_is_never_overspent_and_a_higher_one_goes_on(tmp_path: Path) -> None:
    expensive = {"prompt_tokens": 900, "completion_tokens": 2000}

    def reply(number: int, body: dict[str, Any]) -> Reply:
        return complete(json.dumps({"pairs": make_pairs(body)}), usage=expensive)

    with run_stub(reply) as stub:
        poor = make(make_spec_file(tmp_path, stub.url, endpoint=PRICES, limits={"max_cost": 0.2}))
        assert poor.status == "limit"
        assert "limits.max_cost = 0.2" in str(poor.why)
        assert 0 < poor.rows < 24
        assert poor.cost == pytest.approx(poor.answers * (900 * 10 + 2000 * 20) / 1e6)
        assert poor.cost <= 0.2
        rich = make(make_spec_file(tmp_path, stub.url, endpoint=PRICES, limits={"max_cost": 2.0}))
    assert (rich.status, rich.rows, rich.answers) == ("finished", 24, 6)
    assert len(stub.received) == 6


def test_the_number_of_requests_is_limited_over_all_starts(tmp_path: Path) -> None:
    with run_stub() as stub:
        reports = [make(make_spec_file(tmp_path, stub.url, limits={"max_requests": 4})) for _ in range(2)]
    assert [report.status for report in reports] == ["limit", "limit"]
    assert [report.requests for report in reports] == [4, 0]
    assert reports[1].rows == 16
    assert len(stub.received) == 4


def test_requests_keep_their_rate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(make_limits, "WINDOW_SECONDS", 0.5)
    with run_stub() as stub:
        make(make_spec_file(tmp_path, stub.url, limits={"requests_per_minute": 2}))
    times = [one.at for one in stub.received]
    assert all(later - earlier > 0.4 for earlier, later in zip(times, times[2:], strict=False))


def test_a_second_start_sends_nothing_and_writes_the_same_files(tmp_path: Path) -> None:
    with run_stub() as stub:
        spec_file = make_spec_file(tmp_path, stub.url, output={"eval": 0.25})
        first = make(spec_file)
        files = {path: path.read_bytes() for path in tmp_path.iterdir() if "answers" not in path.name}
        second = make(spec_file)
    assert len(stub.received) == 6
    assert {path: path.read_bytes() for path in files} == files
    assert (second.requests, second.cost, second.rows) == (0, first.cost, first.rows)


def test_more_rows_and_other_thresholds_use_the_answers_that_were_paid_for(tmp_path: Path) -> None:
    with run_stub() as stub:
        make(make_spec_file(tmp_path, stub.url, output={"eval": 0.25}))
        more = make(make_spec_file(tmp_path, stub.url, output={"rows": 40, "format": "messages"}))
    assert (more.rows, more.requests) == (40, 4)
    assert len(stub.received) == 10
    assert set(read(tmp_path / "out.jsonl")[0]) == {"messages"}
    assert not (tmp_path / "out.eval.jsonl").exists(), "rows that are no longer held out are in the training file"


def test_a_spec_that_asks_something_else_is_refused_with_the_difference(tmp_path: Path) -> None:
    with run_stub() as stub:
        make(make_spec_file(tmp_path, stub.url))
        with pytest.raises(DataError) as caught:
            make(make_spec_file(tmp_path, stub.url, persona={"style": "Long."}, endpoint={"model": "n"}))
    assert len(stub.received) == 6
    message = str(caught.value)
    assert 'persona.style: was "Short.", is "Long."' in message
    assert 'endpoint.model: was "m", is "n"' in message
    assert "persona.name" not in message


def test_a_changed_document_is_refused(tmp_path: Path) -> None:
    (tmp_path / "feta.md").write_text("Feta is white.")
    source = {"documents": "*.md", "topics": None}
    with run_stub() as stub:
        make(make_spec_file(tmp_path, stub.url, source=source))
        (tmp_path / "feta.md").write_text("Feta is old.")
        with pytest.raises(DataError, match=r"source.documents \(what they say\)"):
            make(make_spec_file(tmp_path, stub.url, source=source))


def test_a_first_try_that_was_never_answered_binds_nobody(tmp_path: Path) -> None:
    with run_stub(lambda number, body: fail(404) if body["model"] == "typo" else answer_well(number, body)) as stub:
        assert make(make_spec_file(tmp_path, stub.url, endpoint={"model": "typo"})).status == "failed"
        assert make(make_spec_file(tmp_path, stub.url)).status == "finished"


def test_files_that_are_not_ours_or_were_changed_by_hand_are_never_overwritten(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    out.write_text("mine\n")
    with run_stub() as stub:
        with pytest.raises(DataError, match="was not made from this spec"):
            make(make_spec_file(tmp_path, stub.url))
        out.unlink()
        make(make_spec_file(tmp_path, stub.url))
        out.write_text(out.read_text() + "mine\n")
        with pytest.raises(DataError, match="was changed since it was made"):
            make(make_spec_file(tmp_path, stub.url, output={"rows": 40}))
    assert len(stub.received) == 6


def test_a_line_of_the_journal_that_was_half_written_is_dropped_and_asked_for_again(tmp_path: Path) -> None:
    journal, notes = tmp_path / "out.answers.jsonl", list[str]()
    with run_stub() as stub:
        make(make_spec_file(tmp_path, stub.url, output={"rows": 8}))
        answers = [line for line in journal.read_bytes().splitlines(keepends=True) if b'"answer"' in line[:20]]
        torn = journal.read_bytes().split(answers[-1])[0] + answers[-1][:50]
        journal.write_bytes(torn)
        (tmp_path / "out.jsonl").unlink()
        (tmp_path / "out.sources.jsonl").unlink()
        report = make(make_spec_file(tmp_path, stub.url, output={"rows": 8}), notes)
    assert (report.status, report.rows, report.requests) == ("finished", 8, 1)
    assert any("only half written" in note for note in notes)


def test_a_journal_that_is_none_is_named_with_its_line(tmp_path: Path) -> None:
    with run_stub() as stub:
        make(make_spec_file(tmp_path, stub.url))
        journal = tmp_path / "out.answers.jsonl"
        lines = journal.read_text().splitlines()
        journal.write_text("\n".join([lines[0], '{"kind": "other"}', *lines[1:]]) + "\n")
        with pytest.raises(DataError, match=r"out.answers.jsonl:2: is not a line of the journal"):
            make(make_spec_file(tmp_path, stub.url))


LINES = st.sampled_from(
    [
        b'{"kind":"asked","asked":{}}',
        b'{"kind":"lost","index":0,"request":"0","why":"x"}',
        b'{"kind":"wrote","name":"out.jsonl","sha256":"0"}',
        b'{"kind":"answer","index":9000000000000000000000,"request":"0","content":null,"finish_reason":null,'
        b'"refusal":null,"prompt_tokens":null,"answer_tokens":null}',
        b"{",
        b"",
    ]
)


@settings(max_examples=1000)
@given(content=st.binary(max_size=60) | st.lists(LINES | st.binary(max_size=20), max_size=5).map(b"\n".join))
def test_any_journal_is_read_or_is_a_message(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    folder = tmp_path_factory.getbasetemp() / "journals"
    folder.mkdir(exist_ok=True)
    journal = folder / "out.answers.jsonl"
    journal.write_bytes(content)
    try:
        dry_run = make_dry_run(make_spec_file(folder, "http://localhost/v1"))
    except DataError as error:
        assert str(journal) in str(error)
    else:
        assert dry_run.rows == 0
    journal.unlink(missing_ok=True)


def test_two_starts_at_once_are_refused(tmp_path: Path) -> None:
    refused = list[str]()

    def reply(number: int, body: dict[str, Any]) -> Reply:
        if number == 0:
            try:
                make(make_spec_file(tmp_path, stub.url))
            except DataError as error:
                refused.append(str(error))
        return answer_well(number, body)

    with run_stub(reply) as stub:
        assert make(make_spec_file(tmp_path, stub.url)).status == "finished"
    assert refused == [f"{tmp_path}/out.answers.jsonl is held by another `fitune data make` that is still going"]


def test_a_dry_run_sends_and_writes_nothing_and_bounds_the_cost(tmp_path: Path) -> None:
    with run_stub() as stub:
        spec_file = make_spec_file(tmp_path, stub.url, endpoint=PRICES)
        before = make_dry_run(spec_file)
        assert (stub.received, list(tmp_path.iterdir())) == ([], [])
        report = make(spec_file)
        after = make_dry_run(spec_file)
    assert (before.requests_needed, before.max_requests, before.rows) == (6, 12, 0)
    bound = 12 * (before.max_prompt_tokens * 10 + 2048 * 20) / 1e6
    assert before.max_cost == pytest.approx(bound)
    assert report.cost <= before.max_cost
    assert [one.body for one in sorted(stub.received, key=lambda one: list(before.requests).index(one.body))] == list(
        before.requests
    )
    assert (after.rows, after.requests_needed, after.max_requests, after.requests) == (24, 0, 0, ())
