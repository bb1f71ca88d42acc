"""The lecture's trainable-parameter table and its Table 3, beside exact counts for real architectures."""

from __future__ import annotations

import re
from decimal import Decimal
from fractions import Fraction
from math import ceil, isqrt

from pydantic import Field

from ...recipes.units import parse_count
from ..catalog import find_model
from ..shape import ModelShape, make_shape
from ..strategy import Value

SIZES: tuple[tuple[str, str | None], ...] = (
    ("7B", "llama-2-7b"),
    ("13B", "llama-2-13b"),
    ("70B", "llama-2-70b"),
    ("180B", None),
)
"""The lecture's sizes, each with an architecture of the catalog; it has none of 180B."""
PRINTED: dict[int, tuple[str, str, str, str]] = {
    1: ("167K", "228K", "529K", "849K"),
    2: ("334K", "456K", "1M", "2M"),
    8: ("1M", "2M", "4M", "7M"),
    16: ("3M", "4M", "8M", "14M"),
    512: ("86M", "117M", "270M", "434M"),
    1024: ("171M", "233M", "542M", "869M"),
    8192: ("1.4B", "1.8B", "4.3B", "7B"),
}
"""Trainable parameters by rank as the lecture prints them, in the order of SIZES."""
TABLE3_RANK = 4
TABLE3: tuple[tuple[str, str, str, str | None], ...] = (
    ("gpt2-medium", "354.92M", "0.35M", "25.19M"),
    ("gpt2-large", "774.03M", "0.77M", None),
)
"""Model, and as Table 3 prints them: all parameters, LoRA's, those of the top two layers."""
ATTENTION_TARGETS = (("q_proj", "v_proj"), ("c_attn",), ("qkv_proj",), ("query_key_value",))
"""What the LoRA paper adapts, queries and values, by the names that architectures have for it; fused ones whole."""
_UNITS = {"K": 10**3, "M": 10**6, "B": 10**9}


class RankRow(Value):
    """Trainable parameters at one rank.

    formula:        2 * rank * sqrt(parameters)
    printed:        as the lecture prints it, None for a size that it does not have
    printed_right:  the formula's value with as many digits
    all_linear:     exact count with an adapter on every linear layer but the LM head; None without an architecture
    attention:      exact count with adapters on queries and values alone
    """

    rank: int = Field(ge=1)
    formula: int = Field(ge=1)
    printed: str | None
    printed_right: str | None
    all_linear: int | None
    attention: int | None


class RankColumn(Value):
    """One size of the trainable-parameter table.

    size:              as asked for, such as 7B
    parameters:        the count that the formula is given
    architecture:      the catalog's model beside it, None where there is none of that size
    exact_parameters:  its count: the table's row `Full`
    attention_targets: its modules that make queries and values
    break_even_rank:   where its all-linear adapters reach the size of the layers that they adapt
    """

    size: str
    parameters: int = Field(ge=1)
    architecture: str | None
    exact_parameters: int | None
    attention_targets: tuple[str, ...] | None
    break_even_rank: int | None
    rows: tuple[RankRow, ...]


class Table3Model(Value):
    """A model of the lecture's Table 3 (E2E NLG challenge), printed and counted.

    parameters:       all of them, tied weights once
    adapters_fused:   LoRA of rank 4 on `c_attn` as peft makes it: rank * (hidden + 3 hidden) a layer
    adapters_split:   LoRA of rank 4 on W_q and W_v as in the paper: 2 matrices * rank * (hidden + hidden) a layer
    adapters_right:   adapters_fused with the printed digits
    top2:             the last two layers
    """

    model: str
    rank: int = Field(ge=1)
    printed_parameters: str
    parameters: int = Field(ge=1)
    parameters_right: str
    printed_adapters: str
    adapters_fused: int = Field(ge=1)
    adapters_split: int = Field(ge=1)
    adapters_right: str
    printed_top2: str | None
    top2: int = Field(ge=1)
    top2_right: str | None


