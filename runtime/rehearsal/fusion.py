"""Which results of a compiled graph one kernel makes, and the order in which its kernels run, as Inductor's scheduler
has it.

https://github.com/pytorch/pytorch/blob/main/torch/_inductor/scheduler.py
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations

from torch import Tensor, fx

FARTHEST = 64
"""Kernels between two that are fused for what both read, at most (are_long_distant_nodes)."""
MOST_FUSED = 64
"""Results of a kernel, at most (config.max_fusion_size)."""
FEWEST_BYTES = 10
"""That fusion has to spare (config.score_fusion_memory_threshold)."""
ROUNDS = 10
"""Of fusing pairs, at most (fuse_nodes)."""
NodeTest = Callable[[fx.Node], bool]


@dataclass(eq=False)
class Kernel:
    """What runs at once.

    results: that it writes, or the graph's output
    reads:   results of other kernels, and inputs of the graph, that it reads
    nodes:   to run, in the order of the graph: the results, and what they are computed from on the way
    first, last: places of its results in the order that the graph has
    elements: of its loop; None of what a library computes, which nothing is fused with
    reduced: elements of the results of a reduction, None of others
    dying:   what no later kernel touches
    """

    results: list[fx.Node]
    reads: set[fx.Node]
    nodes: list[fx.Node]
    first: int
    last: int
    elements: int | None
    reduced: int | None
    dying: list[fx.Node] = field(default_factory=list)


def schedule(nodes: Sequence[fx.Node], real: set[fx.Node], *, is_view: NodeTest, is_library: NodeTest) -> list[Kernel]:
    """The kernels of a graph in the order that they run, its output the last.

    real:       nodes whose results are in memory, those of libraries among them
    is_view:    whether a node computes nothing
    is_library: whether a library computes a node
    """
    places = {node: place for place, node in enumerate(nodes)}
    kernels = list[Kernel]()
    for node in nodes:
        if node.op == "output" or (node in real and node.op == "call_function"):
            on_the_way, reads = _trace_back(node, real)
            computed = [one for one in (*on_the_way, node) if one.op == "call_function" and not is_view(one)]
            elements, made = _count_elements(computed), _count_elements([node], inputs=False)
            is_fusible = node.op != "output" and not is_library(node)
            kernels.append(
                Kernel(
                    results=[node],
                    reads=reads,
                    nodes=sorted((*on_the_way, node), key=places.__getitem__),
                    first=len(kernels),
                    last=len(kernels),
                    elements=elements if is_fusible else None,
                    reduced=made if made < elements else None,
                )
            )
    for _ in range(ROUNDS):
        fused = _fuse_once(kernels, places)
        if len(fused) == len(kernels):
            break
        kernels = fused
    ordered = _sort(kernels)
    last = {node: kernel for kernel in ordered for node in (*kernel.reads, *kernel.nodes)}
    for node, kernel in last.items():
        kernel.dying.append(node)
    return ordered


def _trace_back(node: fx.Node, real: set[fx.Node]) -> tuple[set[fx.Node], set[fx.Node]]:
    """(nodes that are computed on the way to a node, constants among them; real ones and inputs that those read)."""
    on_the_way, reads = set[fx.Node](), set[fx.Node]()
    waiting = list(node.all_input_nodes)
    while waiting:
        one = waiting.pop()
        if one.op == "placeholder" or (one in real and one.op != "get_attr"):
            reads.add(one)
        elif one not in on_the_way:
            on_the_way.add(one)
            waiting.extend(one.all_input_nodes)
    return on_the_way, reads


def _count_elements(nodes: Iterable[fx.Node], *, inputs: bool = True) -> int:
    """Of the largest tensor that the nodes write or, unless told otherwise, read."""
    seen = [one for node in nodes for one in (node, *(node.all_input_nodes if inputs else ()))]
    return max((value.numel() for value in map(_value_of, seen) if value is not None), default=0)


def _value_of(node: fx.Node) -> Tensor | None:
    value = node.meta.get("val")
    return value if isinstance(value, Tensor) else None


def _fuse_once(kernels: Sequence[Kernel], places: dict[fx.Node, int]) -> list[Kernel]:
    """Each pair that may be fused, those that spare the most bytes first; what was fused counts in later pairs."""
    maker = _find_makers(kernels)
    fusible = [kernel for kernel in kernels if kernel.elements is not None]
    spared = {(a, b): _spare_bytes(a, b) for a, b in combinations(fusible, 2)}
    pairs = [pair for pair, size in spared.items() if size >= FEWEST_BYTES]
    for pair in sorted(pairs, key=lambda pair: (-spared[pair], abs(pair[0].first - pair[1].first))):
        a, b = (maker[kernel.results[0]] for kernel in pair)
        if a is not b and _may_fuse(a, b) and not _makes_cycle(a, b, maker):
            joined = _join(a, b, places)
            maker |= dict.fromkeys(joined.results, joined)
    return sorted(set(maker.values()), key=lambda kernel: kernel.first)


def _spare_bytes(a: Kernel, b: Kernel) -> int:
    """What both read, or one writes and the other reads."""
    common = (a.reads & b.reads) | (a.reads & set(b.results)) | (b.reads & set(a.results))
    return sum(value.nbytes for value in map(_value_of, common) if value is not None)


def _may_fuse(a: Kernel, b: Kernel) -> bool:
    if a.elements != b.elements or len(a.results) + len(b.results) > MOST_FUSED:
        return False
    if a.reduced is not None and b.reduced is not None and a.reduced != b.reduced:
        return False
    return max(abs(a.first - b.last), abs(b.first - a.last)) <= FARTHEST


def _makes_cycle(a: Kernel, b: Kernel, maker: dict[fx.Node, Kernel]) -> bool:
    """Whether a third kernel needs one of the two and is needed by the other."""

    def find_needed(kernel: Kernel) -> set[Kernel]:
        needed, waiting = set[Kernel](), [kernel]
        while waiting:
            for one in _list_needed(waiting.pop(), maker):
                if one not in needed:
                    needed.add(one)
                    waiting.append(one)
        return needed

    for one, other in ((a, b), (b, a)):
        if any(other in find_needed(third) for third in _list_needed(one, maker) if third is not other):
            return True
    return False


def _find_makers(kernels: Iterable[Kernel]) -> dict[fx.Node, Kernel]:
    return {node: kernel for kernel in kernels for node in kernel.results}


def _list_needed(kernel: Kernel, maker: dict[fx.Node, Kernel]) -> Iterator[Kernel]:
    for node in kernel.reads:
        if node in maker and maker[node] is not kernel:
            yield maker[node]


def _join(a: Kernel, b: Kernel, places: dict[fx.Node, int]) -> Kernel:
    results = sorted({*a.results, *b.results}, key=places.__getitem__)
    return replace(
        a,
        results=results,
        reads=(a.reads | b.reads) - set(results),
        nodes=sorted({*a.nodes, *b.nodes}, key=places.__getitem__),
        first=min(a.first, b.first),
        last=max(a.last, b.last),
        reduced=a.reduced if b.reduced is None else b.reduced,
        dying=[],
    )


def _sort(kernels: Sequence[Kernel]) -> list[Kernel]:
    """By the first result of each, and what a kernel needs before it (topological_sort_schedule)."""
    maker, ordered, seen = _find_makers(kernels), list[Kernel](), set[Kernel]()

    def visit(kernel: Kernel) -> None:
        if kernel not in seen:
            seen.add(kernel)
            for one in sorted(_list_needed(kernel, maker), key=lambda needed: needed.first):
                visit(one)
            ordered.append(kernel)

    for kernel in sorted(kernels, key=lambda one: one.first):
        visit(kernel)
    return ordered
