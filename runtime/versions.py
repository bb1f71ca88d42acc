"""Versions of the installed libraries that decide memory."""

from __future__ import annotations

import importlib.metadata

PACKAGES = ("fitune", "torch", "transformers", "peft", "bitsandbytes", "accelerate")


def find_versions() -> dict[str, str]:
    """Versions of fitune and of the libraries that decide memory; those that are not installed are left out."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions
