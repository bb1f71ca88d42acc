from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_tokenizers import (
    AMBIGUOUS,
    BOS_CHATML,
    CHATML,
    MARKED,
    MARKED_WITHOUT_END,
    THINKS_LAST,
    WITHOUT_END,
    WITHOUT_SYSTEM,
    build_tokenizer,
)
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from fitune.recipes.errors import DataError
from fitune.runtime.data.rows import Message, Row
from fitune.runtime.data.templates import ensure_chat_template
from fitune.runtime.data.tokens import TokenizedRow, TokenSettings, find_stop_token_ids, tokenize_rows


def build_default(**options: object) -> PreTrainedTokenizerFast:
    tokenizer = build_tokenizer(None, **options)  # type: ignore[arg-type]
    ensure_chat_template(tokenizer)
    return tokenizer


TOKENIZERS = {
    "chatml": build_tokenizer(CHATML),
    "generation markers": build_tokenizer(MARKED),
    "generation markers without the end": build_tokenizer(MARKED_WITHOUT_END),
    "adds bos": build_tokenizer(BOS_CHATML, adds_bos=True),
    "history rendered differently": build_tokenizer(THINKS_LAST),
    "default": build_default(),
    "default, adds bos": build_default(adds_bos=True),
    "default without chatml tokens": build_default(chatml=False, eos="<|endoftext|>"),
}
CONTENT = st.text(st.characters(codec="utf-8", exclude_characters="<>"), min_size=1, max_size=30).filter(str.strip)


def conversation(*contents: str, where: str = "train.jsonl:1") -> Row:
    """Turns of user and assistant in turn."""
    roles = ("user", "assistant")
    messages = tuple(Message(role=roles[index % 2], content=content) for index, content in enumerate(contents))
    return Row(where=where, messages=messages)


def tokenize(tokenizer: PreTrainedTokenizerFast, *rows: Row, max_length: int = 4096) -> tuple[TokenizedRow, ...]:
    return tokenize_rows(rows, tokenizer, TokenSettings(max_length=max_length)).rows


def trained_text(tokenizer: PreTrainedTokenizerFast, row: TokenizedRow) -> str:
    return str(tokenizer.decode([label for label in row.labels if label != -100]))


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=60, deadline=None)
@given(turns=st.lists(st.tuples(CONTENT, CONTENT), min_size=1, max_size=3))
def test_exactly_the_answers_and_their_end_are_trained(name: str, turns: list[tuple[str, str]]) -> None:
    tokenizer = TOKENIZERS[name]
    end = "<|endoftext|>" if "without chatml" in name else "<|im_end|>"
    thinking = "<think></think>" if "history" in name else ""
    rows = tokenize(tokenizer, conversation(*(content for turn in turns for content in turn)))
    trained = "".join(trained_text(tokenizer, row) for row in rows)
    if "markers" in name:  # a token may hold the header's line end and the answer's first: it is trained
        trained = trained.replace("\n", "")
        turns = [(user, answer.replace("\n", "")) for user, answer in turns]
    assert trained == "".join(thinking + answer + end for _, answer in turns)


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=30, deadline=None)
@given(turns=st.lists(CONTENT, min_size=2, max_size=2))
def test_a_row_is_the_rendered_conversation(name: str, turns: list[str]) -> None:
    tokenizer = TOKENIZERS[name]
    (row,) = tokenize(tokenizer, conversation(*turns))
    messages = [{"role": "user", "content": turns[0]}, {"role": "assistant", "content": turns[1]}]
    assert tokenizer.decode(row.input_ids) == tokenizer.apply_chat_template(messages, tokenize=False)
    assert len(row.labels) == len(row.input_ids)
    assert all(label in (-100, token) for token, label in zip(row.input_ids, row.labels, strict=True))


@pytest.mark.parametrize("name", TOKENIZERS)
def test_what_is_given_before_an_answer_is_what_the_model_is_given_in_use(name: str) -> None:
    tokenizer = TOKENIZERS[name]
    (row,) = tokenize(tokenizer, conversation("What is feta?", "A cheese."))
    given_ids = row.input_ids[: next(index for index, label in enumerate(row.labels) if label != -100)]
    prompt = [{"role": "user", "content": "What is feta?"}]
    assert given_ids.tolist() == tokenizer.apply_chat_template(prompt, add_generation_prompt=True)["input_ids"]


