"""Settings of every test: hypothesis measures no time, which differs between machines."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("fitune", deadline=None)
settings.load_profile("fitune")
