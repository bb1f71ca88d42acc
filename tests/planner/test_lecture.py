"""The lecture's arithmetic: figures that can be worked out by hand, exact counts, and agreement with the planner's."""

from __future__ import annotations

from fractions import Fraction
from math import sqrt

import pytest
from bitsandbytes.functional import get_4bit_type
from hypothesis import given, settings
from hypothesis import strategies as st

from fitune.planner.arithmetic import (
    estimate_gradient_bytes,
    estimate_nf4_bytes,
    estimate_optimizer_bytes,
    estimate_weight_bytes,
)
from fitune.planner.catalog import CatalogModel, find_model, list_models
from fitune.planner.lecture.adapters import count_square_adapter, format_as_printed
from fitune.planner.lecture.arithmetic import Explanation, make_explanation
from fitune.planner.lecture.memory import LargestBatch, estimate_full_cost, find_nearest_model
from fitune.planner.lecture.nf4 import make_nf4_levels
from fitune.planner.lecture.quantization import make_codes, make_scale
from fitune.planner.shape import ModelShape, make_shape
from fitune.planner.strategy import Dtype, Optimizer, Strategy
from fitune.recipes.errors import ModelError

GB = 10**9


@pytest.fixture(scope="module")
def ten_billion() -> Explanation:
    return make_explanation("10B")


def find_shape(name: str) -> ModelShape:
    model = find_model(name)
    assert model is not None
    return make_shape(model.config)


def make_full_strategy(weights_dtype: Dtype, optimizer: Optimizer) -> Strategy:
    return Strategy(
        method="full",
        weights_dtype=weights_dtype,
        compute_dtype="bf16",
        micro_batch_size=1,
        gradient_accumulation_steps=1,
        checkpointed_layers=99,
        loss_head="full",
        optimizer=optimizer,
        learning_rate=2e-5,
    )


def estimate_step_state(shape: ModelShape, weights_dtype: Dtype, optimizer: Optimizer) -> int:
    strategy = make_full_strategy(weights_dtype, optimizer)
    fixed = estimate_weight_bytes(shape, strategy) + estimate_gradient_bytes(shape, strategy)
    return fixed + sum(estimate_optimizer_bytes(shape, strategy))


def test_ten_billion_parameters_are_20_and_20_and_80_gb(ten_billion: Explanation) -> None:
    first = ten_billion.full[0]
    assert (first.weights_bytes, first.gradient_bytes, first.optimizer_bytes) == (20 * GB, 20 * GB, 80 * GB)
    assert first.total_bytes == 120 * GB
    assert (first.weights_dtype, first.optimizer) == ("bf16", "adamw_32bit")


def test_other_dtypes_and_optimizers_stand_beside_it(ten_billion: Explanation) -> None:
    totals = {(cost.weights_dtype, cost.optimizer): cost.total_bytes for cost in ten_billion.full}
    assert totals["bf16", "adamw"] == (20 + 20 + 40) * GB
    assert totals["fp32", "adamw"] == 16 * 10 * GB
    assert totals["bf16", "adamw_8bit"] == 40 * GB + 2 * 10 * GB + 2 * 4 * 10 * GB // 256


@pytest.mark.parametrize("model", list_models(), ids=lambda model: model.name)
def test_the_planner_and_the_lecture_count_the_same_12_bytes_a_parameter(model: CatalogModel) -> None:
    shape = make_shape(model.config)
    counted = estimate_step_state(shape, "bf16", "adamw_32bit")
    assert counted == 12 * shape.parameters
    assert counted == estimate_full_cost(shape.parameters, "bf16", "adamw_32bit").total_bytes


@pytest.mark.parametrize("choice", [("bf16", "adamw"), ("fp32", "adamw"), ("fp32", "adamw_32bit")])
def test_they_agree_wherever_states_do_not_depend_on_a_tensors_size(choice: tuple[Dtype, Optimizer]) -> None:
    shape = find_shape("falcon3-10b-base")
    assert estimate_step_state(shape, *choice) == estimate_full_cost(shape.parameters, *choice).total_bytes


