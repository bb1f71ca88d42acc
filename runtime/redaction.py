"""Tokens of services and passwords, hidden wherever text leaves the program: terminals, logs and reports."""

from __future__ import annotations

import os
import re
from functools import cache

HIDDEN = "***"
SECRET_VARIABLE = re.compile(r"(TOKEN|API_KEY|ACCESS_KEY|SECRET|PASSWORD)$", re.IGNORECASE)
"""Names of environment variables that hold what must not be shown, such as HF_TOKEN or OPENAI_API_KEY."""
SHORTEST_SECRET = 8
"""Shorter values are words that stand elsewhere too, such as `true`."""
SECRET = re.compile(r"\b(?:hf_|hf-|sk-|ghp_|github_pat_|glpat-)[A-Za-z0-9_-]{16,}")
"""Tokens of the Hugging Face hub, OpenAI, GitHub and GitLab."""
USER_IN_URL = re.compile(r"(?<=://)[^/@\s]+(?=@)")


def redact(text: str) -> str:
    """The text with tokens and passwords replaced by `***`: those of the environment, in URLs, and of known forms."""
    for secret in _find_secrets(tuple(os.environ.items())):
        text = text.replace(secret, HIDDEN)
    return SECRET.sub(HIDDEN, USER_IN_URL.sub(HIDDEN, text))


@cache
def _find_secrets(environment: tuple[tuple[str, str], ...]) -> tuple[str, ...]:
    """Longest first, so that none is cut by another."""
    found = {value for name, value in environment if SECRET_VARIABLE.search(name) and len(value) >= SHORTEST_SECRET}
    return tuple(sorted(found, key=len, reverse=True))
