from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from small_models import make_tokens, save_small_model
from small_runs import plan_recipe, run_recipe_file, write_recipe
from small_tokenizers import CHATML
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from fitune.runtime.report import RunReport
from fitune.runtime.training.losses import compute_loss

STRONG = {"learning_rate": 3e-2}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small_model(tmp_path_factory.mktemp("llama"))


def load_base(folder: Path, dtype: torch.dtype = torch.float32, **arguments: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **arguments).eval()


def compute_logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(make_tokens(2, 16)).logits.float()


def compute_held_out_loss(model: Any, recipe: Path) -> float:
    """Over the recipe's held-out rows, one by one and unpadded."""
    job, _ = plan_recipe(recipe)
    assert job.data.eval is not None
    total = 0.0
    with torch.no_grad():
        for row in job.data.eval.rows:
            ids, labels = (torch.tensor([list(one)]) for one in (row.input_ids, row.labels))
            total += compute_loss(
                model, model, ids, labels, loss_head="full", tokens=job.data.eval.trained_tokens
            ).item()
    return total


def run(folder: Path, base: Path, kind: str, /, **tables: dict[str, Any]) -> tuple[Path, Path, RunReport]:
    """Run a recipe of method `kind`, which must learn; the recipe, the run's directory and the report."""
    tables = {"train": STRONG if kind != "full" else {}} | tables
    method = {"kind": kind, "rank": 8} | tables.pop("method", {})
    recipe = write_recipe(folder, base, method=method, **tables)
    directory, report = run_recipe_file(recipe)
    assert report.loss.before is not None and report.loss.after is not None
    assert report.loss.after < 0.95 * report.loss.before
    return recipe, directory, report


def test_a_full_model_is_loaded_by_transformers_alone_with_the_loss_it_had(llama: Path, tmp_path: Path) -> None:
    recipe, directory, report = run(tmp_path, llama, "full")
    saved = load_base(directory / "model")
    assert compute_held_out_loss(saved, recipe) == pytest.approx(report.loss.after, rel=1e-5)
    assert {one.name for one in (directory / "model").iterdir()} >= {"config.json", "model.safetensors", "README.md"}


def test_a_lora_adapter_is_loaded_by_peft_alone_with_the_loss_it_had(llama: Path, tmp_path: Path) -> None:
    """Dropout is for training only: the loss before and after is measured without."""
    recipe, directory, report = run(tmp_path, llama, "lora", method={"dropout": 0.2})
    tuned = PeftModel.from_pretrained(load_base(llama), str(directory / "adapter"))
    assert compute_held_out_loss(tuned, recipe) == pytest.approx(report.loss.after, rel=1e-5)
    tensors = load_file(directory / "adapter" / "adapter_model.safetensors")
    assert all("lora_A" in name or "lora_B" in name for name in tensors) and len(tensors) == 28
    assert {one.dtype for one in tensors.values()} == {torch.float32}


def test_a_qlora_adapter_is_loaded_by_peft_alone_on_a_quantised_base_with_the_loss_it_had(
    llama: Path, tmp_path: Path
) -> None:
    recipe, directory, report = run(tmp_path, llama, "qlora")
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    tuned = PeftModel.from_pretrained(load_base(llama, quantization_config=nf4), str(directory / "adapter"))
    assert compute_held_out_loss(tuned, recipe) == pytest.approx(report.loss.after, rel=1e-3)


def test_a_merged_lora_model_computes_what_the_adapter_on_its_base_computes(llama: Path, tmp_path: Path) -> None:
    recipe, directory, report = run(tmp_path, llama, "lora", output={"merge": True})
    assert report.output == {"adapter": "adapter", "merged": "merged"}
    merged = load_base(directory / "merged")
    tuned = PeftModel.from_pretrained(load_base(llama), str(directory / "adapter"))
    torch.testing.assert_close(compute_logits(merged), compute_logits(tuned), rtol=1e-4, atol=1e-4)
    assert compute_held_out_loss(merged, recipe) == pytest.approx(report.loss.after, rel=1e-4)