def test_8_bit_states_differ_only_by_small_tensors_that_stay_in_32_bits() -> None:
    shape = find_shape("falcon3-10b-base")
    by_tensor = estimate_step_state(shape, "bf16", "adamw_8bit")
    by_count = estimate_full_cost(shape.parameters, "bf16", "adamw_8bit").total_bytes
    assert by_count <= by_tensor <= 1.001 * by_count


def test_a_count_is_explained_with_the_nearest_dense_architecture(ten_billion: Explanation) -> None:
    assert ten_billion.reference.model == "falcon3-10b-base"
    assert ten_billion.reference.parameters == find_shape("falcon3-10b-base").parameters
    assert ten_billion.reference.near


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 10**12))
def test_no_dense_model_of_the_catalog_is_nearer_than_the_nearest(parameters: int) -> None:
    nearest = find_nearest_model(parameters)
    dense = [model for model in list_models() if make_shape(model.config).experts is None]
    assert abs(nearest.parameters - parameters) == min(abs(model.parameters - parameters) for model in dense)


def test_a_model_of_the_catalog_is_explained_with_itself() -> None:
    explanation = make_explanation("GPT2-Medium")
    assert (explanation.size, explanation.parameters) == ("gpt2-medium", 354_823_168)
    assert explanation.reference.model == "gpt2-medium"
    assert max(batch.sequence_length for batch in explanation.accounts[0].batches) == 1024


def test_a_size_without_a_near_architecture_is_accounted_for_on_the_nearest_one() -> None:
    explanation = make_explanation("180B")
    assert not explanation.reference.near
    assert explanation.full[0].total_bytes == 12 * 180 * GB
    assert explanation.accounts[0].budget_bytes == 4 * explanation.reference.parameters


@pytest.mark.parametrize("size", ["10X", "", "1.5", "0", "gtp2-medium", "0.5K B"])
def test_what_is_neither_a_count_nor_a_model_is_refused(size: str) -> None:
    with pytest.raises(ModelError, match="nor is it a model of the catalog"):
        make_explanation(size)


def test_a_misspelt_model_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(ModelError, match='did you mean "gpt2-medium"'):
        make_explanation("gtp2-medium")


@settings(max_examples=10, deadline=None)
@given(st.integers(1, 10**15))
def test_any_count_can_be_explained(parameters: int) -> None:
    explanation = make_explanation(str(parameters))
    assert explanation.full[0].total_bytes == 12 * parameters


def test_loras_fixed_part_of_the_40_gb_is_20_6_gb_of_weights_and_12_bytes_an_adapter_parameter(
    ten_billion: Explanation,
) -> None:
    lora = ten_billion.accounts[0]
    assert lora.weights_bytes == 2 * 10_305_653_760
    assert lora.adapter_bytes + lora.gradient_bytes + lora.optimizer_bytes == 12 * lora.trainable
    assert lora.fixed_bytes + lora.rest_bytes == lora.budget_bytes == 40 * GB
    assert lora.trainable == find_shape("falcon3-10b-base").lora_parameters(16)


def test_qlora_differs_from_lora_only_by_weights_in_nf4(ten_billion: Explanation) -> None:
    lora, qlora = ten_billion.accounts
    shape = find_shape("falcon3-10b-base")
    assert qlora.trainable == lora.trainable
    saved = lora.fixed_bytes - qlora.fixed_bytes
    assert saved == lora.weights_bytes - qlora.weights_bytes
    assert saved == pytest.approx((2 - 0.515869) * shape.quantized_parameters, rel=1e-4)


def test_the_batches_shown_fill_the_budget_and_never_exceed_it(ten_billion: Explanation) -> None:
    for account in ten_billion.accounts:
        for batch in account.batches:
            if batch.micro_batch_size == 0:
                assert batch.peak_bytes > account.budget_bytes
                continue
            assert account.weights_bytes < batch.peak_bytes <= account.budget_bytes
            a_row = (batch.peak_bytes - account.weights_bytes) / batch.micro_batch_size
            assert batch.peak_bytes + 1.1 * a_row > account.budget_bytes