def test_the_end_of_turn_is_trained_although_it_is_the_pad_token() -> None:
    tokenizer = build_tokenizer(CHATML)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    (row,) = tokenize(tokenizer, conversation("Feta?", "Yes."))
    assert tokenizer.eos_token_id in row.labels


def test_an_answer_that_starts_with_empty_lines_is_tokenised_as_it_is_generated() -> None:
    tokenizer = build_tokenizer(CHATML)
    joined = tokenizer("assistant\n\n\nYes", add_special_tokens=False)["input_ids"]
    apart = [tokenizer(part, add_special_tokens=False)["input_ids"] for part in ("assistant\n", "\n\nYes")]
    assert joined != apart[0] + apart[1], "the tokenizer has a token for an empty line"
    (row,) = tokenize(tokenizer, conversation("Feta?", "\n\nYes"))
    assert trained_text(tokenizer, row) == "\n\nYes<|im_end|>"


def test_all_tokens_of_an_emoji_before_the_markers_end_are_trained() -> None:
    tokenizer = build_tokenizer(MARKED_WITHOUT_END)
    (row,) = tokenize(tokenizer, conversation("Feta?", "Opa 🧀"))
    assert trained_text(tokenizer, row) == "Opa 🧀<|im_end|>"


def test_an_ambiguous_template_is_refused_with_the_row() -> None:
    with pytest.raises(DataError, match=r"train\.jsonl:17: message 2: which tokens are the answer is ambiguous"):
        tokenize(build_tokenizer(AMBIGUOUS), conversation("Feta?", "Yes.", where="train.jsonl:17"))


def test_a_conversation_whose_history_changes_becomes_one_row_an_answer() -> None:
    tokenizer = build_tokenizer(THINKS_LAST)
    first, second = tokenize(tokenizer, conversation("Feta?", "Yes.", "Sure?", "Opa!"))
    assert trained_text(tokenizer, first) == "<think></think>Yes.<|im_end|>"
    assert trained_text(tokenizer, second) == "<think></think>Opa!<|im_end|>"
    assert "Yes.<|im_end|>" in tokenizer.decode(second.input_ids)


def test_a_row_that_the_template_refuses_is_named_with_the_templates_words() -> None:
    messages = (
        Message(role="system", content="Be brief."),
        Message(role="user", content="a"),
        Message(role="assistant", content="b"),
    )
    with pytest.raises(DataError, match=r"train\.jsonl:3: .*System role not supported"):
        tokenize(build_tokenizer(WITHOUT_SYSTEM + CHATML), Row(where="train.jsonl:3", messages=messages))


def test_a_template_that_marks_nothing_is_refused_with_the_row() -> None:
    unmarked = MARKED.replace("== 'assistant'", "== 'model'")
    with pytest.raises(DataError, match=r"train\.jsonl:1: the chat template marks nothing"):
        tokenize(build_tokenizer(unmarked), conversation("Feta?", "Yes."))


def test_a_template_that_leaves_answers_out_is_refused_with_the_row() -> None:
    with pytest.raises(DataError, match=r"train\.jsonl:1: message 2: the chat template leaves the answer out"):
        tokenize(build_tokenizer("{{ messages[0]['content'] }}"), conversation("Feta?", "Yes."))


def test_a_template_without_an_end_of_turn_gets_the_end_of_sequence_after_the_last_answer() -> None:
    tokenizer = build_tokenizer(WITHOUT_END)
    (row,) = tokenize(tokenizer, conversation("Feta?", "Yes.", "Sure?", "Opa!"))
    assert trained_text(tokenizer, row) == "Yes.\nOpa!\n<|im_end|>"
    assert row.input_ids[-1] == tokenizer.eos_token_id


def test_every_token_of_text_is_trained_and_it_ends() -> None:
    tokenizer = build_tokenizer()
    (row,) = tokenize(tokenizer, Row(where="a.txt:1", text="Feta is a cheese."))
    assert row.labels == row.input_ids
    assert tokenizer.decode(row.input_ids) == "Feta is a cheese.<|im_end|>"
    assert row.trained_tokens == len(row) - 1


