"""The planner's inputs and its answer to "how": the device, the data's shape, and the strategy that trains."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, computed_field, model_validator

Method = Literal["full", "lora", "qlora"]
Dtype = Literal["bf16", "fp16", "fp32"]
Attention = Literal["sdpa", "efficient", "eager", "flash_attention_2", "varlen"]
LossHead = Literal["full", "chunked", "fused"]
Kernels = Literal["torch", "liger"]
Optimizer = Literal["adamw", "adamw_8bit", "adamw_32bit", "paged_adamw_8bit", "paged_adamw", "adafactor"]

DTYPE_BYTES: dict[Dtype, int] = {"bf16": 2, "fp16": 2, "fp32": 4}


class Value(BaseModel):
    """A frozen document: JSON in, JSON out, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class DeviceConstant(Value):
    """Memory beside the tensors, as finished runs on a machine showed it.

    bytes:  on a GPU beside the allocator's and managed memory: context, kernels, workspaces; on a CPU the process's own
    source: a phrase for people: from how many runs, and of which day
    """

    bytes: int = Field(gt=0)
    source: str


class Rates(Value):
    """How fast a device works: what step times are made of. A card's come from the catalog, a CPU's from a probe.

    peak_flops:       dense 16-bit matrix rate by the data sheet, operations a second; of a CPU the highest measured one
    half_flops:       of which large 16-bit products reach so much, operations a second
    full_flops:       the same of fp32 products, None where it is not known
    float8_flops:     the same of float8 products, None where there are none
    memory_bytes:     what operations reach that only move bytes, bytes a second
    instructions:     that a card's threads can issue, a second; None for a CPU and where it is not known
    host_bytes:       between the card and its host, each way, bytes a second; None for a CPU
    operation_seconds: time the host takes to start an operation
    kernel_seconds:   time of the shortest operation on the device
    overlaps:         whether the host runs ahead of the device, as with a GPU
    attention:        the kernels of fused attention
    board_watts:      power limit of the board, None where it is not known
    source:           a phrase for people: where this comes from
    """

    peak_flops: float = Field(gt=0)
    half_flops: float = Field(gt=0)
    full_flops: float | None = Field(default=None, gt=0)
    float8_flops: float | None = Field(default=None, gt=0)
    memory_bytes: float = Field(gt=0)
    instructions: float | None = Field(default=None, gt=0)
    host_bytes: float | None = Field(default=None, gt=0)
    operation_seconds: float = Field(ge=0)
    kernel_seconds: float = Field(ge=0)
    overlaps: bool = True
    attention: Literal["cudnn", "flash", "efficient", "cpu"]
    board_watts: float | None = Field(default=None, gt=0)
    source: str


class Device(Value):
    """What a plan is made for; probed by the runtime or read from the GPU catalog.

    name:            such as `NVIDIA H100 80GB HBM3`, or the CPU's name
    kind:            cuda or cpu
    memory_bytes:    the card's total memory; on a CPU the host's RAM
    budget_bytes:    what may be used of it
    bf16:            whether it computes in bf16 in hardware
    gpus:            how many such cards, 1 or more
    host_memory_bytes: RAM of the host that may be used, None where it is not known
    disk_bytes:      free disk for the run, None where it is not known
    budget_source:   a phrase for people: where budget_bytes comes from
    driver:          NVIDIA driver version, None without one or for a card of the catalog
    beside:          what `fitune calibrate` learnt of it, None where the closed form's constant holds
    rates:           how fast it works, None where that is not known: then no time is predicted
    compiles:        whether layers can be compiled: a GPU that Triton knows, and a C compiler for its launchers
    has_float8:      whether it multiplies in float8: compute capability 8.9 or more
    has_liger:       whether Liger's kernels are installed where the plan is made
    has_triton:      whether Triton is installed beside a CPU's torch; bitsandbytes then loads it
    has_amx:         whether a CPU has AMX, of whose code oneDNN keeps more
    """

    name: str
    kind: Literal["cuda", "cpu"]
    memory_bytes: int = Field(gt=0)
    budget_bytes: int = Field(gt=0)
    bf16: bool
    gpus: int = Field(default=1, ge=1)
    host_memory_bytes: int | None = None
    disk_bytes: int | None = None
    budget_source: str = ""
    driver: str | None = None
    beside: DeviceConstant | None = None
    rates: Rates | None = None
    compiles: bool = True
    has_float8: bool = False
    has_liger: bool = False
    has_triton: bool = False
    has_amx: bool = False


class DataFacts(Value):
    """What the planner knows of the dataset.

    rows:            training rows, None where the dataset is not there
    longest_row_tokens: tokens of the longest row after truncation, at most `data.max_length`
    row_tokens:      tokens of some rows that stand for all, shortest first; None where they are not known
    documents_per_row: the most documents of a packed row, its padding as one; None where they are not known
    document_tokens: of the document that a token of a packed row is in, on average; None where they are not known
    eval_rows, forgetting_rows: that are evaluated, 0 where they are not known
    eval_row_tokens, forgetting_row_tokens: as row_tokens, of these; None where they are not known
    has_question:    whether a held-out conversation is answered before and after training
    source:          a phrase for people: `tokenised` or why max_length is assumed
    """

    rows: int | None = None
    longest_row_tokens: int = Field(ge=1)
    row_tokens: tuple[int, ...] | None = Field(default=None, min_length=1)
    documents_per_row: int | None = Field(default=None, ge=1)
    document_tokens: float | None = Field(default=None, ge=1)
    eval_rows: int = Field(default=0, ge=0)
    forgetting_rows: int = Field(default=0, ge=0)
    eval_row_tokens: tuple[int, ...] | None = Field(default=None, min_length=1)
    forgetting_row_tokens: tuple[int, ...] | None = Field(default=None, min_length=1)
    has_question: bool = False
    source: str