def test_checkpointing_makes_room_for_more_rows(ten_billion: Explanation) -> None:
    def rows(batches: tuple[LargestBatch, ...], checkpointing: bool) -> dict[int, int]:
        return {b.sequence_length: b.micro_batch_size for b in batches if b.gradient_checkpointing is checkpointing}

    for account in ten_billion.accounts:
        kept, checkpointed = rows(account.batches, False), rows(account.batches, True)
        assert all(checkpointed[length] > kept[length] for length in kept)


def test_checkpoints_every_sqrt_n_layers_keep_a_checkpoint_a_segment_and_one_segment(ten_billion: Explanation) -> None:
    rule = ten_billion.checkpoints
    assert (rule.layers, rule.segment_layers, rule.checkpoints) == (40, 6, 7)
    assert rule.sqrt_bytes == 7 * rule.checkpoint_bytes + 6 * rule.layer_bytes
    assert rule.every_bytes < rule.sqrt_bytes < rule.none_bytes


LECTURE_IS_RIGHT = [
    ("7B", 1, "167K"),
    ("13B", 2, "456K"),
    ("180B", 8, "7M"),
    ("70B", 16, "8M"),
    ("180B", 512, "434M"),
    ("7B", 1024, "171M"),
    ("70B", 8192, "4.3B"),
]
LECTURE_IS_OFF = {
    ("7B", 2): ("334K", "335K"),
    ("13B", 1024): ("233M", "234M"),
    ("13B", 8192): ("1.8B", "1.9B"),
    ("70B", 512): ("270M", "271M"),
}


@pytest.mark.parametrize(("size", "rank", "printed"), LECTURE_IS_RIGHT)
def test_the_formula_gives_the_lectures_figure(ten_billion: Explanation, size: str, rank: int, printed: str) -> None:
    column = next(column for column in ten_billion.ranks if column.size == size)
    row = next(row for row in column.rows if row.rank == rank)
    assert row.printed == row.printed_right == printed


def test_four_cells_of_the_rank_table_are_cut_off_instead_of_rounded(ten_billion: Explanation) -> None:
    off = {
        (column.size, row.rank): (row.printed, row.printed_right)
        for column in ten_billion.ranks
        for row in column.rows
        if row.printed != row.printed_right
    }
    assert off == LECTURE_IS_OFF


@given(parameters=st.integers(1, 10**13), rank=st.integers(1, 8192))
def test_the_formula_is_2_r_sqrt_p_to_the_nearest_whole_number(parameters: int, rank: int) -> None:
    count = count_square_adapter(parameters, rank)
    assert count == pytest.approx(2 * rank * sqrt(parameters), abs=0.51, rel=1e-12)


@given(side=st.integers(1, 10**6), rank=st.integers(1, 8192))
def test_the_formula_is_exact_for_a_square_matrix(side: int, rank: int) -> None:
    assert count_square_adapter(side * side, rank) == rank * (side + side)


@pytest.mark.parametrize(
    ("value", "printed", "right"),
    [
        (334_664, "334K", "335K"),
        (354_823_168, "354.92M", "354.82M"),
        (1_868_063_416, "1.8B", "1.9B"),
        (6_951_142_502, "7B", "7B"),
        (393_216, "0.35M", "0.39M"),
        (1_999_999_999, "1.9B", "2.0B"),
    ],
)
def test_a_count_is_written_with_the_lectures_unit_and_decimals(value: int, printed: str, right: str) -> None:
    assert format_as_printed(value, printed) == right


def test_llama_2_7b_has_its_exact_counts_beside_the_formula(ten_billion: Explanation) -> None:
    column = ten_billion.ranks[0]
    row = next(row for row in column.rows if row.rank == 16)
    each_layer = 4 * (4096 + 4096) + 3 * (4096 + 11008)
    assert (column.architecture, column.exact_parameters) == ("llama-2-7b", 6_738_415_616)
    assert row.all_linear == 16 * 32 * each_layer == 39_976_960
    assert row.attention == 16 * 32 * 2 * (4096 + 4096) == 8_388_608


