"""The recipe: frozen tables, strict types, finite numbers, unknown keys forbidden.

A field's description is its documentation, and `make_schema()` hands it to editors. `"auto"` is left to the planner.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo, field_validator
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue
from pydantic_core import core_schema

from .data_table import DataTable
from .fields import Count, Methods, Share, Size, Table, Targets, Text
from .units import parse_bytes


class ModelTable(Table):
    """Which model, and how its weights are loaded."""

    id: Text
    """The model: a folder or config.json (planning only), a name of fitune's catalog, a hub id; tried in this order."""
    revision: Text | None = None
    """Branch, tag or commit of a hub model; unset: the default branch."""
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """Dtype of the stored weights."""
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    """Implementation of attention."""
    trust_remote_code: bool = False
    """Whether code that a hub model brings along may run."""


class MethodTable(Table):
    """Full fine-tuning or adapters."""

    kind: Literal["auto", "full", "lora", "qlora"] = "auto"
    """How to train; auto: the first of `prefer` that fits."""
    prefer: Methods = ("full", "lora", "qlora")
    """The order in which auto tries the methods; only these are tried."""
    rank: Count = 16
    """LoRA rank."""
    alpha: Count | None = None
    """LoRA alpha: the update is scaled by alpha / rank; unset: twice the rank."""
    dropout: Share = 0.0
    """Dropout before the LoRA matrices, 0 or more and below 1."""
    targets: Literal["all-linear"] | Targets = "all-linear"
    """Modules that get adapters: all linear layers but the LM head, or a list of module names such as "q_proj"."""
    adapter_dtype: Literal["fp32", "bf16"] = "fp32"
    """Dtype of the LoRA matrices."""
    double_quantization: bool = True
    """Whether QLoRA quantises the NF4 scales again."""
    fused_adapters: Literal["auto"] | bool = "auto"
    """Whether LoRA's products are added where the frozen ones are computed, and are not tensors of their own; without
    dropout, where auto does it."""
    adapter: Text | None = None
    """Folder of an existing adapter to continue; needs lora or qlora."""

    @field_validator("fused_adapters")
    @classmethod
    def _check_fused(cls, asked: Literal["auto"] | bool, info: ValidationInfo) -> Literal["auto"] | bool:
        if asked is True and info.data.get("kind") == "full":
            raise ValueError('true is for adapters, which method.kind = "full" has none of: leave it out')
        if asked is True and info.data.get("dropout"):
            raise ValueError(
                f"true excludes method.dropout = {info.data['dropout']}, which changes the adapters' inputs: "
                "leave one of the two out"
            )
        return asked

    @field_validator("adapter")
    @classmethod
    def _check_adapter(cls, adapter: str | None, info: ValidationInfo) -> str | None:
        if adapter is None:
            return adapter
        kind, prefer = info.data.get("kind"), info.data.get("prefer")
        if kind == "full":
            raise ValueError('an adapter cannot be continued with method.kind = "full"; allowed are auto, lora, qlora')
        if kind == "auto" and prefer == ("full",):
            raise ValueError('an adapter cannot be continued with method.prefer = ["full"]; name lora or qlora too')
        return adapter

    @property
    def tried(self) -> tuple[Literal["full", "lora", "qlora"], ...]:
        """The methods to try in their order; an adapter to continue rules full fine-tuning out."""
        methods = self.prefer if self.kind == "auto" else (self.kind,)
        return tuple(method for method in methods if self.adapter is None or method != "full")

    @property
    def lora_alpha(self) -> int:
        """alpha, or twice the rank."""
        return 2 * self.rank if self.alpha is None else self.alpha


class BudgetTable(Table):
    """What may be used; what is unset is found out on the machine."""

    gpu: Text | None = None
    """A card of fitune's GPU catalog such as "RTX 4090" or "H100 80GB"; unset: what NVML finds."""
    memory: Size | None = None
    """Memory on the device such as "24GiB"; overrides the card's."""
    gpus: Annotated[int, Field(ge=1, le=1024)] = 1
    """Number of such cards, 1 to 1024."""
    host_memory: Size | None = None
    """RAM such as "64GiB"; unset: what is free."""
    disk: Size | None = None
    """Disk space for the run such as "100GB"; unset: what is free."""
    max_hours: Annotated[float, Field(gt=0, le=1e6)] | None = None
    """Longest run in hours, above 0; unset: no limit. A plan that takes longer is rejected, and the run stops
    itself."""
    price_per_hour: Annotated[float, Field(ge=0, le=1e6)] | None = None
    """Price of an hour of the device, in a currency of your choice, 0 or more: the plan then shows the run's cost."""

    @property
    def memory_bytes(self) -> int | None:
        """`memory` in bytes."""
        return None if self.memory is None else parse_bytes(self.memory)

    @property
    def host_memory_bytes(self) -> int | None:
        """`host_memory` in bytes."""
        return None if self.host_memory is None else parse_bytes(self.host_memory)

    @property
    def disk_bytes(self) -> int | None:
        """`disk` in bytes."""
        return None if self.disk is None else parse_bytes(self.disk)


