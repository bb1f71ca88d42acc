"""Which device a plan is made for, on machines with and without GPUs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fitune.recipes.units import parse_bytes
from fitune.runtime.machine import devices
from fitune.runtime.machine.devices import explain_missing_compiler, explain_missing_kernels
from fitune.runtime.machine.nvml import Gpu

MIB = 2**20
GIB = 2**30
NO_DRIVER = {"init_error": 12}
MISMATCH = {"init_error": 18}

PROBE = """
    from fitune.recipes.errors import DeviceError
    from fitune.recipes.schema import BudgetTable
    from fitune.runtime.machine.devices import probe_device
    try:
        show(probe_device(BudgetTable(**{budget}), disk_path=Path("runs/none")).model_dump())
    except DeviceError as error:
        show(str(error))
"""
CHECK = """
    import sys, types
    from fitune.planner.strategy import Device
    from fitune.recipes.errors import DeviceError
    from fitune.runtime.machine.devices import check_runs_here
    device = Device(name="NVIDIA Fake 80GB", **{device})
    try:
        show(check_runs_here(device, required_bytes={required_bytes}))
    except DeviceError as error:
        show(str(error))
"""
CARD = {"kind": "cuda", "memory_bytes": 80 * 10**9, "budget_bytes": 70 * 10**9, "bf16": True}


def probe(run_on_fake_gpus: Any, budget: dict[str, Any], **state: Any) -> Any:
    return run_on_fake_gpus(PROBE.format(budget=budget), **state)


def check(run_on_fake_gpus: Any, device: dict[str, Any], required_bytes: int | None = None, **state: Any) -> Any:
    return run_on_fake_gpus(CHECK.format(device=device, required_bytes=required_bytes), **state)


def test_with_a_gpu_and_nothing_said_its_free_memory_is_the_budget(run_on_fake_gpus: Any) -> None:
    device = probe(run_on_fake_gpus, {}, used_mib=5000, other_mib=4000)
    assert device["name"] == "NVIDIA Fake 80GB"
    assert (device["kind"], device["bf16"], device["driver"]) == ("cuda", True, "580.159.04")
    assert (device["memory_bytes"], device["budget_bytes"]) == (80000 * MIB, 75000 * MIB)
    assert device["budget_source"] == "free memory of the card"
    assert device["host_memory_bytes"] > 0
    assert device["disk_bytes"] > 0


def test_without_a_gpu_the_free_ram_is_the_budget(run_on_fake_gpus: Any) -> None:
    device = probe(run_on_fake_gpus, {}, **NO_DRIVER)
    assert (device["kind"], device["gpus"], device["driver"]) == ("cpu", 1, None)
    assert 0 < device["budget_bytes"] <= device["memory_bytes"]
    assert device["budget_source"].startswith("free RAM")
    assert device["budget_source"].endswith("(no GPU found)")
    assert device["name"].endswith(("core", "cores"))


def test_a_driver_that_does_not_work_is_named_in_the_cpus_budget(run_on_fake_gpus: Any) -> None:
    assert "differ in version" in probe(run_on_fake_gpus, {}, **MISMATCH)["budget_source"]


def test_a_gpu_that_is_hidden_is_not_used(run_on_fake_gpus: Any) -> None:
    device = probe(run_on_fake_gpus, {}, visible="")
    assert device["kind"] == "cpu"
    assert "CUDA_VISIBLE_DEVICES" in device["budget_source"]


def test_memory_in_the_budget_overrides_what_is_free(run_on_fake_gpus: Any) -> None:
    device = probe(run_on_fake_gpus, {"memory": "24GiB"}, used_mib=5000)
    assert (device["budget_bytes"], device["budget_source"]) == (24 * GIB, "budget.memory")
    assert device["memory_bytes"] == 80000 * MIB
    device = probe(run_on_fake_gpus, {"memory": "64MiB"}, **NO_DRIVER)
    assert (device["kind"], device["budget_bytes"]) == ("cpu", 64 * MIB)


@pytest.mark.parametrize(
    ("budget", "state"),
    [
        ({"memory": "70GiB"}, {"used_mib": 20480}),
        ({"memory": "900TiB"}, NO_DRIVER),
        ({"gpu": "RTX 4090", "memory": "30GiB"}, NO_DRIVER),
    ],
)
def test_the_budgets_memory_overrides_what_there_is(
    run_on_fake_gpus: Any, budget: dict[str, str], state: dict[str, Any]
) -> None:
    """A plan may be for a larger machine; whether it runs here is asked when it is to run."""
    device = probe(run_on_fake_gpus, budget, **state)
    assert device["budget_bytes"] == parse_bytes(budget["memory"])
    assert device["memory_bytes"] < parse_bytes("2TiB")


def test_a_named_card_comes_from_the_catalog_and_nothing_of_another_machine_counts(run_on_fake_gpus: Any) -> None:
    device = probe(run_on_fake_gpus, {"gpu": "RTX 4090", "gpus": 4}, **NO_DRIVER)
    assert (device["kind"], device["bf16"], device["gpus"], device["driver"]) == ("cuda", True, 4, None)
    assert 23 * GIB < device["budget_bytes"] < device["memory_bytes"] <= 24 * GIB, "the driver keeps a part"
    assert (device["host_memory_bytes"], device["disk_bytes"]) == (None, None)


def test_on_a_machine_with_a_gpu_a_named_cards_host_is_this_one(run_on_fake_gpus: Any) -> None:
    device = probe(run_on_fake_gpus, {"gpu": "RTX 4090"})
    assert "4090" in device["name"]
    assert device["host_memory_bytes"] > 0
    assert device["disk_bytes"] > 0


def test_ram_and_disk_in_the_budget_are_taken_as_written(run_on_fake_gpus: Any) -> None:
    budget = {"host_memory": "3GiB", "disk": "5GB"}
    for state, more in (({}, {}), (NO_DRIVER, {}), (NO_DRIVER, {"gpu": "RTX 4090"})):
        device = probe(run_on_fake_gpus, budget | more, **state)
        assert (device["host_memory_bytes"], device["disk_bytes"]) == (3 * GIB, 5 * 10**9)


def test_a_card_that_is_not_in_the_catalog_is_refused(run_on_fake_gpus: Any) -> None:
    assert probe(run_on_fake_gpus, {"gpu": "RTX 4091"}, **NO_DRIVER).startswith('budget.gpu: "RTX 4091"')


def test_more_gpus_than_there_are_is_refused(run_on_fake_gpus: Any) -> None:
    assert "budget.gpus: 3 asked for, 2 found" in probe(run_on_fake_gpus, {"gpus": 3}, gpus=2)
    assert "budget.gpus: 2 asked for, 0 found" in probe(run_on_fake_gpus, {"gpus": 2}, **NO_DRIVER)


def test_several_gpus_are_planned_as_the_fullest_of_them(run_on_fake_gpus: Any) -> None:
    device = probe(run_on_fake_gpus, {"gpus": 2}, gpus=3, used_mib_1=30000, used_mib_2=79000)
    assert (device["gpus"], device["budget_bytes"]) == (2, 50000 * MIB)


def test_a_full_card_is_refused(run_on_fake_gpus: Any) -> None:
    assert probe(run_on_fake_gpus, {}, used_mib=80000).startswith("0 B of 78.1 GiB are free on NVIDIA Fake 80GB")


def test_a_card_that_does_not_tell_its_memory_is_refused(run_on_fake_gpus: Any) -> None:
    assert "name a card in budget.gpu" in probe(run_on_fake_gpus, {}, memory_error=3)


def test_a_lost_gpu_is_refused(run_on_fake_gpus: Any) -> None:
    assert "no longer answers" in probe(run_on_fake_gpus, {}, error=15)


def test_an_older_card_has_no_bf16(run_on_fake_gpus: Any) -> None:
    assert probe(run_on_fake_gpus, {}, capability=7)["bf16"] is False


def test_probing_does_not_import_torch(run_on_fake_gpus: Any) -> None:
    source = (
        PROBE.format(budget={}).replace("show(probe", "print(probe") + "    import sys; show('torch' in sys.modules)"
    )
    assert run_on_fake_gpus(source) is False


def test_a_plan_for_a_card_does_not_run_without_one(run_on_fake_gpus: Any) -> None:
    message = check(run_on_fake_gpus, CARD, **NO_DRIVER)
    assert message.startswith("the plan is for NVIDIA Fake 80GB, which is not in this machine (no GPU found)")


def test_a_plan_for_two_cards_does_not_run_on_one(run_on_fake_gpus: Any) -> None:
    assert "2 GPUs, and this machine shows 1" in check(run_on_fake_gpus, CARD | {"gpus": 2})


def test_a_plan_for_the_cpu_runs_where_its_memory_is_free(run_on_fake_gpus: Any) -> None:
    device = CARD | {"kind": "cpu"}
    assert check(run_on_fake_gpus, device, 64 * MIB, **NO_DRIVER) is None
    message = check(run_on_fake_gpus, device, 2**50, **NO_DRIVER)
    assert message.startswith("the plan needs 1.0 PiB, and ")


WITH_TORCH = """
    import sys, types
    torch = types.ModuleType("torch")
    torch.__version__, torch.version = "{version}", types.SimpleNamespace(cuda={cuda})
    torch.cuda = types.SimpleNamespace(is_available=lambda: {available}, get_arch_list=lambda: {architectures})
    sys.modules["torch"] = torch