def test_grouped_query_attention_makes_the_value_adapter_of_70b_smaller(ten_billion: Explanation) -> None:
    row = ten_billion.ranks[2].rows[0]
    assert row.attention == 80 * ((8192 + 8192) + (8192 + 1024))


def test_there_is_no_architecture_of_180b(ten_billion: Explanation) -> None:
    column = ten_billion.ranks[3]
    assert column.size == "180B"
    assert column.architecture is None and column.exact_parameters is None
    assert all(row.all_linear is None and row.attention is None for row in column.rows)


def test_the_asked_size_gets_its_own_column_unless_the_lecture_has_it(ten_billion: Explanation) -> None:
    assert [column.size for column in ten_billion.ranks] == ["7B", "13B", "70B", "180B", "10B"]
    assert [column.size for column in make_explanation("13b").ranks] == ["7B", "13B", "70B", "180B"]


def test_adapters_reach_the_size_of_what_they_adapt_at_the_break_even_rank(ten_billion: Explanation) -> None:
    for column in ten_billion.ranks:
        if column.architecture and column.break_even_rank:
            shape = find_shape(column.architecture)
            below, at = (shape.lora_parameters(column.break_even_rank - back) for back in (1, 0))
            assert below < shape.quantized_parameters <= at


def test_gpt2_medium_and_large_are_counted_right(ten_billion: Explanation) -> None:
    medium, large = ten_billion.table3
    assert (medium.parameters, medium.parameters_right) == (354_823_168, "354.82M")
    assert (large.parameters, large.parameters_right) == (774_030_080, "774.03M")
    assert (medium.adapters_fused, large.adapters_fused) == (393_216, 737_280)
    assert (medium.adapters_right, large.adapters_right) == ("0.39M", "0.74M")


def test_peft_on_c_attn_and_the_paper_on_w_q_and_w_v_count_the_same(ten_billion: Explanation) -> None:
    for model in ten_billion.table3:
        assert model.adapters_fused == model.adapters_split


def test_table_3_is_right_about_the_top_two_layers(ten_billion: Explanation) -> None:
    medium = ten_billion.table3[0]
    assert medium.top2 == 2 * (12 * 1024**2 + 13 * 1024)
    assert medium.printed_top2 == medium.top2_right == "25.19M"


def test_the_array_in_int8_differs_from_the_lectures_in_two_values(ten_billion: Explanation) -> None:
    array = ten_billion.array
    assert [value.code for value in array.values] == [19, 29, 46, 51, 70, 85, 98, 105, 115, 127]
    assert [value.value for value in array.values if value.code != value.printed] == [1.5, 5.6]
    assert array.scale == pytest.approx(127 / 10.2, rel=1e-15)
    assert array.scale_right == "12.4510"


def test_dequantised_values_are_within_half_a_step(ten_billion: Explanation) -> None:
    array = ten_billion.array
    for value in array.values:
        assert value.dequantized == pytest.approx(value.code * 10.2 / 127)
        assert value.error == pytest.approx(value.dequantized - value.value, abs=1e-12)
    assert 0 < array.largest_error <= 10.2 / 254


FRACTIONS = st.fractions(-100, 100, max_denominator=1000)


@given(st.lists(FRACTIONS, min_size=1, max_size=40).filter(any))
def test_absmax_int8_uses_127_and_loses_at_most_half_a_step(values: list[Fraction]) -> None:
    scale = make_scale(values)
    codes = make_codes(values, scale)
    assert max(map(abs, codes)) == 127
    assert all(abs(code / scale - value) <= 1 / (2 * scale) for code, value in zip(codes, values, strict=True))


def test_the_matrix_in_int8_is_rounded_from_the_weights_shown(ten_billion: Explanation) -> None:
    matrix = ten_billion.matrix
    assert matrix.whole.codes[0] == (-40, -17, 0, -23, 17)
    assert matrix.whole.codes[4] == (23, 6, -81, 127, -64)
    assert matrix.blocks.codes[0] == (-127, -54, 0, -73, 54)
    assert matrix.blocks.codes[1] == (-75, 15, 52, 127, -67)
    assert matrix.whole.scales == pytest.approx([127 / 2.2])
    assert matrix.blocks.scales == pytest.approx([127 / 0.7, 127 / 1.7, 127 / 1.5, 127 / 1.7, 127 / 2.2])


