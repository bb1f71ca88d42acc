"""Builds the model that a strategy describes: weights, quantisation, adapters, checkpointing, compiled layers."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from torch import nn

from ...planner.quantized import ONLY_QLORA
from ...planner.shape import make_shape
from ...planner.strategy import Strategy
from ...recipes.errors import ModelError
from ..quiet import quiet_libraries
from ..training.step import TORCH_DTYPES
from .attention import attend_documents, keep_attention
from .fused_adapters import fuse_adapters
from .kernels import use_liger_kernels
from .linear_4bit import make_compilable
from .linear_float8 import use_float8
from .parts import find_layers

RECOMPILE_LIMIT = 64
"""Graphs of one layer class. Beyond it torch runs the layer eagerly, in more memory than was planned: PyTorch's 8 are
used up by the first layer, whose input needs no gradient, the others, and a few lengths of rows."""


@dataclass(frozen=True, kw_only=True)
class BuiltModel:
    """A model ready to train.

    model: what is trained: a PeftModel around `base`, or `base` itself
    base:  the transformers model inside
    """

    model: nn.Module
    base: Any

    @property
    def trainable(self) -> list[nn.Parameter]:
        """The parameters that the optimizer updates."""
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]


def build_model(
    folder: Path,
    strategy: Strategy,
    device: torch.device,
    *,
    alpha: int | None = None,
    adapter: Path | None = None,
    trust_remote_code: bool = False,
) -> BuiltModel:
    """Load the weights in `folder` as `strategy` says and make them trainable.

    alpha:   LoRA's scaling numerator, unset: twice the rank
    adapter: folder of an existing adapter to continue, None for a new one
    """
    base = load_base(folder, strategy, device, trust_remote_code=trust_remote_code)
    model = base if strategy.method == "full" else add_adapters(base, strategy, alpha=alpha, adapter=adapter)
    prepare_training(base, strategy)
    if strategy.compile:
        compile_layers(base)
    return BuiltModel(model=model, base=base)


def load_base(folder: Path, strategy: Strategy, device: torch.device, *, trust_remote_code: bool = False) -> Any:
    """The transformers model on `device`, its linear layers in NF4 for qlora."""
    from transformers import AutoModelForCausalLM

    arguments: dict[str, Any] = {}
    if strategy.method == "qlora":
        arguments["quantization_config"] = make_quantization(strategy)
    try:
        with quiet_libraries():
            found: Any = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=TORCH_DTYPES[strategy.weights_dtype],
                attn_implementation=name_attention(strategy),
                trust_remote_code=trust_remote_code,
                device_map={"": device},
                local_files_only=True,
                use_safetensors=True,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
                **arguments,
            )
    except (OSError, ValueError, KeyError, ImportError, SafetensorError) as error:
        if "Cannot allocate memory" in str(error):  # of a mapping of the file: no fault of the model
            raise MemoryError(str(error)) from error
        raise ModelError(f"model.id: {folder}: transformers cannot load it: {error}") from error
    base, loaded = found
    check_loaded(folder, base, loaded)
    if strategy.method != "qlora" and getattr(base, "is_loaded_in_4bit", False):
        raise ModelError(f"model.id: {folder}: {ONLY_QLORA}")
    if strategy.method == "qlora":
        keep_cpu_weights_trainable(base)
        release_file(base)
    return base


def name_attention(strategy: Strategy) -> str:
    """What transformers calls the strategy's attention; ours is made known to it."""
    if strategy.attention == "varlen":
        from transformers import AttentionInterface

        AttentionInterface.register("varlen", attend_documents)
    return "sdpa" if strategy.attention == "efficient" else strategy.attention


def check_loaded(folder: Path, base: nn.Module, loaded: Mapping[str, Any]) -> None:
    """ModelError where a weight is not in the files or has another shape there: transformers makes it up at random."""
    missing = sorted(loaded["missing_keys"] & {name for name, _ in base.named_parameters()})
    if missing:
        raise ModelError(f"model.id: {folder}: {len(missing)} weights are not in its files, such as {missing[0]}")
    for name, stored, expected in sorted(loaded["mismatched_keys"]):
        raise ModelError(
            f"model.id: {folder}: {name} is stored as {list(stored)}, its config.json says {list(expected)}"
        )


