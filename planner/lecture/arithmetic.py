"""The lecture's arithmetic for one size, and what of the lecture's own figures is off.

Every figure but the lecture's own is computed: by count alone, from the catalog's architectures with the planner's
closed forms, or exactly in fractions.
"""

from __future__ import annotations

from collections.abc import Iterator
from difflib import get_close_matches
from typing import Literal

from pydantic import Field

from ...recipes.errors import ModelError
from ...recipes.units import format_count, parse_count
from ..catalog import CatalogModel, find_model, list_models
from ..shape import make_shape
from ..strategy import Value
from .adapters import (
    SIZES,
    RankColumn,
    Table3Model,
    make_lecture_columns,
    make_rank_column,
    make_table3,
)
from .memory import (
    AdapterAccount,
    Checkpoints,
    FullCost,
    Reference,
    estimate_full_costs,
    find_nearest_model,
    list_lengths,
    make_account,
    make_checkpoints,
    make_reference,
)
from .nf4 import Nf4Example, make_nf4_example
from .quantization import (
    ArrayExample,
    MatrixExample,
    make_array_example,
    make_matrix_example,
)

SHOWN_LENGTH = 2048
COMPARED_RANK = 16


class Correction(Value):
    """A figure of the lecture that is off.

    where:   its place in the lecture
    printed: as the lecture has it
    right:   what it should be, with the same digits or exactly
    why:     how that is computed
    """

    where: str
    printed: str
    right: str
    why: str


class Explanation(Value):
    """The lecture's arithmetic for one size; bytes and counts are whole numbers.

    size:        as asked for: a count such as 10B, or a model of the catalog
    parameters:  the count
    reference:   the real architecture behind accounts and checkpoints: the model itself, or the nearest to the count
    full:        full fine-tuning, the lecture's choice first
    accounts:    LoRA and QLoRA
    checkpoints: a checkpoint every sqrt(n) layers
    ranks:       trainable parameters by rank: the lecture's sizes, then this one if it is another
    table3:      GPT-2 medium and large
    """

    format_version: Literal[1] = 1
    size: str
    parameters: int = Field(ge=1)
    reference: Reference
    full: tuple[FullCost, ...]
    accounts: tuple[AdapterAccount, ...]
    checkpoints: Checkpoints
    ranks: tuple[RankColumn, ...]
    table3: tuple[Table3Model, ...]
    array: ArrayExample
    matrix: MatrixExample
    nf4: Nf4Example
    corrections: tuple[Correction, ...]


def make_explanation(size: str) -> Explanation:
    """Explain a count such as `10B` or a model of the catalog such as `gpt2-medium`; ModelError for anything else."""
    named = find_model(size)
    parameters = _parse_size(size) if named is None else named.parameters
    model = named or find_nearest_model(parameters)
    reference = make_reference(model, parameters)
    shape = make_shape(model.config)
    accounted = parameters if reference.near else reference.parameters
    ranks = (*make_lecture_columns(), *_make_own_column(size, parameters, named, reference))
    table3, array, matrix = make_table3(), make_array_example(), make_matrix_example()
    return Explanation(
        size=size.strip() if named is None else named.name,
        parameters=parameters,
        reference=reference,
        full=estimate_full_costs(parameters),
        accounts=(make_account(shape, "lora", accounted), make_account(shape, "qlora", accounted)),
        checkpoints=make_checkpoints(shape, max(length for length in list_lengths(shape) if length <= SHOWN_LENGTH)),
        ranks=ranks,
        table3=table3,
        array=array,
        matrix=matrix,
        nf4=make_nf4_example(sum(len(row) for row in matrix.weights)),
        corrections=(
            *_list_rank_corrections(ranks),
            *_list_table3_corrections(table3),
            *_list_array_corrections(array),
            *_list_matrix_corrections(matrix),
        ),
    )


def _parse_size(size: str) -> int:
    try:
        return parse_count(size)
    except ValueError as error:
        nearest = get_close_matches(size.strip().lower(), [model.name for model in list_models()], n=1)
        hint = f' (did you mean "{nearest[0]}"?)' if nearest else ""
        raise ModelError(f"{error}; nor is it a model of the catalog{hint}") from None


