from __future__ import annotations

import random
import subprocess
import sys
from array import array
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fitune.runtime.data.batches import (
    count_steps,
    epoch_order,
    iterate_batches,
    iterate_eval_batches,
    make_micro_batch,
)
from fitune.runtime.data.tokens import TokenizedRow, TokenizedRows

PAD = 2


def make_row(number: int, length: int, untrained: int = 1) -> TokenizedRow:
    """A row of the token `number` that ends with the pad token, as an end of turn may; its first tokens untrained."""
    ids = array("i", [number] * (length - 1) + [PAD])
    return TokenizedRow(input_ids=ids, labels=array("i", [-100] * untrained) + ids[untrained:])


def make_rows(*lengths: int, max_length: int = 64) -> TokenizedRows:
    rows = tuple(make_row(number, length) for number, length in enumerate(lengths, start=10))
    return TokenizedRows(rows=rows, pad_token_id=PAD, max_length=max_length)


LENGTHS = st.lists(st.integers(2, 64), min_size=1, max_size=30)


@given(rows=st.integers(0, 200), epoch=st.integers(0, 5), seed=st.integers(0, 2**32))
def test_the_order_of_an_epoch_is_a_permutation_and_repeatable(rows: int, epoch: int, seed: int) -> None:
    order = epoch_order(rows, epoch=epoch, seed=seed)
    assert sorted(order) == list(range(rows))
    random.seed(1)
    assert epoch_order(rows, epoch=epoch, seed=seed) == order


def test_the_order_leaves_the_global_random_state_alone() -> None:
    random.seed(7)
    before = random.getstate()
    epoch_order(50, epoch=0, seed=0)
    assert random.getstate() == before


def test_the_order_differs_between_epochs_and_between_seeds() -> None:
    orders = {tuple(epoch_order(50, epoch=epoch, seed=seed)) for epoch in range(4) for seed in range(4)}
    assert len(orders) == 16


@settings(deadline=None)
@given(
    lengths=LENGTHS,
    micro_batch_size=st.integers(1, 4),
    gradient_accumulation_steps=st.integers(1, 4),
    epochs=st.integers(1, 3),
)
def test_an_epoch_holds_every_row_exactly_once(
    lengths: list[int], micro_batch_size: int, gradient_accumulation_steps: int, epochs: int
) -> None:
    tokenized, size = make_rows(*lengths), micro_batch_size * gradient_accumulation_steps
    batches = list(
        iterate_batches(tokenized, global_batch_size=size, micro_batch_size=micro_batch_size, seed=0, epochs=epochs)
    )
    steps = count_steps(len(tokenized), global_batch_size=size, epochs=epochs, max_steps=None)
    assert [batch.step for batch in batches] == list(range(1, steps + 1))
    for epoch in range(epochs):
        micro_batches = [one for batch in batches if batch.epoch == epoch for one in batch.micro_batches]
        assert sorted(int(ids[0]) for one in micro_batches for ids in one.input_ids) == [
            row.input_ids[0] for row in tokenized.rows
        ]
    assert all(one.input_ids.shape[0] <= micro_batch_size for batch in batches for one in batch.micro_batches)
    assert all(len(batch.micro_batches) <= gradient_accumulation_steps for batch in batches)


@settings(deadline=None)
@given(lengths=LENGTHS, micro_batch_size=st.integers(1, 4))
def test_a_global_batch_counts_its_tokens(lengths: list[int], micro_batch_size: int) -> None:
    tokenized = make_rows(*lengths)
    batches = list(iterate_batches(tokenized, global_batch_size=8, micro_batch_size=micro_batch_size, seed=0, epochs=1))
    for batch in batches:
        shifted = [one.labels[:, 1:] for one in batch.micro_batches]
        assert batch.trained_tokens == sum(int((labels != -100).sum()) for labels in shifted)
        assert batch.padded_tokens == sum(one.input_ids.numel() for one in batch.micro_batches)
    assert sum(batch.tokens for batch in batches) == sum(lengths)
    assert sum(batch.trained_tokens for batch in batches) == tokenized.trained_tokens


