"""NVML through pynvml, against a stand-in library with faults."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pynvml
import pytest

MIB = 2**20

LIST = """
    from fitune.runtime.machine.nvml import open_nvml
    nvml = open_nvml()
    show({"driver": nvml.driver_version, "cuda": nvml.cuda_version, "gpus": nvml.list_gpus()})
"""
SAMPLE = """
    from fitune.runtime.machine.nvml import open_nvml
    with open_nvml() as nvml:
        show(nvml.sample(0, os.getpid()))
"""
NAMES = """
    from fitune.runtime.machine.nvml import open_nvml
    show([gpu.uuid if "MIG" not in gpu.name else gpu.name for gpu in open_nvml().list_gpus()])
"""


def test_a_gpu_is_described_with_its_memory_and_who_holds_it(run_on_fake_gpus: Any) -> None:
    shown = run_on_fake_gpus(LIST, used_mib=3000, self_mib=500, other_mib=2000, other_pid=999_999_999)
    (gpu,) = shown["gpus"]
    assert (shown["driver"], shown["cuda"]) == ("580.159.04", "13.0")
    assert (gpu["name"], gpu["uuid"], gpu["compute_capability"]) == ("NVIDIA Fake 80GB", "GPU-00-aaaa", [9, 0])
    assert (gpu["memory_bytes"], gpu["used_bytes"]) == (80000 * MIB, 3000 * MIB)
    assert gpu["free_bytes"] == 77000 * MIB
    other, own = gpu["processes"]
    assert other == {"pid": 999_999_999, "name": "?", "memory_bytes": 2000 * MIB}
    assert own["memory_bytes"] == 500 * MIB
    assert own["name"].startswith("python")


def test_memory_of_a_process_that_may_not_be_read_is_none(run_on_fake_gpus: Any) -> None:
    (gpu,) = run_on_fake_gpus(LIST, other_mib=-1)["gpus"]
    assert [process["memory_bytes"] for process in gpu["processes"]] == [None]


@pytest.mark.parametrize(("capability", "bf16"), [(7, False), (8, True), (9, True)])
def test_bf16_starts_with_ampere(run_on_fake_gpus: Any, capability: int, bf16: bool) -> None:
    source = "from fitune.runtime.machine.nvml import open_nvml; show(open_nvml().list_gpus()[0].bf16)"
    assert run_on_fake_gpus(source, capability=capability) is bf16


def test_a_sample_carries_every_reading(run_on_fake_gpus: Any) -> None:
    shown = run_on_fake_gpus(SAMPLE, used_mib=2500, self_mib=700, other_mib=800, throttle=0x4 | 0x1 | 0x40)
    assert shown == {
        "memory_used_bytes": 2500 * MIB,
        "process_memory_bytes": 700 * MIB,
        "other_memory_bytes": 800 * MIB,
        "utilization_percent": 90.0,
        "power_watts": 400.0,
        "energy_joules": 1000.0,
        "temperature_celsius": 60.0,
        "throttle_reasons": ["power_cap", "hardware_thermal_slowdown"],
    }


@pytest.mark.parametrize(
    ("fault", "fields"),
    [
        ("memory", ["memory_used_bytes"]),
        ("processes", ["process_memory_bytes", "other_memory_bytes"]),
        ("utilization", ["utilization_percent"]),
        ("power", ["power_watts"]),
        ("energy", ["energy_joules"]),
        ("temperature", ["temperature_celsius"]),
        ("throttle", ["throttle_reasons"]),
    ],
)
@pytest.mark.parametrize(
    "code", [pynvml.NVML_ERROR_NOT_SUPPORTED, pynvml.NVML_ERROR_NO_PERMISSION, pynvml.NVML_ERROR_UNKNOWN]
)
def test_a_reading_that_is_refused_is_none_and_the_others_stay(
    run_on_fake_gpus: Any, fault: str, fields: list[str], code: int
) -> None:
    shown = run_on_fake_gpus(SAMPLE, self_mib=1, **{f"{fault}_error": code})
    assert [field for field, value in shown.items() if value is None] == fields


def test_a_process_that_the_driver_does_not_list_has_no_reading(run_on_fake_gpus: Any) -> None:
    assert run_on_fake_gpus(SAMPLE)["process_memory_bytes"] is None


def test_a_lost_gpu_is_an_error_of_its_own(run_on_fake_gpus: Any) -> None:
    source = """
        from fitune.recipes.errors import DeviceError
        from fitune.runtime.machine.nvml import GpuLostError, open_nvml
        nvml = open_nvml()
        set_state(error=15)
        try:
            nvml.sample(0, 1)
        except GpuLostError as error:
            show([isinstance(error, DeviceError), str(error)])
    """
    is_device_error, message = run_on_fake_gpus(source)
    assert is_device_error
    assert "no longer answers" in message


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (pynvml.NVML_ERROR_DRIVER_NOT_LOADED, "installed but not loaded"),
        (pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH, "differ in version"),
        (pynvml.NVML_ERROR_NO_PERMISSION, "no permission"),
        (pynvml.NVML_ERROR_UNKNOWN, "does not start"),
    ],
)
def test_a_driver_that_does_not_start_says_why(run_on_fake_gpus: Any, code: int, reason: str) -> None:
    shown = run_on_fake_gpus("from fitune.runtime.machine.nvml import open_nvml; show(open_nvml())", init_error=code)
    assert shown["has_driver"] is True
    assert reason in shown["reason"]


def test_a_machine_without_a_driver_says_so(tmp_path: Path) -> None:
    library = tmp_path / "libnvidia-ml.so.1"
    library.write_text("not a library")
    source = "from fitune.runtime.machine.nvml import open_nvml; print(open_nvml())"
    environment = os.environ | {"LD_LIBRARY_PATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", source], env=environment, capture_output=True, text=True, check=True)
    assert "was not found" in done.stdout
    assert "has_driver=False" in done.stdout


@pytest.mark.parametrize(
    ("visible", "expected"),
    [
        (None, ["GPU-00-aaaa", "GPU-11-aaaa", "GPU-22-aaaa"]),
        ("2,0", ["GPU-22-aaaa", "GPU-00-aaaa"]),
        (" 1 ", ["GPU-11-aaaa"]),
        ("GPU-11-aaaa", ["GPU-11-aaaa"]),
        ("GPU-2", ["GPU-22-aaaa"]),
        ("GPU-", []),
        ("1,7,0", ["GPU-11-aaaa"]),
        ("1,-1,0", ["GPU-11-aaaa"]),
        ("", []),
        ("-1", []),
        ("MIG-7", ["NVIDIA Fake MIG 1g.10gb"]),
        ("MIG-8", []),
    ],
)
def test_visible_gpus_are_those_that_cuda_would_use(
    run_on_fake_gpus: Any, visible: str | None, expected: list[str]
) -> None:
    assert run_on_fake_gpus(NAMES, visible=visible, gpus=3) == expected


def test_a_gpu_split_by_mig_is_its_first_instance(run_on_fake_gpus: Any) -> None:
    assert run_on_fake_gpus(NAMES, gpus=2, mig_1=1) == ["GPU-00-aaaa", "NVIDIA Fake MIG 1g.10gb"]


def test_index_0_means_the_first_visible_gpu(run_on_fake_gpus: Any) -> None:
    assert run_on_fake_gpus(SAMPLE, visible="1", gpus=2, used_mib_1=4321)["memory_used_bytes"] == 4321 * MIB
