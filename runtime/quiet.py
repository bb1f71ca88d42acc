"""Keeps libraries' progress bars and remarks out of fitune's own output."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """Silence progress bars, log lines below errors, and warnings of the libraries; exceptions pass through."""
    from transformers.utils import logging as transformers_logging

    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    bitsandbytes = logging.getLogger("bitsandbytes")
    level = bitsandbytes.level
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    bitsandbytes.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
        bitsandbytes.setLevel(level)


def quiet_bitsandbytes_import() -> None:
    """bitsandbytes 0.50 warns on every import on a CPU that the optional package `kernels` is missing; it means
    nothing."""
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