@settings(deadline=None)
@given(lengths=st.lists(st.integers(2, 61), min_size=1, max_size=8))
def test_padding_is_on_the_right_and_untrained_by_length(lengths: list[int]) -> None:
    rows = [make_row(number, length) for number, length in enumerate(lengths, start=10)]
    batch = make_micro_batch(rows, pad_token_id=PAD, max_length=61)
    width = batch.input_ids.shape[1]
    assert max(lengths) <= width <= 61
    assert width % 8 == 0 or width == 61
    assert width - max(lengths) < 8
    for index, row in enumerate(rows):
        assert batch.input_ids[index].tolist() == [*row.input_ids, *[PAD] * (width - len(row))]
        assert batch.labels[index].tolist() == [*row.labels, *[-100] * (width - len(row))]
        assert batch.labels[index, len(row) - 1] == PAD


def test_padding_never_goes_beyond_max_length() -> None:
    batch = make_micro_batch([make_row(10, 61), make_row(11, 3)], pad_token_id=PAD, max_length=61)
    assert batch.input_ids.shape == (2, 61)


def test_tensors_are_64_bit_integers_on_the_cpu() -> None:
    batch = make_micro_batch([make_row(10, 5)], pad_token_id=PAD, max_length=64)
    assert {(str(one.dtype), one.device.type) for one in (batch.input_ids, batch.labels)} == {("torch.int64", "cpu")}


def test_micro_batches_of_a_global_batch_go_from_long_to_short() -> None:
    (batch,) = iterate_batches(
        make_rows(8, 40, 16, 32, 9, 24), global_batch_size=6, micro_batch_size=2, seed=0, epochs=1
    )
    assert [one.input_ids.shape[1] for one in batch.micro_batches] == [40, 24, 16]


def test_the_last_batch_of_an_epoch_is_kept_and_smaller() -> None:
    batches = list(iterate_batches(make_rows(*[8] * 10), global_batch_size=4, micro_batch_size=4, seed=0, epochs=2))
    assert [one.input_ids.shape[0] for batch in batches for one in batch.micro_batches] == [4, 4, 2, 4, 4, 2]


def test_max_steps_goes_on_into_further_epochs() -> None:
    batches = list(iterate_batches(make_rows(*[8] * 5), global_batch_size=2, micro_batch_size=1, seed=0, max_steps=7))
    assert [batch.epoch for batch in batches] == [0, 0, 0, 1, 1, 1, 2]
    assert count_steps(5, global_batch_size=2, epochs=None, max_steps=7) == 7


def test_every_epoch_has_an_order_of_its_own() -> None:
    batches = list(iterate_batches(make_rows(*[8] * 20), global_batch_size=1, micro_batch_size=1, seed=0, epochs=2))
    seen = [int(batch.micro_batches[0].input_ids[0, 0]) for batch in batches]
    assert seen[:20] != seen[20:]


def test_a_run_that_is_repeated_meets_the_same_batches() -> None:
    tokenized = make_rows(*range(2, 22))
    first, second = (
        [
            [one.input_ids.tolist() for one in batch.micro_batches]
            for batch in iterate_batches(tokenized, global_batch_size=4, micro_batch_size=2, seed=3, max_steps=9)
        ]
        for _ in range(2)
    )
    assert first == second


@settings(deadline=None)
@given(lengths=LENGTHS, micro_batch_size=st.integers(1, 5))
def test_evaluation_sees_every_row_once(lengths: list[int], micro_batch_size: int) -> None:
    tokenized = make_rows(*lengths)
    batches = list(iterate_eval_batches(tokenized, micro_batch_size=micro_batch_size))
    assert Counter(int(ids[0]) for one in batches for ids in one.input_ids) == Counter(
        row.input_ids[0] for row in tokenized.rows
    )
    assert sum(int((one.labels[:, 1:] != -100).sum()) for one in batches) == tokenized.trained_tokens


@pytest.mark.parametrize(
    "module",
    ["rows", "readers", "records", "sources", "templates", "encoding", "tokens", "prepare", "mixture", "batches"],
)
def test_the_data_modules_are_imported_without_torch(module: str) -> None:
    heavy = "{'torch', 'transformers', 'datasets'}"
    code = f"import sys, fitune.runtime.data.{module}; print(sorted({heavy} & set(sys.modules)))"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "[]"