def _make_own_column(
    size: str, parameters: int, named: CatalogModel | None, reference: Reference
) -> tuple[RankColumn, ...]:
    """The asked size's column of the rank table, unless the lecture has it."""
    if named is not None:
        return (make_rank_column(named.name, parameters, named.name),)
    if parameters in [parse_count(known) for known, _ in SIZES]:
        return ()
    return (make_rank_column(size.strip(), parameters, reference.model if reference.near else None),)


def _list_rank_corrections(columns: tuple[RankColumn, ...]) -> Iterator[Correction]:
    for column in columns:
        for row in column.rows:
            if row.printed is not None and row.printed_right is not None and row.printed != row.printed_right:
                yield Correction(
                    where=f"trainable parameters, {column.size} at rank {row.rank:,}",
                    printed=row.printed,
                    right=row.printed_right,
                    why=f"2 r sqrt(P) = {row.formula:,}: cut off instead of rounded",
                )
    column = columns[0]
    row = next(row for row in column.rows if row.rank == COMPARED_RANK)
    assert row.printed and row.attention and row.all_linear and column.attention_targets, "the lecture's 7B has a model"
    yield Correction(
        where=f"trainable parameters, {column.size} at rank {row.rank:,}",
        printed=row.printed,
        right=f"{format_count(row.attention)} to {format_count(row.all_linear)}",
        why=f"2 r sqrt(P) takes the model for one square matrix, as the lecture says; {column.architecture} has "
        f"{row.attention:,} on {' and '.join(column.attention_targets)}, {row.all_linear:,} on every linear layer",
    )


def _list_table3_corrections(models: tuple[Table3Model, ...]) -> Iterator[Correction]:
    for model in models:
        if model.printed_parameters != model.parameters_right:
            yield Correction(
                where=f"Table 3, {model.model}, all parameters",
                printed=model.printed_parameters,
                right=model.parameters_right,
                why=f"{model.parameters:,}, counted layer by layer, tied embeddings once",
            )
        if model.printed_adapters != model.adapters_right:
            yield Correction(
                where=f"Table 3, {model.model}, LoRA of rank {model.rank}",
                printed=model.printed_adapters,
                right=model.adapters_right,
                why=f"{model.adapters_fused:,}; {model.printed_adapters} is "
                f"{100 * parse_count(model.printed_adapters) / model.parameters:.1f} % of the model's parameters",
            )


def _list_array_corrections(array: ArrayExample) -> Iterator[Correction]:
    if array.printed_scale != array.scale_right:
        yield Correction(
            where="int8 array, 127 / 10.2",
            printed=array.printed_scale,
            right=array.scale_right,
            why=f"{array.scale:.6f}: cut off instead of rounded",
        )
    for value in array.values:
        if value.printed != value.code:
            yield Correction(
                where=f"int8 array, {value.value:g}",
                printed=str(value.printed),
                right=str(value.code),
                why=f"{array.scale:.4f} x {value.value:g} = {value.scaled:.2f}: cut off instead of rounded",
            )


def _list_matrix_corrections(matrix: MatrixExample) -> Iterator[Correction]:
    for where, codes in (("with one constant", matrix.whole), ("by rows", matrix.blocks)):
        cells = sum(len(row) for row in codes.codes)
        if codes.off:
            yield Correction(
                where=f"5x5 matrix, int8 {where}",
                printed=f"{codes.off} of {cells} cells",
                right="the matrix above",
                why=f"round(c W); at most {codes.off - codes.unexplained} can come from weights printed to one decimal",
            )
    if abs(matrix.printed_reduction - matrix.reduction_percent) >= 1:
        before, after = matrix.storages[0].total_bytes, matrix.storages[3].total_bytes
        yield Correction(
            where="5x5 matrix, memory saved",
            printed=f"{matrix.printed_reduction} %",
            right=f"{matrix.reduction_percent:.0f} %",
            why=f"1 - {after} / {before}",
        )
