"""`fitune explain`: the lecture's arithmetic as a person reads it, in the lecture's GB = 10**9 bytes."""

from __future__ import annotations

from rich.console import Console

from .arithmetic import Explanation, make_explanation
from .explain_adapters import render_ranks, render_table3
from .explain_memory import render_accounts, render_checkpoints, render_full
from .explain_quantization import render_array, render_corrections, render_matrix, render_nf4

__all__ = ["Explanation", "make_explanation", "render_explanation"]


def render_explanation(explanation: Explanation, console: Console) -> None:
    """Print an explanation, section by section; made for 100 columns."""
    sections = {
        f"Full fine-tuning of {explanation.size}": render_full(explanation),
        "LoRA and QLoRA: what is in the lecture's ~40 GB": render_accounts(explanation),
        "A checkpoint every sqrt(n) layers": render_checkpoints(explanation),
        "Trainable parameters by rank": render_ranks(explanation.ranks),
        "GPT-2 in the lecture's Table 3": render_table3(explanation.table3),
        "Ten values in int8": render_array(explanation.array),
        "A 5x5 matrix: one constant, one a row, and those quantised again": render_matrix(explanation.matrix),
        "The 16 levels of NF4": render_nf4(explanation.nf4),
        "The lecture's figures that are off": render_corrections(explanation.corrections),
    }
    for title, body in sections.items():
        console.rule(f"[bold]{title}[/bold]", align="left", style="bright_black")
        console.print(body)
        console.print()