def make_quantization(strategy: Strategy) -> Any:
    """transformers' configuration for NF4 with the strategy's double quantisation and compute dtype."""
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=strategy.double_quantization,
        bnb_4bit_compute_dtype=TORCH_DTYPES[strategy.compute_dtype],
    )


def keep_cpu_weights_trainable(base: nn.Module) -> None:
    """Keep bitsandbytes from repacking 4-bit weights on CPUs with avx512_bf16.

    An evaluation under no_grad would repack them into a layout without autograd, and training after it would
    silently leave most adapters without gradients (bitsandbytes 0.50).
    """
    import bitsandbytes as bnb

    for module in base.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False


def release_file(base: nn.Module) -> None:
    """Copy the tensors that are still views of the weights' file: on a CPU one alone keeps all of it in memory.

    safetensors maps the file; only where every weight is such a view, in 16 bits, is the file the model's own memory.
    """
    for parameter in base.parameters():
        if parameter.device.type == "cpu" and parameter.is_floating_point():
            parameter.data = parameter.data.clone()


def add_adapters(base: Any, strategy: Strategy, *, alpha: int | None, adapter: Path | None) -> nn.Module:
    """Freeze `base` and put LoRA adapters beside its linear layers, in the strategy's adapter dtype."""
    assert strategy.adapter_dtype is not None, "adapters have a dtype"
    with quiet_libraries():
        model = make_adapters(base, strategy, alpha=alpha) if adapter is None else load_adapters(base, adapter)
    dtype = TORCH_DTYPES[strategy.adapter_dtype]
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    return model


def make_adapters(base: Any, strategy: Strategy, *, alpha: int | None) -> nn.Module:
    """New adapters: lora_A random, lora_B zero."""
    from peft import LoraConfig, get_peft_model

    assert strategy.adapter_rank is not None, "adapters have a rank"
    config = LoraConfig(
        r=strategy.adapter_rank,
        lora_alpha=2 * strategy.adapter_rank if alpha is None else alpha,
        lora_dropout=strategy.adapter_dropout,
        target_modules=find_target_modules(base, strategy),
        task_type="CAUSAL_LM",
    )
    try:
        return get_peft_model(base, config)
    except (ValueError, KeyError) as error:
        raise ModelError(f"method.targets: peft cannot attach adapters: {error}") from error


def load_adapters(base: Any, folder: Path) -> nn.Module:
    """The adapters in `folder`, to be trained further; ModelError where they do not fit every layer of `base`."""
    from peft import PeftModel

    if not (folder / "adapter_config.json").is_file():
        raise ModelError(f"method.adapter: {folder}: no adapter_config.json in it; a peft adapter's folder has one")
    where = f"method.adapter: {folder}"
    try:
        model = PeftModel.from_pretrained(base, str(folder), is_trainable=True, low_cpu_mem_usage=True)
    except (ValueError, OSError, KeyError, TypeError, SafetensorError) as error:
        raise ModelError(f"{where}: peft cannot attach it: {error}") from error
    except RuntimeError as error:
        if "size mismatch" not in str(error):
            raise
        raise ModelError(f"{where}: it was made for another model: {str(error).splitlines()[1].strip()}") from error
    missing = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if missing:
        raise ModelError(f"{where}: it was made for another model: it has no {missing[0]}")
    return model


def find_target_modules(base: Any, strategy: Strategy) -> str | list[str]:
    """peft's `target_modules` for the strategy's targets.

    "all-linear" becomes the names of the linear layers that the planner counts: peft's own also adapts a mixture's
    fused experts, and rebuilds every expert's weight in each forward, and routers that are linear layers by class.
    """
    targets = strategy.adapter_targets
    if isinstance(targets, tuple):
        return list(targets)
    assert targets is not None, "adapters have targets"
    try:
        return list(make_shape(base.config.to_dict()).lora_target_names(targets))
    except ModelError:
        head, taken = base.get_output_embeddings(), list_expert_names(base)
        return [
            name
            for name, module in base.named_modules()
            if is_adaptable(module) and module is not head and name.rsplit(".", 1)[-1] not in taken
        ]


