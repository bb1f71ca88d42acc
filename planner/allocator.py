"""A model of PyTorch's CUDA caching allocator: what it reserves for a sequence of allocations and frees.

Follows c10/cuda/CUDACachingAllocator.cpp of PyTorch 2.11 with its default settings, one stream, no CUDA graphs.
https://github.com/pytorch/pytorch/blob/main/c10/cuda/CUDACachingAllocator.cpp
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable

MiB = 2**20

MIN_BLOCK_BYTES = 512
"""Every request is rounded up to a multiple of this."""
SMALL_REQUEST_BYTES = MiB
"""Requests up to this come from the small pool."""
SMALL_SEGMENT_BYTES = 2 * MiB
"""What the small pool takes from the driver at a time."""
LARGE_SEGMENT_BYTES = 20 * MiB
"""What the large pool takes for a request below LARGE_REQUEST_BYTES, and an expandable one's page."""
LARGE_REQUEST_BYTES = 10 * MiB
"""From here on a request gets a segment of its own."""
LARGE_ROUND_BYTES = 2 * MiB
"""Segments of their own are rounded up to a multiple of this."""
_SEGMENT_STRIDE = 1 << 44
"""Apart enough for any two segments."""
_ARENA_BYTES = 128 * MiB
SegmentOrder = Callable[[int, int], int]
"""From a segment's number, counted from 1, and its bytes to its place among all segments' addresses."""


def newest_lowest(number: int, _: int) -> int:
    """New segments below all others, as the driver gave them on the measured machine while none was given back."""
    return -number


def newest_highest(number: int, _: int) -> int:
    """New segments above all others."""
    return number


def apart_by_size(number: int, length: int) -> int:
    """New segments below 128 MiB above all others, larger ones below: as if the driver had an arena for each."""
    return number if length < _ARENA_BYTES else -number


SEGMENT_ORDERS: tuple[SegmentOrder, ...] = (newest_lowest, newest_highest, apart_by_size)
"""Orders in which a driver may give out addresses, the measured machine's first. PyTorch takes of equally large free
blocks the one at the lowest address, so the order decides how segments are cut up."""


