"""What this process may use of its host: CPU, RAM and disk, within the limits of a container or a shell."""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import resource
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from ...planner.process import HEAP_BLOCK_BYTES

CPU_BF16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}
"""Flags of /proc/cpuinfo that mean bf16 arithmetic in hardware: two of x86, one of arm64."""
MALLOPT_MMAP_THRESHOLD = -3
"""M_MMAP_THRESHOLD of glibc's malloc.h."""
WEIGHT_BLOCK_BYTES = 128 * 2**10
"""The same while weights are read: each is then mapped on its own and goes back when its model is gone, and what
quantising them takes meanwhile does not stay (up to 330 MiB with a model of 135M parameters)."""


@dataclass(frozen=True, kw_only=True)
class Cpu:
    """The host's processor.

    name:  as the kernel knows it, such as `AMD EPYC 9354`
    cores: how many this process may use, 1 or more
    flags: instruction sets, such as `avx2` or `avx512_bf16`
    """

    name: str
    cores: int
    flags: frozenset[str]

    @property
    def bf16(self) -> bool:
        """Whether it computes in bf16 in hardware; without, bf16 is some twenty times slower than fp32."""
        return bool(self.flags & CPU_BF16_FLAGS)


@dataclass(frozen=True, kw_only=True)
class HostMemory:
    """RAM that this process may use.

    total_bytes:     of the host, or of the control group (container) where that is less
    available_bytes: what may still be taken without swapping, within the control group and RLIMIT_AS; 0 or more
    limited_by:      what sets available_bytes: `RAM`, `RAM of the container` or `RAM under ulimit -v`
    """

    total_bytes: int
    available_bytes: int
    limited_by: str


def probe_cpu(cpuinfo: Path = Path("/proc/cpuinfo")) -> Cpu:
    """The processor as the kernel describes it; what it does not say is left general."""
    keys: dict[str, str] = {}
    if cpuinfo.exists():
        for line in cpuinfo.read_text(errors="replace").splitlines():
            key, _, value = line.partition(":")
            keys.setdefault(key.strip(), value.strip())
    flags = keys.get("flags") or keys.get("Features") or ""
    return Cpu(
        name=keys.get("model name") or f"{platform.machine()} CPU",
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        flags=frozenset(flags.split()),
    )


def probe_host_memory(cgroup_root: Path = Path("/sys/fs/cgroup"), process: Path = Path("/proc/self")) -> HostMemory:
    """RAM that is free for this process: the least that the host, its control groups and RLIMIT_AS leave."""
    host = psutil.virtual_memory()
    total_bytes, available = int(host.total), {"RAM": int(host.available)}
    for limit_bytes, used_bytes in _read_cgroup_limits(cgroup_root, process / "cgroup"):
        total_bytes = min(total_bytes, limit_bytes)
        free_bytes = max(limit_bytes - used_bytes, 0)
        available["RAM of the container"] = min(available.get("RAM of the container", free_bytes), free_bytes)
    address_space_bytes = resource.getrlimit(resource.RLIMIT_AS)[0]
    if address_space_bytes != resource.RLIM_INFINITY:
        available["RAM under ulimit -v"] = max(address_space_bytes - int(psutil.Process().memory_info().vms), 0)
    limited_by = min(available, key=lambda source: available[source])
    return HostMemory(total_bytes=total_bytes, available_bytes=available[limited_by], limited_by=limited_by)


def probe_free_disk_bytes(path: Path) -> int:
    """Free space for this user where `path` is, or would be made."""
    return shutil.disk_usage(find_existing(path)).free


def find_existing(path: Path) -> Path:
    """The path itself, or the nearest folder above it that exists."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path


def _read_cgroup_limits(root: Path, membership: Path) -> Iterator[tuple[int, int]]:
    """Limit and use of every control group around this process, in bytes; file cache that can be dropped is not use.

    Version 2 and version 1: https://docs.kernel.org/admin-guide/cgroup-v2.html#memory-interface-files
    """
    for line in membership.read_text().splitlines() if membership.exists() else []:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            folder, names = root, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            folder, names = root / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        parts = [part for part in path.split("/") if part not in ("", "..")]
        for depth in range(len(parts) + 1):
            group = folder.joinpath(*parts[:depth])
            limit_bytes, used_bytes = _read_number(group / names[0]), _read_number(group / names[1])
            if limit_bytes is not None and used_bytes is not None:
                yield limit_bytes, used_bytes - (_read_number(group / "memory.stat", names[2]) or 0)


def _read_number(path: Path, key: str | None = None) -> int | None:
    """The file's only number, or the one after `key`; None where there is none (`max` means no limit)."""
    try:
        words = path.read_text().split()
    except OSError:
        return None
    word = dict(zip(words[::2], words[1::2], strict=False)).get(key) if key else next(iter(words), None)
    return int(word) if word and word.isdecimal() else None


def has_nvidia_card(pci: Path = Path("/sys/bus/pci/devices")) -> bool:
    """Whether an NVIDIA card is on the PCI bus, with a driver or without: vendor 0x10de, class 0x03 (display)."""
    for card in pci.iterdir() if pci.is_dir() else ():
        try:
            vendor, kind = (card / "vendor").read_text().strip(), (card / "class").read_text().strip()
        except OSError:
            continue
        if vendor == "0x10de" and kind.startswith("0x03"):
            return True
    return False


def measure_waiting_seconds(tasks: Path = Path("/proc/self/task")) -> float:
    """How long this process's threads have waited for a processor that others had, all together.

    The second number of each schedstat file; 0 where the kernel does not count it.
    https://docs.kernel.org/scheduler/sched-stats.html
    """
    waited = 0.0
    for path in tasks.glob("*/schedstat"):
        with contextlib.suppress(OSError, IndexError, ValueError):  # a thread that has ended
            waited += int(path.read_text().split()[1]) / 1e9
    return waited


def keep_heap_tight(block_bytes: int = HEAP_BLOCK_BYTES) -> None:
    """Make glibc return every block of `block_bytes` and more to the system when it is freed.

    By default glibc learns to keep blocks of up to 32 MiB in its heap, which fragments: the resident memory of a CPU
    run then grows by a quarter over its first steps. Has no effect with another C library.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(MALLOPT_MMAP_THRESHOLD, block_bytes)


def trim_heap() -> None:
    """Return what glibc's heap holds of freed blocks to the system. Has no effect with another C library."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
