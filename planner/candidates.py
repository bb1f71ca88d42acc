"""The strategies that a recipe allows on a device, method by method, and which of two equally fast ones is better."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

from ..recipes.errors import PlanError
from ..recipes.schema import Recipe
from .quantized import ONLY_QLORA
from .shape import ModelShape
from .strategy import Attention, Device, Dtype, Kernels, LossHead, Method, Optimizer, Strategy

LEARNING_RATE: dict[Method, float] = {"full": 2e-5, "lora": 2e-4, "qlora": 2e-4}
"""Used where the recipe says auto."""
OPTIMIZER_LOSSINESS: dict[Optimizer, int] = {
    "adamw_32bit": 0,
    "adamw": 0,
    "paged_adamw": 0,
    "adamw_8bit": 1,
    "paged_adamw_8bit": 1,
    "adafactor": 2,
}
"""Between equally fast plans the one with the more exact optimizer state wins."""
AUTO_OPTIMIZERS: dict[str, tuple[Optimizer, ...]] = {
    "cuda": ("adamw", "adamw_8bit", "paged_adamw_8bit"),
    "cpu": ("adamw", "adamw_8bit"),
}
"""What auto tries. bitsandbytes' paged optimizers run unpaged on a CPU, so none is offered there."""
LIGER_ACTIVATIONS: dict[str, str] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "phi3", "olmo2", "granite", "smollm3"), "silu"),
    **dict.fromkeys(("gemma", "gemma2", "gemma3_text"), "gelu_pytorch_tanh"),
}
"""Families whose losses and gradients are the same with Liger's kernels (tests/runtime/test_liger.py), to the
activation of the MLP that Liger has for them."""
LOSS_HEADS: tuple[LossHead, ...] = ("full", "fused", "chunked")
"""In the order of preference."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Dtypes of one method on one device.

    weights: dtype of the stored weights
    compute: dtype of the matrix work
    """

    weights: Dtype
    compute: Dtype


def list_methods(recipe: Recipe) -> tuple[Method, ...]:
    """The methods to try in their order; the optimizer in backward is for full fine-tuning alone."""
    only_full = recipe.train.optimizer_in_backward is True
    return tuple(method for method in recipe.method.tried if method == "full" or not only_full)


def list_settings(recipe: Recipe, device: Device, method: Method) -> tuple[Setting, ...]:
    """Dtypes to try, most exact first.

    full: fp32 weights under autocast, then bf16 weights rounded stochastically. Adapters: frozen weights in the
    16-bit dtype that the device computes in, fp32 on a CPU that computes in fp32. Raises PlanError for what
    cannot train: fp16 on a CPU, fp16 weights that are trained, FlashAttention 2 where it has no kernels, or compiled
    layers where nothing compiles them.
    """
    if recipe.model.attention == "flash_attention_2" and not (device.kind == "cuda" and device.bf16):
        raise PlanError(
            'model.attention: "flash_attention_2" needs a GPU of compute capability 8.0 or more, and this plan is for '
            f'{device.name}: use "sdpa"'
        )
    if recipe.train.compile is True and device.kind == "cuda" and not device.compiles:
        raise PlanError(
            f"train.compile: {device.name} cannot run compiled layers: they need a GPU of compute capability 7.0 or "
            "more, and Triton, a C compiler and Python.h on its machine: leave it out"
        )
    compute: Dtype = "bf16" if device.bf16 else "fp16" if device.kind == "cuda" else "fp32"
    asked = recipe.model.dtype
    if asked == "auto":
        half: tuple[Dtype, ...] = (compute,) if compute != "fp32" else ()
        if method == "full":
            half = ("bf16",) if compute == "bf16" else ()
            return tuple(Setting(weights=weights, compute=compute) for weights in ("fp32", *half))
        return (Setting(weights=half[0] if half else "fp32", compute=compute),)
    if asked == "fp16" and device.kind == "cpu":
        raise PlanError('model.dtype: "fp16" is for GPUs without bf16; on a CPU use "bf16" or "fp32"')
    if asked == "fp16" and method == "full":
        raise PlanError(
            'model.dtype: fp16 weights cannot be trained, their updates underflow: use "fp32" (computes in fp16 where '
            'the card has no bf16), or method.kind = "lora"'
        )
    if asked != "fp32":
        compute = asked
    return (Setting(weights=asked, compute=compute),)