def list_expert_names(base: Any) -> frozenset[str]:
    """Names of linear layers that peft takes for those of a mixture's experts, wherever they are.

    peft 0.21 knows checkpoints of transformers 4, whose experts were linear layers, by these names, and adapts the
    fused experts of transformers 5 in their place: for DeepSeek-V2-Lite a rank of 16 is 1.3 GiB of adapters, and every
    forward rebuilds every expert's weight. So dense layers and shared experts of such models get none.
    """
    from peft.utils import transformers_weight_conversion

    conversion: Any = transformers_weight_conversion
    pattern = conversion._MODEL_TO_CONVERSION_PATTERN.get(base.config.model_type)
    return frozenset(conversion._MOE_TARGET_MODULE_MAPPING.get(pattern, ()))


def is_adaptable(module: nn.Module) -> bool:
    """Whether an adapter can stand beside a module: a linear layer, its weight packed or not, that returns a tensor.

    Some mixtures' routers are linear layers that return scores and choices (phimoe, llama4).
    """
    from transformers.pytorch_utils import Conv1D

    if not isinstance(module, nn.Linear | Conv1D):
        return False
    plain = type(module).__module__.startswith("bitsandbytes.") or type(module) in (nn.Linear, Conv1D)
    if plain or isinstance(module, Conv1D):
        return True
    row = torch.zeros(1, module.in_features, dtype=module.weight.dtype, device=module.weight.device)
    try:
        with torch.no_grad():
            return isinstance(module(row), torch.Tensor)
    except (RuntimeError, TypeError, ValueError):
        return False


def prepare_training(base: Any, strategy: Strategy) -> None:
    """Checkpointing, float8, fused adapters and kernels, as the strategy says; compile_layers() comes next."""
    base.config.use_cache = False
    base.train()
    _forget_padding(base)
    if strategy.checkpointed_layers:
        checkpoint_layers(base, strategy.checkpointed_layers, save_attention=strategy.save_attention)
    if strategy.float8:
        use_float8(base)
    if strategy.fused_adapters:
        fuse_adapters(base, strategy)
    if strategy.kernels == "liger":
        use_liger_kernels(base)
    if strategy.compile:
        make_compilable(base)


def compile_layers(base: Any) -> None:
    """Compile each decoder layer when it is first called.

    What a checkpointed layer hands from one fused adapter to the next is in its graph, and need not be handed on again
    when backward computes the layer again.
    """
    torch._dynamo.config.recompile_limit = RECOMPILE_LIMIT
    torch._dynamo.config.skip_fwd_side_effects_in_bwd_under_checkpoint = True
    torch._inductor.config.shape_padding = False  # it tries padded products in memory that no plan knows of
    # It warns of in-place operations in every checkpoint that has a policy; attention's results see none.
    logging.getLogger("torch._higher_order_ops.wrap").setLevel(logging.ERROR)
    for layer in find_layers(base):
        layer.compile()


def _forget_padding(base: Any) -> None:
    """Some thirty architectures, GPT-2 among them, look for padding in every batch to warn of a missing mask, for which
    a GPU's host has to wait. Rows are padded on the right and without labels there, so nothing is missing."""
    for module in base.modules():
        if hasattr(module, "warn_if_padding_and_no_attention_mask"):
            vars(module)["warn_if_padding_and_no_attention_mask"] = lambda *_: None


def checkpoint_layers(base: Any, count: int, *, save_attention: bool = False) -> None:
    """Checkpoint the first `count` decoder layers; all, where there are no more.

    save_attention: whether they keep what attention returns
    """
    kept = {"context_fn": keep_attention} if save_attention else {}
    with quiet_libraries():
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False, **kept})
    for layer in list(find_layers(base))[count:]:
        if not hasattr(layer, "gradient_checkpointing"):
            raise ModelError(
                f"train.gradient_checkpointing: {type(base).__name__} checkpoints all of its layers or none: "
                "use true or false"
            )
        cast(Any, layer).gradient_checkpointing = False
