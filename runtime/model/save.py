"""What a run leaves: a peft adapter or a full model in safetensors, merged if asked for, tokenizer and card."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ...planner.plan import Plan
from ...planner.show.reasons import METHOD_NAMES
from ...recipes.load import RecipeFile
from ..machine.host import trim_heap
from ..quiet import quiet_libraries
from ..rundir import RunDirectory
from ..training.step import TORCH_DTYPES
from .models import ModelSource

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def name_base_model(model: Any, name: str) -> None:
    """Say in an adapter's config which model it is for: a hub id or an absolute path; a full model has none."""
    for config in getattr(model, "peft_config", {}).values():
        config.base_model_name_or_path = name


def save_trained(directory: RunDirectory, name: str, model: Any, tokenizer: PreTrainedTokenizerBase, card: str) -> Path:
    """Write the adapter (of a PeftModel) or the model into folder `name` of the run, with tokenizer and model card."""
    with quiet_libraries(), directory.write_folder(name) as folder:
        model.save_pretrained(folder, safe_serialization=True)
        tokenizer.save_pretrained(folder)
        (folder / "README.md").write_text(card, encoding="utf-8")
    return directory.path / name


def save_merged(
    directory: RunDirectory,
    base_folder: Path,
    adapter_folder: Path,
    *,
    dtype: str,
    tokenizer: PreTrainedTokenizerBase,
    card: str,
    trust_remote_code: bool,
) -> Path:
    """Merge the adapter into a fresh 16-bit copy of the base on the CPU and write it.

    Never into 4-bit weights: rounding the sum to NF4 again loses the update (tried: loss 6.24 against 4.77).
    """
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    with quiet_libraries():
        base = AutoModelForCausalLM.from_pretrained(
            base_folder, dtype=TORCH_DTYPES[dtype], local_files_only=True, trust_remote_code=trust_remote_code
        )
        merged = PeftModel.from_pretrained(base, str(adapter_folder)).merge_and_unload()
    return save_trained(directory, "merged", merged, tokenizer, card)


def make_card(plan: Plan, recipe_file: RecipeFile, source: ModelSource, *, data: str, loss: str) -> str:
    """The model card: what was trained from what, how, and with which result."""
    strategy = plan.strategy
    base = json.dumps(source.hub_id or source.id, ensure_ascii=False)  # YAML takes JSON's quotes
    library = "transformers" if strategy.method == "full" else "peft"
    versions = ", ".join(f"{name} {version}" for name, version in plan.versions.items())
    adapters = (
        ""
        if strategy.adapter_rank is None
        else f"- rank {strategy.adapter_rank}, adapters in {strategy.adapter_dtype}\n"
    )
    return (
        f"---\nbase_model: {base}\nlibrary_name: {library}\ntags:\n- fitune\n- {strategy.method}\n---\n\n"
        f"# {recipe_file.name}\n\n"
        f"{METHOD_NAMES[strategy.method]} of {base} with fitune, from the recipe `{recipe_file.path.name}`.\n\n"
        f"- data: {data}\n"
        f"{adapters}"
        f"- weights in {strategy.weights_dtype}, computed in {strategy.compute_dtype}\n"
        f"- learning rate {strategy.learning_rate:g}, {strategy.optimizer}, "
        f"{strategy.micro_batch_size * strategy.gradient_accumulation_steps} rows a step\n"
        f"- {loss}\n"
        f"- recipe digest {plan.recipe_sha256}\n"
        f"- made with {versions}\n\n"
        "The base model's licence and limits apply to this one too.\n"
    )


def count_file_bytes(folder: Path) -> int:
    """Bytes of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def free_memory(device: torch.device) -> None:
    """Give back what the allocators cache, before another model is loaded."""
    trim_heap()
    if device.type == "cuda":
        torch.cuda.empty_cache()
