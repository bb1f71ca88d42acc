"""The rehearsal of compiled layers, Liger's kernels and the fused head beside steps that were measured with them on one
H100."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from test_rehearsal import LLAMA, list_sizes, make_strategy, predict, trace

from fitune.runtime.rehearsal.accuracy import compare, load_rows, make_device

DATA = Path(__file__).parents[1] / "data"
LEVERS = list(load_rows(DATA / "h100_speed_levers.jsonl", DATA / "architectures.json"))
ROWS = [(row, config) for row, config in LEVERS if row["compile_layers"] and not row.get("compile_whole_model")]
LIGER_ROWS = [(row, config) for row, config in LEVERS if row["liger_layers"]]
KEPT_WEIGHTS = "llama-3.1-8b-qlora-adamw_torch_fused-b2s4096-ckpt-chunked-compile"
"""The measured step kept dequantised weights in backward; fitune's does not."""
QUICK = ("llama-3.2-1b", "llama-3.1-8b-lora-variant-flce", "llama-3.1-8b-lora-adamw_torch_fused-b2s4096-ckpt-chunked")


def list_rows() -> list[Any]:
    return [
        pytest.param(row, config, id=row["id"], marks=[] if row["id"].startswith(QUICK) else [pytest.mark.slow])
        for row, config in ROWS
        if row["id"] != KEPT_WEIGHTS and row.get("sdpa_backend") is None
    ]


@pytest.mark.parametrize(("row", "config"), list_rows())
def test_a_compiled_step_is_met_within_its_margin(row: dict[str, Any], config: dict[str, Any]) -> None:
    """Checkpointed ones were up to 3.5 % too low until what one kernel makes was there together."""
    one = compare(row, config, make_device())
    assert abs(one.error("allocated")) < 0.001
    assert abs(one.error("reserved")) < 0.02
    assert one.predicted.required_bytes > row["measured"]["peak_nvml_bytes"]


@pytest.mark.skipif(not find_spec("triton") or not find_spec("liger_kernel"), reason="needs fitune[liger]")
@pytest.mark.parametrize(("row", "config"), [pytest.param(*pair, id=pair[0]["id"]) for pair in LIGER_ROWS])
def test_a_step_with_ligers_kernels_is_met_within_its_margin(row: dict[str, Any], config: dict[str, Any]) -> None:
    """The row with Liger's own loss head has chunks of 256 tokens there, where fitune's has 1,024."""
    one = compare(row, config, make_device())
    has_other_head = row["loss_head"] == "liger_fused_linear_cross_entropy"
    assert abs(one.error("allocated")) < (0.025 if has_other_head else 0.001)
    assert abs(one.error("reserved")) < (0.03 if has_other_head else 0.001)
    assert abs(one.error("allocated", "closed_forms")) < 0.03
    assert one.predicted.required_bytes > row["measured"]["peak_nvml_bytes"]


@pytest.mark.slow
def test_compiled_4_bit_layers_need_a_third_of_those_that_keep_dequantised_weights() -> None:
    row, config = next(pair for pair in ROWS if pair[0]["id"] == KEPT_WEIGHTS)
    predicted = compare(row, config, make_device()).predicted
    assert predicted.peak_allocated_bytes < 0.38 * row["measured"]["peak_allocated_bytes"]


@pytest.mark.parametrize("checkpointed", [0, 7, 16])
@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
def test_repeated_compiled_layers_give_the_whole_models_trace(method: str, checkpointed: int) -> None:
    config = LLAMA | {"num_hidden_layers": 16}
    strategy = make_strategy(method, compile=True, checkpointed_layers=checkpointed, loss_head="fused")
    trace(config, strategy)
    short, whole = trace(config, strategy), trace(config, strategy, cut=False)
    assert len(short.model.layers) < len(whole.model.layers)
    assert sorted(list_sizes(short)) == sorted(list_sizes(whole))


@pytest.mark.parametrize("method", ["full", "lora"])
def test_compiled_layers_keep_less_for_backward(method: str) -> None:
    eager, compiled = (predict(LLAMA, make_strategy(method, compile=on), length=1024) for on in (False, True))
    tokens, hidden, width = 2 * 1024, 256, 768
    less = eager.components.activations - compiled.components.activations
    assert less > 0.9 * 9 * tokens * (2 * 2 * hidden + 2 * width), (
        "norms' fp32 inputs and the activation are computed again"
    )