"""


@pytest.mark.parametrize(
    ("version", "cuda", "expected"),
    [("2.13.0+cpu", None, "is a CPU build"), ("2.13.0+cu140", "14.0", "runs CUDA up to 13.0")],
)
def test_a_torch_that_cannot_use_the_gpu_says_why(
    run_on_fake_gpus: Any, version: str, cuda: str | None, expected: str
) -> None:
    torch = WITH_TORCH.format(version=version, cuda=repr(cuda), available=False, architectures=[])
    message = run_on_fake_gpus(torch + CHECK.format(device=CARD, required_bytes=None))
    assert message.startswith(f"torch {version} ")
    assert expected in message


@pytest.mark.parametrize(
    ("device", "required_gib", "state", "expected"),
    [
        ({}, 60, {}, None),
        ({}, 60, {"used_mib": 40000}, "the plan needs 60.0 GiB, and 39.1 GiB of 78.1 GiB are free"),
        ({}, None, {"total_mib": 24000}, "has 23.4 GiB in all"),
        ({}, None, {"capability": 7}, "computes in bf16, which NVIDIA Fake 80GB cannot"),
        ({"bf16": False}, None, {"capability": 7}, None),
    ],
)
def test_a_plan_runs_only_on_a_card_that_can_carry_it(
    run_on_fake_gpus: Any, device: dict[str, Any], required_gib: int | None, state: dict[str, int], expected: str | None
) -> None:
    torch = WITH_TORCH.format(version="2.13.0", cuda="'13.0'", available=True, architectures=["sm_70", "sm_90"])
    required_bytes = None if required_gib is None else required_gib * GIB
    message = run_on_fake_gpus(torch + CHECK.format(device=CARD | device, required_bytes=required_bytes), **state)
    assert message is None if expected is None else expected in message


@pytest.mark.parametrize(
    ("capability", "architectures", "has_kernels"),
    [
        ((9, 0), ["sm_80", "sm_90"], True),
        ((9, 0), ["sm_90a"], True),
        ((8, 9), ["sm_80", "sm_90"], True),
        ((12, 0), ["sm_90", "sm_100"], False),
        ((12, 0), ["sm_90", "compute_90"], True),
        ((6, 1), ["sm_75", "sm_80"], False),
        ((7, 0), ["sm_75", "compute_75"], False),
        ((6, 1), [], True),
        (None, ["sm_75"], True),
    ],
)
def test_a_build_of_torch_without_kernels_for_a_card_is_known(
    capability: tuple[int, int] | None, architectures: list[str], has_kernels: bool
) -> None:
    gpu = Gpu(
        index=0,
        name="a card",
        uuid="?",
        memory_bytes=None,
        used_bytes=None,
        free_bytes=None,
        compute_capability=capability,
        processes=(),
    )
    missing = explain_missing_kernels(gpu, architectures)
    assert missing is None if has_kernels else missing is not None and "compute capability is" in missing


def test_compiled_layers_need_triton_a_compiler_and_pythons_headers(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "Python.h").touch()
    monkeypatch.setattr(devices, "find_spec", lambda _: None)
    assert "pip install triton" in str(explain_missing_compiler())
    monkeypatch.setattr(devices, "find_spec", lambda name: name)
    monkeypatch.setattr(devices, "which", lambda _: None)
    assert "install gcc" in str(explain_missing_compiler())
    monkeypatch.setattr(devices, "which", lambda name: name)
    monkeypatch.setattr("sysconfig.get_path", lambda _: str(tmp_path / "none"))
    assert "python3-dev" in str(explain_missing_compiler())
    monkeypatch.setattr("sysconfig.get_path", lambda _: str(tmp_path))
    assert explain_missing_compiler() is None