def test_the_lectures_matrices_are_off_in_20_and_14_cells(ten_billion: Explanation) -> None:
    matrix = ten_billion.matrix
    for codes, off in ((matrix.whole, 20), (matrix.blocks, 14)):
        pairs = zip(sum(codes.codes, ()), sum(codes.printed, ()), strict=True)
        assert codes.off == sum(code != printed for code, printed in pairs) == off
        assert 0 < codes.unexplained < codes.off


def test_double_quantisation_takes_the_matrix_from_100_to_34_bytes(ten_billion: Explanation) -> None:
    sizes = {s.name: (s.weight_bytes, s.constant_bytes, s.total_bytes) for s in ten_billion.matrix.storages}
    assert sizes["fp32"] == (100, 0, 100)
    assert sizes["int8, one fp32 constant"] == (25, 4, 29)
    assert sizes["int8 by rows, 5 fp32 constants"] == (25, 20, 45)
    assert sizes["int8 by rows, constants in int8"] == (25, 5 + 4, 34)
    assert ten_billion.matrix.reduction_percent == 66


def test_the_constants_are_quantised_as_the_weights_were(ten_billion: Explanation) -> None:
    matrix = ten_billion.matrix
    assert matrix.constant_codes == tuple(round(0.7 * scale) for scale in matrix.blocks.scales)
    assert matrix.second_scale == pytest.approx(0.7)


def test_a_constant_a_row_loses_less_than_one_and_quantised_constants_more(ten_billion: Explanation) -> None:
    errors = [storage.mean_error for storage in ten_billion.matrix.storages]
    assert errors[0] == 0
    assert errors[2] < errors[1] < errors[3] < errors[4]


def test_the_nf4_levels_are_bitsandbytes_own() -> None:
    table = get_4bit_type("nf4", device="cpu").tolist()
    assert make_nf4_levels() == pytest.approx(table, abs=1e-6)


def test_nf4_has_16_levels_from_minus_1_to_1_with_zero_and_15_edges_between_them(ten_billion: Explanation) -> None:
    levels, edges = ten_billion.nf4.levels, ten_billion.nf4.edges
    assert len(levels) == 16 and levels[0] == -1 and levels[7] == 0 and levels[-1] == 1
    assert len(edges) == 15
    assert all(low < edge < high for low, edge, high in zip(levels, edges, levels[1:], strict=False))


@pytest.mark.parametrize("double_quantization", [False, True])
def test_nf4s_bytes_a_parameter_are_those_of_a_large_weight(
    ten_billion: Explanation, double_quantization: bool
) -> None:
    nf4 = ten_billion.nf4
    each = nf4.double_bytes_per_parameter if double_quantization else nf4.plain_bytes_per_parameter
    assert round(each, 4) == (0.5159 if double_quantization else 0.5625)
    size = estimate_nf4_bytes(8192 * 8192, double_quantization=double_quantization)
    assert size / 8192**2 == pytest.approx(each, rel=1e-4)


def test_every_figure_that_is_off_is_corrected(ten_billion: Explanation) -> None:
    corrected = {(correction.printed, correction.right) for correction in ten_billion.corrections}
    assert set(LECTURE_IS_OFF.values()) <= corrected
    expected = {
        ("354.92M", "354.82M"),
        ("0.35M", "0.39M"),
        ("0.77M", "0.74M"),
        ("12.4509", "12.4510"),
        ("18", "19"),
        ("69", "70"),
        ("70 %", "66 %"),
        ("20 of 25 cells", "the matrix above"),
        ("14 of 25 cells", "the matrix above"),
        ("3M", "8.4M to 40.0M"),
    }
    assert expected <= corrected
    assert len(ten_billion.corrections) == len(expected) + len(LECTURE_IS_OFF)


def test_no_correction_repeats_what_the_lecture_prints(ten_billion: Explanation) -> None:
    assert all(correction.printed != correction.right for correction in ten_billion.corrections)