def round_request(size_bytes: int) -> int:
    """The size of the block that a request of `size_bytes` wants: the next multiple of 512, at least 512."""
    return max(MIN_BLOCK_BYTES, -(-size_bytes // MIN_BLOCK_BYTES) * MIN_BLOCK_BYTES)


def segment_size(block_bytes: int) -> int:
    """What is taken from the driver for a block that no cached one can hold."""
    if block_bytes <= SMALL_REQUEST_BYTES:
        return SMALL_SEGMENT_BYTES
    if block_bytes < LARGE_REQUEST_BYTES:
        return LARGE_SEGMENT_BYTES
    return -(-block_bytes // LARGE_ROUND_BYTES) * LARGE_ROUND_BYTES


class Block:
    """A piece of a segment: its size in bytes, its neighbours, whether it is in use."""

    __slots__ = ("address", "in_use", "next", "pool", "previous", "size_bytes")

    def __init__(self, pool: _Pool, address: int, size_bytes: int) -> None:
        self.pool = pool
        self.address = address
        self.size_bytes = size_bytes
        self.in_use = False
        self.previous: Block | None = None
        self.next: Block | None = None


class _Pool:
    """The free blocks of one pool, smallest first, lower addresses before higher ones.

    free: (bytes, address, block) of each
    last: the block at the end of the newest segment; an expandable one grows there
    """

    __slots__ = ("free", "is_small", "last")

    def __init__(self, *, is_small: bool) -> None:
        self.is_small = is_small
        self.last: Block | None = None
        self.free: list[tuple[int, int, Block]] = []

    def insert(self, block: Block) -> None:
        insort(self.free, (block.size_bytes, block.address, block))

    def remove(self, block: Block) -> None:
        del self.free[bisect_left(self.free, (block.size_bytes, block.address))]


class CachingAllocator:
    """Blocks cut from segments, best fit, neighbours merged when freed, segments kept.

    limit_bytes: what the driver can give; where a segment would exceed it, unused segments are given back first.
                 A request that still exceeds it is granted all the same: the peak then says what would be needed.
    expandable:  one growing segment a pool (`expandable_segments:True`)
    order:       the addresses that segments get
    segments:    how many were taken from the driver so far, or how often an expandable one grew
    """

    def __init__(
        self, *, limit_bytes: int | None = None, expandable: bool = False, order: SegmentOrder = newest_lowest
    ) -> None:
        self.allocated_bytes = 0
        self.reserved_bytes = 0
        self.peak_allocated_bytes = 0
        self.peak_reserved_bytes = 0
        self.retries = 0
        self.segments = 0
        self._limit_bytes = limit_bytes
        self._expandable = expandable
        self._order = order
        self._small = _Pool(is_small=True)
        self._large = _Pool(is_small=False)

    def allocate(self, size_bytes: int) -> Block:
        """A block for `size_bytes`; it is counted as allocated in its whole size."""
        size = -(-size_bytes // MIN_BLOCK_BYTES) * MIN_BLOCK_BYTES or MIN_BLOCK_BYTES
        pool = self._small if size <= SMALL_REQUEST_BYTES else self._large
        index = bisect_left(pool.free, (size,))
        if self._expandable:
            index = self._avoid_end(pool, index)
        if index < len(pool.free):
            block = pool.free.pop(index)[2]
        else:
            block = self._grow(pool, size) if self._expandable else self._take_segment(pool, segment_size(size))
        remaining = block.size_bytes - size
        if remaining >= MIN_BLOCK_BYTES if pool.is_small or self._expandable else remaining > SMALL_REQUEST_BYTES:
            self._split(block, size)
        block.in_use = True
        self.allocated_bytes += block.size_bytes
        if self.allocated_bytes > self.peak_allocated_bytes:
            self.peak_allocated_bytes = self.allocated_bytes
        return block

    def free(self, block: Block) -> None:
        """Give a block back; it merges with its free neighbours."""
        assert block.in_use, "a block is freed once"
        block.in_use = False
        self.allocated_bytes -= block.size_bytes
        pool, before, after = block.pool, block.previous, block.next
        if before is not None and not before.in_use:
            pool.remove(before)
            _join(before, block)
            block = before
        if after is not None and not after.in_use:
            pool.remove(after)
            _join(block, after)
        pool.insert(block)

    def empty_cache(self) -> None:
        """Give unused segments back to the driver; of an expandable one the unused pages at its end."""
        for pool in (self._small, self._large):
            if self._expandable:
                self._unmap_end(pool)
                continue
            for _, _, block in list(pool.free):
                if block.previous is None and block.next is None:
                    pool.remove(block)
                    self.reserved_bytes -= block.size_bytes

    @staticmethod
    def _avoid_end(pool: _Pool, index: int) -> int:
        """The end of an expandable segment can grow, so it counts as the largest of those that fit."""
        more = index + 1 < len(pool.free)
        return index + 1 if more and pool.free[index][2] is pool.last else index

    def _split(self, block: Block, size: int) -> None:
        rest = Block(block.pool, block.address + size, block.size_bytes - size)
        rest.previous, rest.next = block, block.next
        if block.next is not None:
            block.next.previous = rest
        block.next = rest
        block.size_bytes = size
        if block.pool.last is block:
            block.pool.last = rest
        block.pool.insert(rest)

    def _make_room(self, length: int) -> None:
        """Give back what is unused where the driver has not `length` bytes more."""
        if self._limit_bytes is not None and self.reserved_bytes + length > self._limit_bytes:
            self.retries += 1
            self.empty_cache()

    def _reserve(self, length: int) -> None:
        self.reserved_bytes += length
        self.peak_reserved_bytes = max(self.peak_reserved_bytes, self.reserved_bytes)

    def _take_segment(self, pool: _Pool, length: int) -> Block:
        self._make_room(length)
        self._reserve(length)
        self.segments += 1
        return Block(pool, self._order(self.segments, length) * _SEGMENT_STRIDE, length)

    def _grow(self, pool: _Pool, size: int) -> Block:
        """Map pages at the end of a pool's expandable segment so that its last block holds `size`."""
        self.segments += 1
        self._make_room(_pages(pool, size))
        end = pool.last
        if end is not None and not end.in_use:
            length = _pages(pool, size - end.size_bytes)
            pool.remove(end)
            end.size_bytes += length
        else:
            length = _pages(pool, size)
            start = _SEGMENT_STRIDE if end is None else end.address + end.size_bytes
            block = Block(pool, start, length)
            if end is not None:
                end.next, block.previous = block, end
            pool.last = end = block
        self._reserve(length)
        return end

    def _unmap_end(self, pool: _Pool) -> None:
        """Whole pages at the end; pages inside the segment stay, since the next growth would map them again first."""
        end = pool.last
        if end is None or end.in_use:
            return
        page = _page_size(pool)
        length = end.size_bytes // page * page
        pool.remove(end)
        self.reserved_bytes -= length
        end.size_bytes -= length
        if end.size_bytes:
            pool.insert(end)
            return
        pool.last = end.previous
        if end.previous is not None:
            end.previous.next = None


def _join(block: Block, after: Block) -> None:
    """Merge a block with the one behind it."""
    block.size_bytes += after.size_bytes
    block.next = after.next
    if after.next is not None:
        after.next.previous = block
    if block.pool.last is after:
        block.pool.last = block


def _page_size(pool: _Pool) -> int:
    return SMALL_SEGMENT_BYTES if pool.is_small else LARGE_SEGMENT_BYTES


def _pages(pool: _Pool, size: int) -> int:
    """`size` bytes rounded up to whole pages of an expandable segment."""
    return -(-size // _page_size(pool)) * _page_size(pool)
