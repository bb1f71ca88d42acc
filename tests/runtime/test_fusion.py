"""Which results of a compiled graph are made together, and when, as Inductor's scheduler decides it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from fitune.runtime.rehearsal.fusion import Kernel, schedule

WIDE = torch.zeros(64, 64)
PRODUCT = torch.ops.aten.mm.default


def schedule_function(function: Callable[..., Any], *inputs: Tensor) -> list[Kernel]:
    """In memory are products, what they read, and what the function returns."""
    graph = make_fx(function, tracing_mode="fake", _allow_non_fake_inputs=True)(*inputs).graph
    nodes = list(graph.nodes)
    real = {node for node in nodes if node.target == PRODUCT}
    for node in nodes:
        if node in real or node.op == "output":
            real = real.union(node.all_input_nodes)
    return schedule(
        nodes, real, is_view=lambda node: "slice" in node.name, is_library=lambda node: node.target == PRODUCT
    )


def name_results(kernels: list[Kernel]) -> list[list[str]]:
    return [[str(node.target).split(".")[1] for node in kernel.results] for kernel in kernels if kernel.elements]


def test_results_that_read_the_same_are_made_by_one_kernel() -> None:
    def function(given: Tensor) -> tuple[Tensor, Tensor]:
        return given.sin(), given.cos()

    assert name_results(schedule_function(function, WIDE)) == [["sin", "cos"]]


def test_results_of_other_sizes_or_that_share_nothing_are_made_apart() -> None:
    def function(one: Tensor, other: Tensor) -> tuple[Tensor, ...]:
        return one.sin(), one[:32].cos(), other.tan()

    assert sorted(name_results(schedule_function(function, WIDE, WIDE.clone()))) == [["cos"], ["sin"], ["tan"]]


def test_a_result_that_is_needed_for_a_product_that_another_needs_is_made_before_it() -> None:
    def function(given: Tensor) -> Tensor:
        return given.cos() + torch.mm(given.sin(), given)

    before, product, after, output = schedule_function(function, WIDE)
    assert [node.name for node in before.results] == ["sin"]
    assert product.elements is None and [node.name for node in after.results] == ["add"]
    assert [node.name for node in after.nodes] == ["cos", "add"], "what is not in memory is computed on the way"
    assert [node.op for node in output.results] == ["output"]


def test_what_a_kernel_needs_for_its_later_results_comes_before_its_first() -> None:
    """As where a checkpointed layer is computed again: activations wait for the products of gradients."""

    def function(given: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        gate = torch.mm(given, weight)
        kept = torch.mm(gate.sigmoid(), weight)
        return kept, torch.mm(given, kept), gate * torch.mm(weight, weight)

    kernels = schedule_function(function, WIDE, WIDE.clone())
    fused = next(kernel for kernel in kernels if [node.name for node in kernel.results] == ["sigmoid", "mul"])
    products = [kernel.results[0].name for kernel in kernels[: kernels.index(fused)]]
    assert products == ["mm", "mm_3"], "the second is moved forward"


def test_a_constant_is_made_by_the_kernel_that_reads_it() -> None:
    constant = torch.ones(64, 64)

    def function(given: Tensor) -> Tensor:
        return torch.mm(given, constant)

    product, _ = schedule_function(function, WIDE)
    assert [node.op for node in product.nodes] == ["get_attr", "call_function"]


operand = st.integers(0, 20)
operations = st.lists(st.tuples(st.sampled_from(["mm", "add", "sum"]), operand, operand), min_size=1)


@given(operations)
def test_every_result_is_made_once_after_what_it_reads_and_dies_after_its_last_reader(
    drawn: list[tuple[str, int, int]],
) -> None:
    def function(given: Tensor) -> tuple[Tensor, ...]:
        made = [given]
        for name, first, second in drawn:
            left, right = made[first % len(made)], made[second % len(made)]
            made.append({"mm": torch.mm, "add": torch.add, "sum": lambda a, b: a + b.sum(0)}[name](left, right))
        return tuple(made[1:][-2:])

    kernels = schedule_function(function, torch.zeros(8, 8))
    known: set[fx.Node] = {node for node in next(iter(kernels)).nodes[0].graph.nodes if node.op == "placeholder"}
    dead: set[fx.Node] = set()
    for kernel in kernels:
        assert kernel.reads <= known and not kernel.reads & dead
        assert not known & set(kernel.results)
        for node in kernel.nodes:
            assert set(node.all_input_nodes) <= known.union(kernel.nodes[: kernel.nodes.index(node)])
            assert not set(node.all_input_nodes) & dead
        known |= set(kernel.nodes)
        dead |= set(kernel.dying)
    assert kernels[-1].results[0].op == "output"
    assert dead == {node for kernel in kernels for node in (*kernel.reads, *kernel.nodes)}
