"""Random weights of a model's real shape, made in a process of its own: `python -m benchmarks.gpu_models NAME FOLDER`.

What CUDA's context and allocator hold ends with the process; in the benchmark's own it would be missing to every case.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

SHARD = "4GB"
"""Of the weights' files: so much is copied to the host at one time."""


def make_config(name: str, embedded: Path, *, smoke: bool) -> Any:
    """The catalog's config; small for a smoke test."""
    from transformers import AutoConfig

    from fitune.planner.catalog import find_model

    catalog = find_model(name)
    if catalog is None:
        raise SystemExit(f"no model {name} in fitune's catalog")
    if not smoke:
        written = dict(catalog.config)
        return AutoConfig.for_model(written.pop("model_type"), **written)
    config = AutoConfig.from_pretrained(embedded)
    config.update({"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2})
    config.update({"num_key_value_heads": 1, "head_dim": 32})
    return config


def write_model(name: str, folder: Path, *, smoke: bool) -> None:
    """Random bf16 weights of the catalog's shape, made on the GPU, with the embedded model's tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM

    from fitune.runtime.model.embedded import load_embedded_model

    embedded = load_embedded_model()
    config = make_config(name, embedded, smoke=smoke)
    torch.manual_seed(0)
    with torch.device("cpu" if smoke else "cuda"):
        built = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    built.save_pretrained(folder, max_shard_size=SHARD)
    for one in embedded.iterdir():
        if one.name.startswith(("token", "special", "vocab", "merges", "chat_template")):
            shutil.copy(one, folder)


if __name__ == "__main__":
    write_model(sys.argv[1], Path(sys.argv[2]), smoke="--smoke" in sys.argv[3:])