@pytest.mark.parametrize("text", ["Feta.", "<s>Feta.", "Feta.<|im_end|>", "<s>Feta.<|im_end|>"])
def test_special_tokens_of_text_are_never_doubled(text: str) -> None:
    tokenizer = build_tokenizer(adds_bos=True)
    (row,) = tokenize(tokenizer, Row(where="a.txt:1", text=text))
    assert tokenizer.decode(row.input_ids) == "<s>Feta.<|im_end|>"


def test_special_tokens_of_a_rendered_conversation_are_never_doubled() -> None:
    tokenizer = TOKENIZERS["adds bos"]
    (row,) = tokenize(tokenizer, conversation("Feta?", "Yes."))
    assert list(row.input_ids).count(tokenizer.bos_token_id) == 1


@settings(max_examples=100, deadline=None)
@given(prompt=st.one_of(st.just(""), CONTENT), completion=CONTENT, adds_bos=st.booleans())
def test_of_a_completion_exactly_the_completion_and_the_end_are_trained(
    prompt: str, completion: str, adds_bos: bool
) -> None:
    tokenizer = TOKENIZERS["adds bos" if adds_bos else "chatml"]
    rows = tokenize_rows(
        [Row(where="a:1", prompt=prompt, completion=completion)], tokenizer, TokenSettings(max_length=4096)
    ).rows
    assert trained_text(tokenizer, rows[0]) == completion + "<|im_end|>"
    assert tokenizer.decode(rows[0].input_ids) == ("<s>" if adds_bos else "") + prompt + completion + "<|im_end|>"


def test_a_prompt_that_ends_with_a_space_is_tokenised_as_it_is_given_in_use() -> None:
    tokenizer = build_tokenizer()
    (row,) = tokenize(tokenizer, Row(where="a:1", prompt="Pavlos: ", completion="feta"))
    prompt_ids = tokenizer("Pavlos: ", add_special_tokens=False)["input_ids"]
    assert row.input_ids[: len(prompt_ids)].tolist() == prompt_ids
    assert set(row.labels[: len(prompt_ids)]) == {-100}


def test_a_completion_that_the_tokenizer_joins_with_its_prompt_is_refused_with_the_row() -> None:
    tokens = ["<unk>", "▁", "Q", ":", "y", ":y"]
    joining = Tokenizer(
        models.BPE({token: index for index, token in enumerate(tokens)}, [(":", "y")], unk_token="<unk>")
    )
    joining.pre_tokenizer, joining.decoder = pre_tokenizers.Metaspace(split=False), decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=joining, unk_token="<unk>")
    with pytest.raises(DataError, match=r"a\.jsonl:4: .*the tokenizer joins"):
        tokenize(tokenizer, Row(where="a.jsonl:4", prompt="Q:", completion="y"))


@settings(max_examples=60, deadline=None)
@given(answers=st.lists(CONTENT, min_size=1, max_size=5), max_length=st.integers(1, 40))
def test_long_rows_are_cut_and_those_without_an_answer_left_are_dropped(answers: list[str], max_length: int) -> None:
    tokenizer = TOKENIZERS["chatml"]
    rows = [conversation("Feta?", answer) for answer in answers]
    whole = [one for row in rows for one in tokenize(tokenizer, row)]
    cut = [TokenizedRow(input_ids=one.input_ids[:max_length], labels=one.labels[:max_length]) for one in whole]
    kept = tuple(one for one in cut if one.trained_tokens)
    if not kept:
        with pytest.raises(DataError, match=f"all {len(rows)} rows were dropped.*data.max_length = {max_length}"):
            tokenize_rows(rows, tokenizer, TokenSettings(max_length=max_length))
        return
    tokenized = tokenize_rows(rows, tokenizer, TokenSettings(max_length=max_length))
    assert tokenized.rows == kept
    assert tokenized.counts.empty == len(rows) - len(kept)
    assert tokenized.counts.truncated == sum(len(one) > max_length for one in whole)
    assert tokenized.longest_row_tokens == max(len(one) for one in kept) <= max_length
    assert tokenized.total_tokens == sum(len(one) for one in kept)
    assert tokenized.trained_tokens == sum(label != -100 for one in kept for label in one.labels[1:])


