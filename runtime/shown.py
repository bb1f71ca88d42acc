"""Text of others on the terminal: nothing in it may move the cursor, change colours or reverse the line."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

from .redaction import redact

KEPT = "\n\t\u200c\u200d"
"""Line ends, tabs, and the joiners that Persian and composed emoji are written with: none of them moves anything."""


def show_text(text: str) -> str:
    """The text with escapes such as `\\x1b` for control and formatting characters, KEPT ones excepted."""
    return "".join(
        one if one in KEPT or unicodedata.category(one) not in ("Cc", "Cf", "Cs") else _escape(one) for one in text
    )


def _escape(character: str) -> str:
    code = ord(character)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


class ShownConsole(Console):
    """A terminal on which nothing that is printed is obeyed, wherever it came from; rich's own codes are."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """What is printed, in segments, each text shown by `show_text` and without tokens."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(show_text(redact(segment.text)), segment.style)
