"""The model of the CUDA caching allocator: rounding, pools, splitting, merging, segments given back."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fitune.planner.allocator import (
    CachingAllocator,
    SegmentOrder,
    apart_by_size,
    newest_highest,
    newest_lowest,
    round_request,
    segment_size,
)

MiB = 2**20
sizes = st.integers(1, 64 * MiB)


@given(sizes)
def test_a_request_is_rounded_up_to_the_next_512_bytes(size: int) -> None:
    assert size <= round_request(size) < size + 512 or round_request(size) == 512
    assert round_request(size) % 512 == 0


def test_an_empty_tensor_still_takes_a_block() -> None:
    assert round_request(0) == 512


def test_segments_are_2_mib_20_mib_or_whole_multiples_of_2_mib() -> None:
    assert segment_size(MiB) == 2 * MiB
    assert segment_size(MiB + 512) == 20 * MiB
    assert segment_size(10 * MiB - 512) == 20 * MiB
    assert segment_size(10 * MiB) == 10 * MiB
    assert segment_size(11 * MiB) == 12 * MiB


def test_small_requests_share_a_segment() -> None:
    allocator = CachingAllocator()
    for _ in range(4):
        allocator.allocate(MiB // 2)
    assert allocator.reserved_bytes == 2 * MiB
    allocator.allocate(512)
    assert allocator.reserved_bytes == 4 * MiB


def test_a_small_request_never_takes_from_a_large_segment() -> None:
    allocator = CachingAllocator()
    allocator.free(allocator.allocate(30 * MiB))
    allocator.allocate(1024)
    assert allocator.reserved_bytes == 32 * MiB


def test_a_remainder_of_up_to_1_mib_stays_with_its_block_and_counts_as_allocated() -> None:
    allocator = CachingAllocator()
    allocator.allocate(19 * MiB + MiB // 2)
    assert allocator.allocated_bytes == 20 * MiB
    assert allocator.reserved_bytes == 20 * MiB


def test_a_larger_remainder_serves_the_next_request() -> None:
    allocator = CachingAllocator()
    allocator.allocate(2 * MiB)
    allocator.allocate(17 * MiB)
    assert allocator.reserved_bytes == 20 * MiB


def test_the_smallest_free_block_that_fits_is_taken() -> None:
    allocator = CachingAllocator()
    blocks = [allocator.allocate(size * MiB) for size in (60, 40, 50)]
    for block in blocks:
        allocator.free(block)
    assert allocator.allocate(39 * MiB + MiB // 2).address == blocks[1].address


@pytest.mark.parametrize(("order", "taken"), [(newest_lowest, 2), (newest_highest, 0), (apart_by_size, 0)])
def test_of_equally_large_free_blocks_the_lowest_address_is_taken(order: SegmentOrder, taken: int) -> None:
    allocator = CachingAllocator(order=order)
    blocks = [allocator.allocate(40 * MiB) for _ in range(3)]
    for block in blocks:
        allocator.free(block)
    assert allocator.allocate(40 * MiB).address == blocks[taken].address


def test_neighbours_merge_when_freed_so_that_a_larger_request_fits() -> None:
    allocator = CachingAllocator()
    parts = [allocator.allocate(5 * MiB) for _ in range(4)]
    assert allocator.reserved_bytes == 20 * MiB
    for part in (parts[1], parts[3], parts[0], parts[2]):
        allocator.free(part)
    allocator.allocate(20 * MiB)
    assert allocator.reserved_bytes == 20 * MiB


def test_cached_segments_stay_reserved_until_the_cache_is_emptied() -> None:
    allocator = CachingAllocator()
    held = allocator.allocate(30 * MiB)
    allocator.free(allocator.allocate(40 * MiB))
    assert allocator.reserved_bytes == 70 * MiB
    allocator.empty_cache()
    assert allocator.reserved_bytes == 30 * MiB
    allocator.free(held)
    allocator.empty_cache()
    assert allocator.reserved_bytes == 0


def test_a_segment_in_partial_use_is_not_given_back() -> None:
    allocator = CachingAllocator()
    allocator.allocate(2 * MiB)
    allocator.empty_cache()
    assert allocator.reserved_bytes == 20 * MiB


def test_at_the_cards_limit_unused_segments_are_given_back_first() -> None:
    allocator = CachingAllocator(limit_bytes=100 * MiB)
    allocator.free(allocator.allocate(60 * MiB))
    allocator.allocate(80 * MiB)
    assert allocator.reserved_bytes == 80 * MiB
    assert allocator.retries == 1


def test_a_request_beyond_the_limit_is_granted_and_shows_in_the_peak() -> None:
    allocator = CachingAllocator(limit_bytes=100 * MiB)
    allocator.allocate(80 * MiB)
    allocator.allocate(80 * MiB)
    assert allocator.peak_reserved_bytes == 160 * MiB


def test_an_expandable_segment_grows_by_what_is_missing() -> None:
    allocator = CachingAllocator(expandable=True)
    allocator.free(allocator.allocate(30 * MiB))
    assert allocator.reserved_bytes == 40 * MiB
    allocator.allocate(50 * MiB)
    assert allocator.reserved_bytes == 60 * MiB
    assert allocator.allocated_bytes == 50 * MiB


def test_an_expandable_segment_gives_back_the_unused_pages_at_its_end() -> None:
    allocator = CachingAllocator(expandable=True)
    allocator.allocate(25 * MiB)
    allocator.free(allocator.allocate(50 * MiB))
    allocator.empty_cache()
    assert allocator.reserved_bytes == 40 * MiB


@given(st.lists(st.tuples(sizes, st.booleans()), max_size=60), st.booleans())
def test_whatever_is_done_blocks_are_within_segments_and_all_comes_back(
    requests: list[tuple[int, bool]], expandable: bool
) -> None:
    allocator = CachingAllocator(expandable=expandable)
    live = []
    for size, frees_one in requests:
        live.append(allocator.allocate(size))
        if frees_one:
            allocator.free(live.pop(len(live) // 2))
        assert sum(block.size_bytes for block in live) == allocator.allocated_bytes <= allocator.reserved_bytes
        spans = sorted((block.address, block.address + block.size_bytes, block.pool.is_small) for block in live)
        for kind in (True, False):
            ends = [span for span in spans if span[2] is kind]
            assert all(first[1] <= second[0] for first, second in pairwise(ends))
    for block in live:
        allocator.free(block)
    allocator.empty_cache()
    assert allocator.allocated_bytes == allocator.reserved_bytes == 0
