from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from fitune.runtime.data.mixture import Part, count_draws, draw_epoch

WEIGHTED = st.lists(
    st.builds(lambda rows, weight: Part(name="a", rows=rows, weight=weight), st.integers(1, 60), st.floats(0.01, 50)),
    min_size=1,
    max_size=4,
)


def parts(*sizes: tuple[int, float | None]) -> list[Part]:
    return [Part(name=str(number), rows=rows, weight=weight) for number, (rows, weight) in enumerate(sizes)]


def test_without_weights_an_epoch_is_every_row_once() -> None:
    assert draw_epoch(parts((3, None), (2, None)), epoch=5, seed=1) == [0, 1, 2, 3, 4]


def test_an_epoch_ends_when_the_source_that_is_used_up_first_was_drawn_once() -> None:
    assert count_draws(parts((900, 0.9), (100_000, 0.1))) == [900, 100]
    assert count_draws(parts((100, 1), (100, 3))) == [33, 100]


@given(WEIGHTED)
def test_an_epoch_has_the_shares_of_the_weights_and_at_most_each_row_once(mixed: list[Part]) -> None:
    draws, total = count_draws(mixed), sum(one.weight or 0 for one in mixed)
    assert all(1 <= drawn <= one.rows for drawn, one in zip(draws, mixed, strict=True))
    assert any(drawn >= one.rows - 1 for drawn, one in zip(draws, mixed, strict=True))
    for drawn, one in zip(draws, mixed, strict=True):
        share = (one.weight or 0) / total
        assert drawn in (1, one.rows) or abs(drawn - share * sum(draws)) <= len(mixed)


@given(WEIGHTED, st.integers(0, 9), st.integers(0, 3))
def test_an_epoch_depends_on_sources_seed_and_epoch_alone(mixed: list[Part], epoch: int, seed: int) -> None:
    drawn = draw_epoch(mixed, epoch=epoch, seed=seed)
    assert drawn == draw_epoch(mixed, epoch=epoch, seed=seed)
    start = 0
    for one, count in zip(mixed, count_draws(mixed), strict=True):
        assert sum(start <= row < start + one.rows for row in drawn) == count
        start += one.rows


def test_epochs_go_on_with_rows_that_were_not_drawn_until_all_were() -> None:
    mixed = parts((4, 1.0), (20, 1.0))
    seen = Counter(row - 4 for epoch in range(5) for row in draw_epoch(mixed, epoch=epoch, seed=0) if row >= 4)
    assert seen == Counter(dict.fromkeys(range(20), 1))
    again = Counter(row - 4 for epoch in range(10) for row in draw_epoch(mixed, epoch=epoch, seed=0) if row >= 4)
    assert set(again.values()) == {2}


def test_another_seed_draws_other_rows() -> None:
    mixed = parts((4, 1.0), (20, 1.0))
    assert len({tuple(draw_epoch(mixed, epoch=0, seed=seed)) for seed in range(6)}) > 1
