"""What a process may use of its host."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fitune.runtime.machine.host import (
    find_existing,
    has_nvidia_card,
    probe_cpu,
    probe_free_disk_bytes,
    probe_host_memory,
)

MIB = 2**20


def write(path: Path, text: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{text}\n")


def test_an_x86_cpu_is_named_and_its_bf16_instructions_are_seen(tmp_path: Path) -> None:
    write(tmp_path / "cpuinfo", "model name\t: AMD EPYC 9354\nflags\t\t: fpu avx2 avx512_bf16\n\nmodel name\t: other")
    cpu = probe_cpu(tmp_path / "cpuinfo")
    assert (cpu.name, cpu.bf16, "avx2" in cpu.flags) == ("AMD EPYC 9354", True, True)
    assert cpu.cores >= 1


def test_an_arm_cpu_without_a_name_is_called_by_its_architecture(tmp_path: Path) -> None:
    write(tmp_path / "cpuinfo", "processor\t: 0\nFeatures\t: fp asimd sve bf16\n")
    cpu = probe_cpu(tmp_path / "cpuinfo")
    assert cpu.name.endswith(" CPU")
    assert cpu.bf16


@pytest.mark.parametrize("flags", ["fpu avx2", "avx512f avx512_vnni", ""])
def test_a_cpu_without_bf16_instructions_has_no_bf16(tmp_path: Path, flags: str) -> None:
    write(tmp_path / "cpuinfo", f"flags : {flags}")
    assert not probe_cpu(tmp_path / "cpuinfo").bf16


def test_a_host_that_tells_nothing_still_has_a_cpu(tmp_path: Path) -> None:
    cpu = probe_cpu(tmp_path / "missing")
    assert (cpu.flags, cpu.cores >= 1) == (frozenset(), True)


def test_without_a_control_group_the_hosts_ram_counts(tmp_path: Path) -> None:
    memory = probe_host_memory(tmp_path, tmp_path)
    assert memory.total_bytes == psutil.virtual_memory().total
    assert 0 < memory.available_bytes < memory.total_bytes


@given(limit_mib=st.integers(64, 512), used_mib=st.integers(0, 600), cache_mib=st.integers(0, 32))
def test_a_containers_limit_less_its_use_without_file_cache_is_what_is_free(
    tmp_path_factory: pytest.TempPathFactory, limit_mib: int, used_mib: int, cache_mib: int
) -> None:
    root = tmp_path_factory.mktemp("cgroup")
    write(root / "cgroup", "0::/")
    write(root / "memory.max", limit_mib * MIB)
    write(root / "memory.current", (used_mib + cache_mib) * MIB)
    write(root / "memory.stat", f"anon 5\ninactive_file {cache_mib * MIB}\nactive_file 9")
    memory = probe_host_memory(root, root)
    assert memory.total_bytes == limit_mib * MIB
    assert memory.available_bytes == max(limit_mib - used_mib, 0) * MIB
    assert memory.limited_by == "RAM of the container"


def test_the_tightest_of_nested_control_groups_counts(tmp_path: Path) -> None:
    write(tmp_path / "cgroup", "0::/slice/job/step")
    for folder, limit in {"slice": 400 * MIB, "slice/job": 100 * MIB, "slice/job/step": "max"}.items():
        write(tmp_path / folder / "memory.max", limit)
        write(tmp_path / folder / "memory.current", 30 * MIB)
    assert probe_host_memory(tmp_path, tmp_path).available_bytes == 70 * MIB


def test_a_version_1_control_group_counts(tmp_path: Path) -> None:
    write(tmp_path / "cgroup", "9:name=systemd:/\n4:cpu,memory:/docker/abc\n0::/")
    group = tmp_path / "memory" / "docker" / "abc"
    write(group / "memory.limit_in_bytes", 200 * MIB)
    write(group / "memory.usage_in_bytes", 80 * MIB)
    write(group / "memory.stat", f"inactive_file 1\ntotal_inactive_file {20 * MIB}")
    assert probe_host_memory(tmp_path, tmp_path).available_bytes == 140 * MIB


def test_a_group_whose_path_lies_outside_the_container_counts_by_its_root(tmp_path: Path) -> None:
    write(tmp_path / "cgroup", "0::/../../elsewhere")
    write(tmp_path / "memory.max", 90 * MIB)
    write(tmp_path / "memory.current", 40 * MIB)
    assert probe_host_memory(tmp_path, tmp_path).available_bytes == 50 * MIB


def test_the_shells_limit_on_the_address_space_counts() -> None:
    source = (
        "import json, resource; from fitune.runtime.machine.host import probe_host_memory;"
        "resource.setrlimit(resource.RLIMIT_AS, (2**30, 2**30)); m = probe_host_memory();"
        "print(json.dumps([m.available_bytes, m.limited_by]))"
    )
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=True)
    available_bytes, limited_by = json.loads(done.stdout)
    assert 0 < available_bytes < 2**30
    assert limited_by == "RAM under ulimit -v"


def test_free_disk_is_known_for_a_folder_that_is_not_there_yet(tmp_path: Path) -> None:
    assert probe_free_disk_bytes(tmp_path / "runs" / "one") > 0
    assert find_existing(tmp_path / "runs" / "one") == tmp_path


@pytest.mark.parametrize(
    ("vendor", "kind", "expected"),
    [("0x10de", "0x030200", True), ("0x10de", "0x040300", False), ("0x1002", "0x030000", False)],
)
def test_an_nvidia_card_is_seen_on_the_bus_without_a_driver(
    tmp_path: Path, vendor: str, kind: str, expected: bool
) -> None:
    write(tmp_path / "0000:01:00.0" / "vendor", vendor)
    write(tmp_path / "0000:01:00.0" / "class", kind)
    (tmp_path / "0000:02:00.0").mkdir()
    assert has_nvidia_card(tmp_path) is expected


def test_a_machine_without_a_pci_bus_has_no_nvidia_card(tmp_path: Path) -> None:
    assert not has_nvidia_card(tmp_path / "missing")
