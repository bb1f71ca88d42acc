"""What a dataset is made from: documents cut into passages, or topics."""

from __future__ import annotations

import glob
import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ...recipes.errors import DataError
from ...recipes.make_spec import SpecFile

MAX_DOCUMENT_BYTES = 256 * 2**20
# Where a text may be cut, best first: between paragraphs, lines, sentences, words.
SEPARATORS = (re.compile(r"\n[^\S\n]*\n\s*"), re.compile(r"\n"), re.compile(r"(?<=[.!?。！？])\s+"), re.compile(r"\s+"))


@dataclass(frozen=True, kw_only=True)
class Passage:
    """What one request is about: a part of a document, or a topic.

    source:      the document's path as the spec's folder sees it, or None of a topic
    text:        the passage, or the topic
    start, end:  its characters in the document, from 0, the end excluded; None of a topic
    """

    source: str | None
    text: str
    start: int | None = None
    end: int | None = None


def load_passages(spec_file: SpecFile) -> list[Passage]:
    """All passages or topics of a spec, in order; DataError where there are none or a file cannot be read."""
    source = spec_file.spec.source
    if source.documents is not None:
        written = (source.documents,) if isinstance(source.documents, str) else source.documents
        return _load_documents(spec_file, written, source.chunk_characters)
    if isinstance(source.topics, str):
        topics = _read_topics(spec_file.resolve(source.topics))
    else:
        topics = [topic.strip() for topic in source.topics or ()]
    return [Passage(source=None, text=topic) for topic in dict.fromkeys(topics)]


def hash_passages(passages: list[Passage]) -> str:
    """SHA-256 in hexadecimal of what the passages say, in order."""
    digest = hashlib.sha256()
    for one in passages:
        digest.update(f"{one.source}\0{one.text}\0".encode())
    return digest.hexdigest()


def cut_text(text: str, most: int) -> Iterator[tuple[int, int]]:
    """(start, end) of passages of at most `most` characters that together hold every word of the text, in order.

    Each is as long as it can be and ends at the best separator in its second half, so that few are short.
    """
    start = 0
    while start < len(text):
        if text[start].isspace():
            start += 1
            continue
        end = _find_end(text, start, most)
        stripped = len(text[start:end].rstrip())
        yield start, start + stripped
        start = end


def _find_end(text: str, start: int, most: int) -> int:
    if len(text) - start <= most:
        return len(text)
    for separator in SEPARATORS:
        cuts = [match.start() for match in separator.finditer(text, start + most // 2, start + most + 1)]
        if cuts:
            return cuts[-1]
    return start + most


def _load_documents(spec_file: SpecFile, patterns: tuple[str, ...], most: int) -> list[Passage]:
    folder = spec_file.path.parent
    paths: dict[Path, None] = {}
    for pattern in patterns:
        path = spec_file.resolve(pattern)
        # Not Path.glob: the spec's own folder may have a name with brackets, which must not count as a pattern.
        matches = glob.glob(str(Path(pattern).expanduser()), root_dir=folder, recursive=True)  # noqa: PTH207
        names = [pattern] if path.is_file() else sorted(matches)
        files = [found for name in names if (found := spec_file.resolve(name)).is_file()]
        if not files:
            hint = f': a folder is written as a glob such as "{pattern}/**/*.md"' if path.is_dir() else ""
            raise DataError(f"{spec_file.path}: source.documents: no file matches {pattern}{hint}")
        paths |= dict.fromkeys(files)
    passages = []
    for path in paths:
        text = _read_document(path)
        name = str(path.relative_to(folder)) if path.is_relative_to(folder) else str(path)
        passages += [
            Passage(source=name, text=text[start:end], start=start, end=end) for start, end in cut_text(text, most)
        ]
    if not passages:
        raise DataError(f"{spec_file.path}: source.documents: all documents are empty")
    return passages


def _read_document(path: Path) -> str:
    try:
        if path.stat().st_size > MAX_DOCUMENT_BYTES:
            raise DataError(f"{path}: is larger than 256 MiB: split it")
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        hint = "a PDF, Word or HTML file has to be converted to text first"
        raise DataError(f"{path}:{line}: not UTF-8 text: byte 0x{content[error.start]:02x} ({hint})") from error
    if "\0" in text:
        raise DataError(f"{path}: is not text: it holds null characters")
    return text


def _read_topics(path: Path) -> list[str]:
    if not path.is_file():
        raise DataError(f"source.topics: {path}: no such file; topics of the spec itself are a list of texts")
    topics = [line.strip() for line in _read_document(path).splitlines() if line.strip() and not line.startswith("#")]
    if not topics:
        raise DataError(f"source.topics: {path}: no topic in it: write one a line")
    return topics
