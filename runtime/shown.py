"""Text of others on the terminal: nothing in it may move the cursor, change colours or reverse the line."""

from __future__ import annotations

import unicodedata

KEPT = "\n\t"


def show_text(text: str) -> str:
    """The text with control and formatting characters, line ends and tabs excepted, as escapes such as `\\x1b`."""
    return "".join(
        one if one in KEPT or unicodedata.category(one) not in ("Cc", "Cf", "Cs") else _escape(one) for one in text
    )


def _escape(character: str) -> str:
    code = ord(character)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