def count_square_adapter(parameters: int, rank: int) -> int:
    """The lecture's count: one square matrix of all parameters, sqrt(P) x sqrt(P), B and A: 2 r sqrt(P)."""
    return (isqrt(4 * (2 * rank) ** 2 * parameters) + 1) // 2


def format_as_printed(value: int, printed: str) -> str:
    """`value` with the unit and the decimals of `printed`: (233_508_000, "233M") -> "234M"."""
    match = re.fullmatch(r"[0-9]+(?:\.([0-9]+))?([KMB])", printed)
    assert match is not None, f"{printed} is a count as the lecture prints it"
    decimals, unit = len(match[1] or ""), match[2]
    return f"{Decimal(round(Fraction(value * 10**decimals, _UNITS[unit]))).scaleb(-decimals)}{unit}"


def make_lecture_columns() -> tuple[RankColumn, ...]:
    """The lecture's four sizes."""
    return tuple(
        make_rank_column(size, parse_count(size), architecture, {rank: row[place] for rank, row in PRINTED.items()})
        for place, (size, architecture) in enumerate(SIZES)
    )


def make_rank_column(
    size: str, parameters: int, architecture: str | None, printed: dict[int, str] | None = None
) -> RankColumn:
    """One size at the lecture's ranks; `printed` has the lecture's own figures by rank."""
    shape = None if architecture is None else load_shape(architecture)
    targets = None if shape is None else find_attention_targets(shape)
    return RankColumn(
        size=size,
        parameters=parameters,
        architecture=architecture,
        exact_parameters=None if shape is None else shape.parameters,
        attention_targets=targets,
        break_even_rank=None if shape is None else ceil(shape.quantized_parameters / shape.lora_parameters(1)),
        rows=tuple(_make_row(parameters, rank, shape, targets, (printed or {}).get(rank)) for rank in PRINTED),
    )


def _make_row(
    parameters: int, rank: int, shape: ModelShape | None, targets: tuple[str, ...] | None, printed: str | None
) -> RankRow:
    formula = count_square_adapter(parameters, rank)
    return RankRow(
        rank=rank,
        formula=formula,
        printed=printed,
        printed_right=None if printed is None else format_as_printed(formula, printed),
        all_linear=None if shape is None else shape.lora_parameters(rank),
        attention=None if shape is None or targets is None else shape.lora_parameters(rank, targets),
    )


def find_attention_targets(shape: ModelShape) -> tuple[str, ...] | None:
    """The modules that make this architecture's queries and values; None where they go by no known name."""
    names = {linear.name for linear, _ in shape.linears}
    return next((targets for targets in ATTENTION_TARGETS if names.issuperset(targets)), None)


def load_shape(name: str) -> ModelShape:
    """The shape of a model of the catalog."""
    model = find_model(name)
    assert model is not None, f"{name} is in the catalog"
    return make_shape(model.config)


def make_table3() -> tuple[Table3Model, ...]:
    return tuple(_make_table3_model(*row) for row in TABLE3)


def _make_table3_model(name: str, parameters: str, adapters: str, top2: str | None) -> Table3Model:
    shape = load_shape(name)
    fused = shape.lora_parameters(TABLE3_RANK, "c_attn")
    last_two = 2 * shape.blocks[0].parameters
    return Table3Model(
        model=name,
        rank=TABLE3_RANK,
        printed_parameters=parameters,
        parameters=shape.parameters,
        parameters_right=format_as_printed(shape.parameters, parameters),
        printed_adapters=adapters,
        adapters_fused=fused,
        adapters_split=2 * TABLE3_RANK * (shape.hidden_size + shape.hidden_size) * shape.layers,
        adapters_right=format_as_printed(fused, adapters),
        printed_top2=top2,
        top2=last_two,
        top2_right=None if top2 is None else format_as_printed(last_two, top2),
    )
