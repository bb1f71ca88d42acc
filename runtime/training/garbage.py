"""Python's garbage collector while a model trains."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def frozen_garbage() -> Iterator[None]:
    """Inside, collections leave out every object that was there before.

    torch, transformers and a model with adapters are some 500,000 objects, which a full collection goes through one by
    one: a quarter to half a second, now and then in the middle of a step, in which a GPU has nothing to do.
    """
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