def list_strategies(recipe: Recipe, device: Device, method: Method, shape: ModelShape) -> Iterator[Strategy]:
    """Every strategy of `method` that the recipe's fixed keys leave open.

    Where transformers does not run an architecture with SDPA, attention is eager.
    """
    if shape.is_stored_in_4bit and method != "qlora":
        raise PlanError(f"model.id: {recipe.model.id}: {ONLY_QLORA}")
    train, adapters = recipe.train, recipe.method
    if train.float8:
        _check_float8(recipe, device, method, shape)
    has_adapter = method != "full"
    for (setting, micro, in_backward), (checkpointed, saves), head, optimizer, (compiled, kernels) in product(
        _list_settings_of_batches(recipe, device, method),
        _list_checkpoints(recipe, device, shape),
        _list_loss_heads(recipe, method, shape),
        AUTO_OPTIMIZERS[device.kind] if train.optimizer == "auto" else (train.optimizer,),
        _list_kernels(recipe, device, shape),
    ):
        adapter_dtype: Dtype | None = None
        if has_adapter:
            adapter_dtype = adapters.adapter_dtype if setting.compute == "bf16" else "fp32"
        trained = adapter_dtype or setting.weights
        yield Strategy(
            method=method,
            weights_dtype=setting.weights,
            compute_dtype=setting.compute,
            rounding="stochastic" if trained == "bf16" else "nearest",
            adapter_dtype=adapter_dtype,
            adapter_rank=adapters.rank if has_adapter else None,
            adapter_targets=adapters.targets if has_adapter else None,
            adapter_dropout=adapters.dropout if has_adapter else 0.0,
            double_quantization=adapters.double_quantization,
            attention=choose_attention(recipe, device, shape, setting.compute),
            micro_batch_size=micro,
            gradient_accumulation_steps=train.global_batch_size // micro,
            checkpointed_layers=checkpointed,
            loss_head=head,
            save_attention=saves,
            optimizer=optimizer,
            optimizer_in_backward=in_backward,
            clips_gradients=train.max_grad_norm != "off",
            compile=compiled,
            kernels=kernels,
            fused_adapters=_fuses_adapters(recipe, method, setting),
            float8=train.float8,
            packing=recipe.data.packing,
            activation_offload=train.activation_offload,
            expandable_segments=train.expandable_segments,
            learning_rate=LEARNING_RATE[method] if train.learning_rate == "auto" else train.learning_rate,
        )