def _default_epochs(table: dict[str, Any]) -> int | None:
    return 1 if table.get("max_steps") is None else None


class TrainTable(Table):
    """The training loop."""

    max_steps: Count | None = None
    """Optimizer steps; excludes epochs."""
    epochs: Count | None = Field(default_factory=_default_epochs)
    """Passes over the training rows; 1 where max_steps is unset too."""
    global_batch_size: Count = 16
    """Sequences an optimizer step; never changed silently."""
    micro_batch_size: Literal["auto"] | Count = "auto"
    """Sequences in one forward; divides global_batch_size."""
    learning_rate: Literal["auto"] | Annotated[float, Field(gt=0, le=1)] = "auto"
    """Peak of the schedule, above 0; auto: 2e-4 for adapters, 2e-5 for full."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Learning rate after the warm-up."""
    warmup: Share = 0.03
    """Share of the steps in which the learning rate rises, 0 or more and below 1."""
    weight_decay: Share = 0.0
    """AdamW's decoupled weight decay, 0 or more and below 1."""
    max_grad_norm: Literal["off"] | Annotated[float, Field(gt=0)] = 1.0
    """Gradients are clipped to this L2 norm, above 0; or off."""
    optimizer: Literal["auto", "adamw", "adamw_8bit", "adamw_32bit", "paged_adamw_8bit", "paged_adamw", "adafactor"] = (
        "auto"
    )
    """Optimizer, and with it the bytes of its states."""
    optimizer_in_backward: Literal["auto"] | bool = "auto"
    """Whether backward updates each layer as soon as its gradients are there, and frees them; for full fine-tuning
    with max_grad_norm off and micro_batch_size = global_batch_size, where auto tries it."""
    gradient_checkpointing: Literal["auto"] | bool | Count = "auto"
    """Whether layers are computed again in backward instead of kept: all, none, or the first so many of them."""
    save_attention: Literal["auto"] | bool = "auto"
    """Whether checkpointed layers keep what attention returns instead of computing it again; worth it for long rows."""
    loss_head: Literal["auto", "full", "chunked", "fused"] = "auto"
    """Logits of all tokens at once (full) or of some (chunked, fused); fused computes gradients in the forward."""
    compile: Literal["auto"] | bool = "auto"
    """Whether layers are compiled; auto: dense layers of known families on a GPU."""
    kernels: Literal["auto", "torch", "liger"] = "auto"
    """Of norms, rotary positions and gated MLPs; auto: Liger's (fitune[liger]) on a GPU where nothing is compiled."""
    float8: bool = False
    """Whether LoRA's frozen linear layers are stored and multiplied in float8; needs compute capability 8.9 or more."""
    activation_offload: bool = False
    """Whether what the layers keep for backward waits in host memory; on a GPU only."""
    expandable_segments: bool = False
    """Whether segments of CUDA's caching allocator can grow; as a rule less is then reserved and unused."""
    eval_every: Count | None = None
    """Steps between evaluations; unset: at the start and the end."""
    early_stopping_patience: Count | None = None
    """Evaluations in a row without a better held-out loss after which the run ends; needs eval_every and data.eval."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """What a step does whose loss or gradients are NaN or infinite: end the run, or leave the weights as they are."""
    seed: Annotated[int, Field(ge=0, le=2**32 - 1)] = 0
    """Seed of the adapters, the order of rows and dropout, 0 to 4294967295."""

    @field_validator("kernels")
    @classmethod
    def _check_kernels(cls, kernels: str, info: ValidationInfo) -> str:
        if kernels == "liger" and info.data.get("compile") is True:
            raise ValueError('"liger" excludes train.compile = true, which fuses the same operations: choose one')
        return kernels

    @field_validator("epochs")
    @classmethod
    def _check_epochs(cls, epochs: int | None, info: ValidationInfo) -> int | None:
        if epochs is not None and info.data.get("max_steps") is not None:
            raise ValueError("excludes train.max_steps: give one of the two")
        return epochs

    @field_validator("optimizer_in_backward")
    @classmethod
    def _check_in_backward(cls, asked: Literal["auto"] | bool, info: ValidationInfo) -> Literal["auto"] | bool:
        if asked is not True:
            return asked
        micro, whole = info.data.get("micro_batch_size"), info.data.get("global_batch_size")
        if info.data.get("max_grad_norm", "off") != "off":
            raise ValueError(
                'true excludes clipping, which needs all gradients at once: set train.max_grad_norm = "off" too'
            )
        if micro not in (None, "auto", whole) and whole is not None:
            raise ValueError(
                f"true excludes gradient accumulation: leave train.micro_batch_size = {micro} out, or set it to "
                f"train.global_batch_size = {whole}"
            )
        return asked

    @field_validator("save_attention")
    @classmethod
    def _check_save_attention(cls, asked: Literal["auto"] | bool, info: ValidationInfo) -> Literal["auto"] | bool:
        if asked is True and info.data.get("gradient_checkpointing") is False:
            raise ValueError("true is for checkpointed layers, and train.gradient_checkpointing is false")
        return asked

    @field_validator("activation_offload")
    @classmethod
    def _check_offload(cls, asked: bool, info: ValidationInfo) -> bool:
        if asked and info.data.get("save_attention") is True:
            raise ValueError("excludes train.save_attention = true, which keeps on the device what offload moves away")
        return asked

    @field_validator("micro_batch_size")
    @classmethod
    def _check_micro_batch_size(cls, micro: Literal["auto"] | int, info: ValidationInfo) -> Literal["auto"] | int:
        whole = info.data.get("global_batch_size")
        if micro == "auto" or whole is None or whole % micro == 0:
            return micro
        below = max(divisor for divisor in _find_divisors(whole) if divisor < micro)
        above = [divisor for divisor in _find_divisors(whole) if divisor > micro]
        nearest = f"{below} and {min(above)}" if above else f"{below}"
        verb = "are" if above else "is"
        raise ValueError(f"{micro} does not divide train.global_batch_size = {whole}; nearest that do {verb} {nearest}")


def _find_divisors(n: int) -> list[int]:
    small = [divisor for divisor in range(1, math.isqrt(n) + 1) if n % divisor == 0]
    return small + [n // divisor for divisor in small]


class OutputTable(Table):
    """What is left afterwards."""

    dir: Text | None = None
    """The run's folder; unset: runs/<recipe>-<time>."""
    merge: bool = False
    """Whether the adapters are also merged into a full model."""
    save_every: Literal["auto", "never"] | Count = "auto"
    """Steps between checkpoints; auto: every 15 minutes, gone when the run has finished."""
    keep_checkpoints: Count = 2
    """How many checkpoints stay, the last ones; 1 or more."""
    keep_best: bool = False
    """Whether the weights of the best held-out loss are kept, and saved at the end; needs eval_every and data.eval."""


