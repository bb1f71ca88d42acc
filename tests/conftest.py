"""Settings of every test: hypothesis measures no time, which differs between machines; a worker has one thread."""

from __future__ import annotations

import os

from hypothesis import settings

os.environ.pop("COLUMNS", None)  # of the tests' own terminal, or of their workers
os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is imported, here and in commands

settings.register_profile("fitune", deadline=None)
settings.load_profile("fitune")