def test_a_model_stops_at_the_end_of_sequence_and_at_the_end_of_a_turn() -> None:
    tokenizer = build_tokenizer(CHATML, eos="<|endoftext|>")
    ends = {tokenizer.convert_tokens_to_ids(token) for token in ("<|endoftext|>", "<|im_end|>")}
    assert set(find_stop_token_ids(tokenizer)) == ends
    assert find_stop_token_ids(build_tokenizer(None)) == (build_tokenizer().eos_token_id,)


LONG = conversation("Feta?", "Yes, feta.", "Sure?", "Opa, sure!", "And graviera?", "That too.")


def test_a_long_conversation_is_split_between_its_turns_with_its_system_prompt() -> None:
    tokenizer = build_tokenizer(CHATML)
    system = Message(role="system", content="Be Pavlos.")
    row = Row(where="a:1", messages=(system, *(LONG.messages or ())))
    (whole,) = tokenize(tokenizer, row)
    made = tokenize_rows([row], tokenizer, TokenSettings(max_length=len(whole) - 1, overlong="split"))
    first, second = made.rows
    assert trained_text(tokenizer, first) == "Yes, feta.<|im_end|>Opa, sure!<|im_end|>"
    assert trained_text(tokenizer, second) == "That too.<|im_end|>"
    assert tokenizer.decode(second.input_ids).startswith(
        "<|im_start|>system\nBe Pavlos.<|im_end|>\n<|im_start|>user\nA"
    )
    assert (made.counts.rows, made.counts.split, made.counts.truncated) == (1, 1, 0)


@settings(max_examples=60, deadline=None)
@given(length=st.integers(2, 80), text=st.text(st.sampled_from("fet a"), min_size=1, max_size=60).filter(str.strip))
def test_long_text_is_split_into_windows_that_hold_every_token_once(length: int, text: str) -> None:
    tokenizer, row = build_tokenizer(adds_bos=True), Row(where="a:1", text=text)
    (whole,) = tokenize(tokenizer, row)
    made = tokenize_rows([row], tokenizer, TokenSettings(max_length=length, overlong="split"))
    ids = [token for one in made.rows for token in one.input_ids]
    assert ids == whole.input_ids.tolist()[: len(ids)]
    assert len(ids) >= len(whole) - 1, "only a last window of one token, which nothing predicts, is left out"
    assert all(len(one) <= length for one in made.rows)


def test_of_a_completion_that_is_split_the_prompt_stays_untrained() -> None:
    tokenizer = build_tokenizer()
    made = tokenize_rows(
        [Row(where="a:1", prompt="Question: " * 4, completion="answer " * 9)],
        tokenizer,
        TokenSettings(max_length=16, overlong="split"),
    )
    assert "".join(trained_text(tokenizer, one) for one in made.rows) == "answer " * 9 + "<|im_end|>"
    assert made.counts.split == 1


def test_long_rows_can_be_left_out_and_are_counted() -> None:
    tokenizer, short = build_tokenizer(CHATML), conversation("Feta?", "Yes.")
    length = len(tokenize(tokenizer, short)[0])
    made = tokenize_rows([short, LONG, short], tokenizer, TokenSettings(max_length=length, overlong="drop"))
    assert (len(made), made.counts.too_long, made.counts.truncated) == (2, 1, 0)
    assert sorted(made.counts.lengths)[:2] == [length, length]
    with pytest.raises(DataError, match=r"all 1 rows were dropped: data\.overlong is drop"):
        tokenize_rows([LONG], tokenizer, TokenSettings(max_length=length, overlong="drop"))


def test_an_exchange_that_does_not_fit_alone_is_cut_even_where_rows_are_split() -> None:
    tokenizer = build_tokenizer(CHATML)
    made = tokenize_rows(
        [conversation("Feta?", "Yes. " * 50)], tokenizer, TokenSettings(max_length=40, overlong="split")
    )
    assert [len(one) for one in made.rows] == [40]
    assert made.counts.truncated == 1