def test_a_qlora_adapter_is_merged_into_a_bf16_base_and_never_into_a_4_bit_one(llama: Path, tmp_path: Path) -> None:
    recipe, directory, report = run(tmp_path, llama, "qlora", output={"merge": True})
    weights = load_file(directory / "merged" / "model.safetensors")
    assert {one.dtype for one in weights.values()} == {torch.bfloat16}
    assert "quantization_config" not in json.loads((directory / "merged" / "config.json").read_text())
    merged = load_base(directory / "merged")
    tuned = PeftModel.from_pretrained(load_base(llama), str(directory / "adapter"))
    expected = compute_held_out_loss(tuned, recipe)
    assert compute_held_out_loss(merged, recipe) == pytest.approx(expected, rel=0.01)
    assert report.loss.before is not None
    assert expected < 0.95 * report.loss.before
    assert "merge" in {one.name for one in report.measured.phases}


def test_a_merged_model_needs_no_peft(llama: Path, tmp_path: Path) -> None:
    _, directory, _ = run(tmp_path, llama, "lora", output={"merge": True})
    names = set(load_file(directory / "merged" / "model.safetensors"))
    assert names == set(load_file(llama / "model.safetensors"))
    assert not any("lora" in name or "base_layer" in name for name in names)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_the_tokenizer_and_its_template_are_saved_with_the_weights(llama: Path, tmp_path: Path, method: str) -> None:
    _, directory, report = run(tmp_path, llama, method)
    tokenizer = AutoTokenizer.from_pretrained(directory / next(iter(report.output)))
    assert tokenizer.chat_template == CHATML
    text = "What is feta?"
    assert tokenizer(text)["input_ids"] == AutoTokenizer.from_pretrained(llama)(text)["input_ids"]


def test_the_default_template_of_a_base_model_is_saved_with_it(tmp_path: Path) -> None:
    model = save_small_model(tmp_path / "model", template=None)
    _, directory, _ = run(tmp_path, model, "lora", output={"merge": True, "save_every": 3})
    for name in ("adapter", "merged", "checkpoints/step-000003"):
        tokenizer = AutoTokenizer.from_pretrained(directory / name)
        rendered = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
        assert rendered == "<|im_start|>user\nHi<|im_end|>\n"


def test_tied_weights_are_saved_once_and_tied_again(tmp_path: Path) -> None:
    model = save_small_model(tmp_path / "model", tie_word_embeddings=True)
    recipe, directory, report = run(tmp_path, model, "full")
    assert "lm_head.weight" not in load_file(directory / "model" / "model.safetensors")
    assert compute_held_out_loss(load_base(directory / "model"), recipe) == pytest.approx(report.loss.after, rel=1e-5)


@pytest.mark.parametrize("model_type", ["gpt2", "gemma2", "mixtral"])
@pytest.mark.parametrize("method", ["full", "lora"])
def test_other_architectures_are_saved_and_loaded_too(tmp_path: Path, model_type: str, method: str) -> None:
    model = save_small_model(tmp_path / "model", model_type, initializer_range=0.05)
    train = {"learning_rate": 1e-1 if method == "lora" else 5e-3, "max_steps": 12}
    recipe, directory, report = run(tmp_path, model, method, train=train, output={"merge": True})
    if method == "lora":
        tuned = PeftModel.from_pretrained(load_base(model), str(directory / "adapter"))
        merged = load_base(directory / "merged")
        assert compute_held_out_loss(merged, recipe) == pytest.approx(report.loss.after, rel=1e-4)
    else:
        tuned = load_base(directory / "model")
    assert compute_held_out_loss(tuned, recipe) == pytest.approx(report.loss.after, rel=1e-4)


def test_the_adapter_names_its_base_by_an_absolute_path(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """peft.AutoPeftModelForCausalLM finds the base by it, from wherever it is called."""
    monkeypatch.chdir(llama.parent)
    write_recipe(tmp_path, llama, method={"kind": "lora"}, train=STRONG)
    directory, _ = run_recipe_file(tmp_path / "recipe.toml")
    written = json.loads((directory / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert written == str(llama) and Path(written).is_absolute()


def test_the_card_says_what_was_trained_from_what_and_how(llama: Path, tmp_path: Path) -> None:
    _, directory, report = run(tmp_path, llama, "lora")
    card = (directory / "adapter" / "README.md").read_text()
    assert card.startswith(f'---\nbase_model: "{llama}"\nlibrary_name: peft\n')
    assert f"held-out loss {report.loss.before:.3f} before, {report.loss.after:.3f} after" in card
    for part in ("train.jsonl", "rank 8", "adamw", "4 rows a step", report.recipe_sha256, "torch ", "licence"):
        assert part in card
