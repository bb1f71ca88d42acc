"""Python's collector of cycles, kept out of rehearsals."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def collector_paused() -> Iterator[None]:
    """Inside, cycles of objects are not looked for: that takes a fifth of a rehearsal, and would free storages at
    moments that depend on all that the process did before."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
