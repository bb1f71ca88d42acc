"""The smoke test of torch and bitsandbytes: the real ones, and broken ones put before them on the path."""

from __future__ import annotations

from pathlib import Path

import pytest

from fitune.runtime.machine.smoke import SmokeTest, run_smoke_test

ABORT = "import os; os.abort()"
WRONG = """
import torch
from types import SimpleNamespace

class Linear4bit(torch.nn.Linear):
    def __init__(self, *sizes, bias, compute_dtype, quant_type):
        super().__init__(*sizes, bias=bias)
    def forward(self, inputs):
        return 2 * super().forward(inputs)

nn = SimpleNamespace(Linear4bit=Linear4bit)
"""


def run_with(
    package: str, source: str, folder: Path, monkeypatch: pytest.MonkeyPatch, seconds: float = 120
) -> SmokeTest:
    (folder / package).mkdir()
    (folder / package / "__init__.py").write_text(source)
    monkeypatch.setenv("PYTHONPATH", str(folder))
    return run_smoke_test(timeout_seconds=seconds)


def test_the_installed_torch_and_bitsandbytes_train_a_4_bit_layer() -> None:
    import torch

    smoke = run_smoke_test()
    assert (smoke.torch_error, smoke.bitsandbytes_error) == (None, None)
    assert (smoke.torch_version, smoke.torch_cuda) == (torch.__version__, torch.version.cuda)
    assert smoke.device == ("cuda" if torch.cuda.is_available() else "cpu")


def test_a_torch_that_crashes_is_a_finding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    smoke = run_with("torch", ABORT, tmp_path, monkeypatch)
    assert smoke.torch_error == "crashed with SIGABRT"
    assert (smoke.torch_version, smoke.bitsandbytes_error) == (None, "not tried without torch")


def test_a_torch_that_cannot_be_imported_is_a_finding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = 'raise ImportError("libcudart.so.13: cannot open shared object file")'
    smoke = run_with("torch", source, tmp_path, monkeypatch)
    assert smoke.torch_error == "ImportError: libcudart.so.13: cannot open shared object file"


def test_a_torch_that_hangs_is_a_finding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    smoke = run_with("torch", "import time; time.sleep(600)", tmp_path, monkeypatch, seconds=0.5)
    assert smoke.torch_error == "no answer within 0.5 s"


def test_a_bitsandbytes_that_crashes_is_a_finding_and_torch_is_still_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    smoke = run_with("bitsandbytes", f"print('{{')\n{ABORT}", tmp_path, monkeypatch)
    assert smoke.bitsandbytes_error == "crashed with SIGABRT"
    assert smoke.torch_error is None
    assert smoke.torch_version is not None


def test_a_bitsandbytes_that_computes_wrongly_is_a_finding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    smoke = run_with("bitsandbytes", WRONG, tmp_path, monkeypatch)
    assert smoke.bitsandbytes_error is not None
    assert "computes wrongly: output off by 100%" in smoke.bitsandbytes_error