def _list_checkpoints(recipe: Recipe, device: Device, shape: ModelShape) -> Iterator[tuple[int, bool]]:
    """How many of the first layers are checkpointed, and whether those keep attention's output.

    A layer's output takes 2 H bytes a token and spares 2 S H operations, at some half the rate of products; not to
    checkpoint a layer takes 10 to 30 times the bytes and spares 24 H^2: the former is the better use of memory from S =
    H / 4 to H / 2 on. At S = H it spares 1/18 of a LoRA step whose layers are all checkpointed; auto tries
    it from there on. Where the number of layers is open, it is half of them or more: of fewer there is little to spare.
    """
    asked, layers = recipe.train.save_attention, _list_checkpointed_layers(recipe, shape)
    is_fused = choose_attention(recipe, device, shape, "bf16") != "eager"
    if asked is True and not is_fused:
        raise PlanError(
            f"train.save_attention: {shape.model_type} computes attention in several operations here, none of whose "
            'results stands for it: set model.attention = "sdpa", or leave it out'
        )
    if asked == "auto":
        asked = is_fused and recipe.data.max_length >= shape.hidden_size and not recipe.train.activation_offload
        yield from ((count, False) for count in layers)
    else:
        yield from ((count, False) for count in layers if not (asked and count))
    if asked:
        yield from ((count or -(-shape.layers // 2), True) for count in layers if any(layers))


def _list_checkpointed_layers(recipe: Recipe, shape: ModelShape) -> tuple[int, ...]:
    """How many of the first layers are checkpointed: none and all for auto."""
    asked = recipe.train.gradient_checkpointing
    if asked == "auto":
        return 0, shape.layers
    if isinstance(asked, bool):
        return (shape.layers if asked else 0,)
    if asked > shape.layers:
        raise PlanError(
            f"train.gradient_checkpointing: {asked} is more than the {shape.layers} layers of this model: "
            f"use a number up to {shape.layers}, or true for all"
        )
    return (asked,)


def choose_attention(recipe: Recipe, device: Device, shape: ModelShape, compute: Dtype) -> Attention:
    """The recipe's; eager where transformers does not run an architecture with SDPA. Packed rows are attended document
    by document, which FlashAttention's kernels do from compute capability 8.0 on, in 16 bits and heads of up to 256;
    SDPA uses PyTorch's memory-efficient kernel on older cards."""
    asked = recipe.model.attention
    if asked != "sdpa":
        return asked
    if not shape.has_sdpa:
        return "eager"
    has_kernel = device.bf16 and compute != "fp32" and shape.head_dim <= 256 and shape.head_dim % 8 == 0
    has_function = not shape.is_guess and not shape.attention_dropout
    if recipe.data.packing and has_function and (device.kind == "cpu" or has_kernel):
        return "varlen"
    return "efficient" if device.kind == "cuda" and not device.bf16 else "sdpa"


def _list_compile(recipe: Recipe, device: Device, shape: ModelShape) -> tuple[bool, ...]:
    """Whether layers are compiled. Auto compiles dense layers of known families on a GPU; others are the recipe's to
    ask for: what they do depends on the data, which compiles often or not at all."""
    if recipe.train.compile != "auto":
        return (recipe.train.compile,)
    is_plain = shape.experts is None and not shape.is_guess
    return (True, False) if device.kind == "cuda" and device.compiles and is_plain else (False,)


def _list_kernels(recipe: Recipe, device: Device, shape: ModelShape) -> tuple[tuple[bool, Kernels], ...]:
    """(compiled layers, kernels) to try. Compiled layers fuse what Liger's kernels do, and more; where layers are not
    compiled Liger's keep less and are faster than PyTorch's in every measured pair, so auto tries no others."""
    asked, why_not = recipe.train.kernels, _explain_no_liger(device, shape)
    if asked == "liger":
        if why_not:
            raise PlanError(f'train.kernels: "liger" cannot be had: {why_not}; "torch" works everywhere')
        return ((False, "liger"),)
    eager: Kernels = "torch" if asked == "torch" or why_not else "liger"
    return tuple((compiled, "torch" if compiled else eager) for compiled in _list_compile(recipe, device, shape))


def _explain_no_liger(device: Device, shape: ModelShape) -> str | None:
    """Why Liger's kernels cannot run a model on a device; None where they can."""
    activation = LIGER_ACTIVATIONS.get(shape.model_type)
    if device.kind == "cpu":
        return f"its kernels need a GPU, and this plan is for {device.name}"
    if activation is None:
        return f"its kernels are tested with {', '.join(LIGER_ACTIVATIONS)}, and this model is a {shape.model_type}"
    if shape.activation not in (activation, "swish" if activation == "silu" else activation):
        return f"it has {activation} for {shape.model_type}, and this model computes {shape.activation}"
    if not device.compiles:
        return f"{device.name} needs compute capability 7.0 or more, and its machine Triton and a C compiler"
    if not device.has_liger:
        return 'it is not installed here, or Triton is not: pip install "fitune[liger]" (on Linux)'
    return None


def _fuses_adapters(recipe: Recipe, method: Method, setting: Setting) -> bool:
    """Whether adapters are fused: they move fewer bytes and keep no more, so that auto does it wherever it can be had.

    Adapters' inputs must be those of the frozen layers, which dropout changes, and weights must be multiplied as they
    are stored: a copy in another dtype, which peft's form keeps for backward, is not made twice.
    """
    asked = recipe.method.fused_adapters
    if method == "full" or asked is False:
        return False
    casts = method == "lora" and setting.weights != setting.compute
    if asked is True and casts:
        raise PlanError(
            f"method.fused_adapters: the weights are in {setting.weights} and the products in {setting.compute}: leave "
            'model.dtype = "fp32" out, or method.fused_adapters'
        )
    if asked is True and recipe.train.float8:
        raise PlanError("method.fused_adapters: products in float8 cannot be added to: leave it or train.float8 out")
    return not (casts or recipe.train.float8 or recipe.method.dropout)


def _check_float8(recipe: Recipe, device: Device, method: Method, shape: ModelShape) -> None:
    """PlanError where frozen layers cannot be stored and multiplied in float8."""
    if method != "lora":
        wrong = "has no frozen weights" if method == "full" else "stores its frozen weights in NF4 already"
        raise PlanError(f'train.float8: method.kind = "{method}" {wrong}: use "lora"')
    if not device.has_float8:
        raise PlanError(
            f"train.float8: {device.name} has no float8 products: they need a GPU of compute capability 8.9 or more, "
            "such as an H100 or an RTX 4090"
        )
    if recipe.model.dtype not in ("auto", "bf16"):
        raise PlanError(f'train.float8: its products are in bf16: leave model.dtype = "{recipe.model.dtype}" out')
    if shape.experts or shape.is_guess:
        raise PlanError(f"train.float8: it is for dense models of known families, and this one is a {shape.model_type}")


def _list_loss_heads(recipe: Recipe, method: Method, shape: ModelShape) -> tuple[LossHead, ...]:
    """The loss heads to try; the fused one multiplies with the LM head itself, so that it must have no adapter.

    Where it can be had, the chunked one is not tried: it computes the logits twice, and its backward needs more.
    """
    asked, targets = recipe.train.loss_head, recipe.method.targets
    is_adapted = method != "full" and targets != "all-linear" and any(shape.head.is_target(name) for name in targets)
    if asked == "auto":
        return ("full", "chunked") if is_adapted else ("full", "fused")
    if asked == "fused" and is_adapted:
        raise PlanError(
            'train.loss_head: "fused" computes without the adapter that method.targets puts on the LM head: '
            'use "chunked", or leave it out'
        )
    return (asked,)


def _list_settings_of_batches(recipe: Recipe, device: Device, method: Method) -> Iterator[tuple[Setting, int, bool]]:
    """Dtypes and micro-batch sizes, each with and without the optimizer in backward as far as the recipe leaves that
    open: it needs all of the global batch in one micro-batch, gradients that nobody clips, and no gradient scaler."""
    asked, whole = recipe.train.optimizer_in_backward, recipe.train.global_batch_size
    for setting in list_settings(recipe, device, method):
        if asked is True and setting.compute == "fp16":
            raise PlanError(
                f"train.optimizer_in_backward: {device.name} computes in fp16, whose gradient scaler looks at all "
                "gradients before an update: leave it out"
            )
        is_possible = method == "full" and recipe.train.max_grad_norm == "off" and setting.compute != "fp16"
        for size in _list_micro_batch_sizes(recipe):
            if asked is not True:
                yield setting, size, False
            if is_possible and asked is not False and size == whole:
                yield setting, size, True


def _list_micro_batch_sizes(recipe: Recipe) -> tuple[int, ...]:
    """Divisors of the global batch: the planner splits it and never changes it."""
    if recipe.train.micro_batch_size != "auto":
        return (recipe.train.micro_batch_size,)
    whole = recipe.train.global_batch_size
    small = [divisor for divisor in range(1, int(whole**0.5) + 1) if whole % divisor == 0]
    return tuple(sorted({*small, *(whole // divisor for divisor in small)}))


def is_rounded(strategy: Strategy) -> bool:
    """Whether full fine-tuning rounds its weights: those that are exact come first, however slow."""
    return strategy.method == "full" and strategy.weights_dtype != "fp32"


def preference(strategy: Strategy) -> tuple[int, ...]:
    """Between equally fast candidates: the less lossy optimizer, unpaged before paged, then the update that is made
    whole or not at all, then the loss head that does nothing in chunks, then the smaller micro-batch, which needs less
    memory and pads less, then attention that is computed again."""
    optimizer = 2 * OPTIMIZER_LOSSINESS[strategy.optimizer] + strategy.optimizer.startswith("paged")
    head = LOSS_HEADS.index(strategy.loss_head)
    return optimizer, strategy.optimizer_in_backward, head, strategy.micro_batch_size, strategy.save_attention
