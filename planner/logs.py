"""What a run writes beside weights: its plan and reports, a line a step, and the monitor's samples."""

from __future__ import annotations

from .strategy import Device

SAMPLE_SECONDS = 0.05
"""Between two samples of the monitor."""
DENSE_SECONDS = 600.0
"""For so long every sample is written; a long run's file would otherwise grow by up to 900 MB a day."""
SPARSE_SECONDS = 1.0
"""After that one sample in this time is written; all of them still count for the maxima."""
CPU_SAMPLE_BYTES = 220
"""A line of samples.jsonl (217 in a run of the embedded model)."""
GPU_SAMPLE_BYTES = 530
"""The same with NVML's eight values: their names take 190 bytes, values and signs about 15 each. An estimate."""
STEP_BYTES = 200
"""A line of metrics.jsonl (198 in a run of 60 steps)."""
DOCUMENT_BYTES = 256 * 2**10
"""Plan, recipe, record and report; a plan with a timeline takes about 80 KiB."""
UNKNOWN_SECONDS = 86400.0
"""A day is taken for a run whose length is not known."""


def estimate_log_bytes(device: Device, *, steps: int | None, seconds: float | None) -> int:
    """DOCUMENT_BYTES + steps * STEP_BYTES + samples * bytes of a sample.

    seconds: the whole run takes
    """
    seconds = UNKNOWN_SECONDS if seconds is None else seconds
    samples = min(seconds, DENSE_SECONDS) / SAMPLE_SECONDS + max(seconds - DENSE_SECONDS, 0.0) / SPARSE_SECONDS
    sample_bytes = GPU_SAMPLE_BYTES if device.kind == "cuda" else CPU_SAMPLE_BYTES
    return DOCUMENT_BYTES + (steps or 0) * STEP_BYTES + int(samples * sample_bytes)