class Strategy(Value):
    """Everything that decides memory and speed of a step; `runtime` executes exactly this.

    method:           full, lora or qlora
    weights_dtype:    dtype of the stored weights (of the 16-bit rest for qlora, whose linear layers are NF4)
    compute_dtype:    dtype of autocast's matrix work; equal to fp32 there is no autocast
    rounding:         how an update reaches the weights: `stochastic` for bf16 weights that are trained, else `nearest`
    adapter_dtype:    dtype of the LoRA matrices, None for full
    adapter_rank:     LoRA rank, None for full
    adapter_targets:  `all-linear` or module names, None for full
    adapter_dropout:  LoRA dropout, 0 to 1
    double_quantization: NF4 constants quantised again (qlora only)
    attention:        sdpa, eager or flash_attention_2; efficient: sdpa without FlashAttention, which wants keys and
                      values of all heads; varlen: packed rows without a mask, document by document
    micro_batch_size: rows in one forward, 1 or more
    gradient_accumulation_steps: forwards in one optimizer step; times micro_batch_size the global batch
    checkpointed_layers: the first so many decoder layers keep only their input and are computed again in backward;
                      from 0 to the model's layers, more mean all. The last layers' activations are the first that
                      backward frees, before a checkpointed layer is computed again, so the first ones are the
                      cheapest to checkpoint: elsewhere the same number needs as much at the loss head and more after it
    loss_head:        `full` keeps the logits of all tokens; `chunked` has 1,024 rows of them at a time and computes
                      them again in backward; `fused` computes their gradient chunk by chunk in the forward
    recasts_adapter_inputs: a checkpointed layer that is computed again copies adapters' inputs to the adapters' dtype,
                      as peft does; true of measured steps alone, no plan does it
    save_attention:   checkpointed layers keep attention's output, so that backward need not compute it again
    optimizer:        one of the recipe's names
    optimizer_in_backward: a layer is updated in backward, as soon as its gradients are there, which are freed then
    clips_gradients:  whether gradients are scaled to a norm
    compile:          layers compiled, and with them the fused loss head and adamw's stochastically rounded update
    kernels:          of norms, rotary positions and gated MLPs: PyTorch's operations, or Liger's kernels
    fused_adapters:   LoRA's products are added where the frozen ones are computed, and together for layers that read
                      the same input; else they are peft's
    float8:           the frozen linear layers stored in float8 and multiplied in it; with adapters only
    packing:          short rows put together, which gives every attention but varlen an explicit mask
    activation_offload: what the layers keep for backward waits in host memory (on a GPU)
    expandable_segments: segments of CUDA's caching allocator grow
    learning_rate:    peak of the schedule
    """

    method: Method
    weights_dtype: Dtype
    compute_dtype: Dtype
    rounding: Literal["nearest", "stochastic"] = "nearest"
    adapter_dtype: Dtype | None = None
    adapter_rank: int | None = None
    adapter_targets: str | tuple[str, ...] | None = None
    adapter_dropout: float = 0.0
    double_quantization: bool = True
    attention: Attention = "sdpa"
    micro_batch_size: int = Field(ge=1)
    gradient_accumulation_steps: int = Field(ge=1)
    checkpointed_layers: int = Field(ge=0)
    loss_head: LossHead
    recasts_adapter_inputs: bool = False
    save_attention: bool = False
    optimizer: Optimizer
    optimizer_in_backward: bool = False
    clips_gradients: bool = True
    compile: bool = False
    kernels: Kernels = "torch"
    fused_adapters: bool = False
    float8: bool = False
    packing: bool = False
    activation_offload: bool = False
    expandable_segments: bool = False
    learning_rate: float = Field(gt=0)

    @computed_field  # type: ignore[prop-decorator]
    @property
    def gradient_checkpointing(self) -> bool:
        """Whether any layer is checkpointed; in the plan's JSON for its readers."""
        return self.checkpointed_layers > 0

    @property
    def fuses(self) -> bool:
        """Whether norms and activations are one kernel each, which computes in backward again what it can."""
        return self.compile or self.kernels == "liger"

    @property
    def compiles_update(self) -> bool:
        """Whether an update that is rounded stochastically is one kernel for a tensor, without copies in fp32."""
        return self.compile and self.optimizer == "adamw" and self.rounding == "stochastic"

    @model_validator(mode="before")
    @classmethod
    def _drop_computed(cls, values: Any) -> Any:
        """What is computed comes back with a plan's JSON, and is computed again."""
        if isinstance(values, dict):
            return {key: value for key, value in values.items() if key != "gradient_checkpointing"}
        return values