class Recipe(Table):
    """A fine-tuning recipe of fitune. Relative paths are relative to the recipe's folder."""

    model: ModelTable
    data: DataTable
    method: MethodTable = Field(default_factory=MethodTable)
    budget: BudgetTable = Field(default_factory=BudgetTable)
    train: TrainTable = Field(default_factory=TrainTable, validate_default=True)
    output: OutputTable = Field(default_factory=OutputTable)

    @field_validator("train")
    @classmethod
    def _check_patience(cls, train: TrainTable, info: ValidationInfo) -> TrainTable:
        data = info.data.get("data")
        if train.early_stopping_patience is not None and data is not None:
            _check_evaluates("early_stopping_patience", data, train)
        return train

    @field_validator("train")
    @classmethod
    def _check_in_backward(cls, train: TrainTable, info: ValidationInfo) -> TrainTable:
        method = info.data.get("method")
        if train.optimizer_in_backward is True and method is not None and "full" not in method.tried:
            raise ValueError(
                'optimizer_in_backward = true is for method.kind = "full": the gradients of adapters are small'
            )
        return train

    @field_validator("train")
    @classmethod
    def _check_end(cls, train: TrainTable, info: ValidationInfo) -> TrainTable:
        data = info.data.get("data")
        if data is not None and data.streaming and train.max_steps is None:
            raise ValueError("data.streaming does not know how many rows there are: give max_steps")
        return train

    @field_validator("output")
    @classmethod
    def _check_best(cls, output: OutputTable, info: ValidationInfo) -> OutputTable:
        data, train = info.data.get("data"), info.data.get("train")
        if output.keep_best and data is not None and train is not None:
            _check_evaluates("keep_best", data, train)
            if output.save_every == "never":
                raise ValueError('keep_best needs checkpoints: output.save_every is "never"')
        return output


def _check_evaluates(key: str, data: DataTable, train: TrainTable) -> None:
    missing = [name for name, given in (("data.eval", data.eval), ("train.eval_every", train.eval_every)) if not given]
    if missing:
        raise ValueError(f"{key} needs {' and '.join(missing)}: a held-out loss during the training")


class _TomlSchema(GenerateJsonSchema):
    """TOML has no null: what is unset is left out, so the schema does not offer null either."""

    def nullable_schema(self, schema: core_schema.NullableSchema) -> JsonSchemaValue:
        return self.generate_inner(schema["schema"])

    def field_title_should_be_set(self, schema: object) -> bool:
        return False

    def default_schema(self, schema: core_schema.WithDefaultSchema) -> JsonSchemaValue:
        if schema.get("default") is None:
            return self.generate_inner(schema["schema"])
        return super().default_schema(schema)


def make_schema() -> dict[str, Any]:
    """The JSON schema (draft 2020-12) of a recipe, for editors and for error messages."""
    return make_document_schema(Recipe)


def make_document_schema(document: type[Table]) -> dict[str, Any]:
    """The JSON schema (draft 2020-12) of a TOML document."""
    return {"$schema": GenerateJsonSchema.schema_dialect, **document.model_json_schema(schema_generator=_TomlSchema)}
