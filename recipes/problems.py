"""What is wrong with a TOML document, in words: pydantic's findings become one problem a key.

What is allowed is read from the document's JSON schema, so a message and an editor's completion cannot disagree.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from .errors import Problem

Key = tuple[str | int, ...]
Node = Mapping[str, Any]

_SHOWN_CHARACTERS = 60
_NUMBER = re.compile(r"\s*[+-]?[0-9]+(\.[0-9]+)?([eE][+-]?[0-9]+)?\s*")


def make_problems(
    error: ValidationError, given: Mapping[str, Any], locate: Callable[[Key], str], schema: Node
) -> list[Problem]:
    """One problem for each key of `given` that pydantic objects to; `locate` says where a key was written.

    `schema` is the document's JSON schema; its title is what a message calls the document.
    """
    root = _follow_references(schema, schema.get("$defs", {}))
    findings: dict[Key, list[dict[str, Any]]] = {}
    for finding in error.errors(include_url=False, include_input=False):
        if finding["type"] != "default_factory_not_called":  # only ever follows from another finding
            findings.setdefault(_find_key(finding["loc"], root), []).append(dict(finding))
    # A union reports each of its branches: where one of them went deeper, it is the one that was meant.
    deepest = [key for key in findings if not any(other[: len(key)] == key and other != key for other in findings)]
    return [problem for key in deepest for problem in _make_key_problems(key, findings[key], given, locate, root)]


def find_nearest(word: str, words: Iterable[str]) -> str | None:
    """The one of `words` that was probably meant, None if none is near."""
    matches = difflib.get_close_matches(word, list(words), n=1)
    return matches[0] if matches else None


def render_key(key: Key) -> str:
    """`data.train[0].weight`; a name that TOML would quote is quoted."""
    text = ""
    for part in key:
        if isinstance(part, int):
            text += f"[{part}]"
        else:
            text += ("." if text else "") + (part if re.fullmatch(r"[A-Za-z0-9_-]+", part) else _shorten(_quote(part)))
    return text


def _make_key_problems(
    key: Key,
    findings: Sequence[Mapping[str, Any]],
    given: Mapping[str, Any],
    locate: Callable[[Key], str],
    root: Node,
) -> list[Problem]:
    kinds = {finding["type"] for finding in findings}
    if "extra_forbidden" in kinds:
        return [_make_unknown_key(key, locate, root)]
    node = _find_node(key, root)
    if "missing" in kinds:
        keys = [(*key, name) for name in node.get("required", [])] or [key]
        return [
            Problem(where=locate(k), what="is required and missing", hint=_find_node(k, root).get("description"))
            for k in keys
        ]
    reasons = [str(finding["ctx"]["error"]) for finding in findings if finding["type"] == "value_error"]
    if reasons:
        return [Problem(where=locate(key), what=reasons[0])]
    value = _find_value(key, given)
    what = f"{_render_value(value)} is not {_describe(node)}"
    return [Problem(where=locate(key), what=what, hint=_make_hint(value, node))]


def _make_unknown_key(key: Key, locate: Callable[[Key], str], root: Node) -> Problem:
    *parents, name = key
    known = list(_find_node(tuple(parents), root)["properties"])
    owners = [table for table in root["properties"] if name in _find_node((table,), root)["properties"]]
    nearest = find_nearest(str(name), known)
    if owners:
        hint = f"it is a key of [{'], ['.join(owners)}]"
    elif nearest:
        hint = f'did you mean "{nearest}"?'
    else:
        hint = f"allowed: {', '.join(known)}"
    document = root["title"].lower()
    what = f"is not a key of [{render_key(tuple(parents))}]" if parents else f"is not a table of a {document}"
    return Problem(where=locate(key), what=what, hint=hint)


def _make_hint(value: object, node: Node) -> str | None:
    if isinstance(value, list) and node.get("type") == "object":
        return "a table is written [name], not [[name]]"
    if not isinstance(value, str):
        return None
    nearest = find_nearest(value, [choice for choice in _find_choices(node) if isinstance(choice, str)])
    if nearest:
        return f'did you mean "{nearest}"?'
    is_bool = value in ("true", "false") and True in _find_choices(node)
    is_number = _NUMBER.fullmatch(value) and any(arm.get("type") in ("integer", "number") for arm in _find_arms(node))
    return f"write {value.strip()} without quotes" if is_bool or is_number else None


def _follow_references(node: Any, definitions: Node) -> Any:
    """The schema with every reference replaced by what it names; what stands beside a reference stays."""
    if isinstance(node, list):
        return [_follow_references(one, definitions) for one in node]
    if not isinstance(node, Mapping):
        return node
    named = definitions[node["$ref"].rpartition("/")[2]] if "$ref" in node else {}
    whole = {**named, **{key: value for key, value in node.items() if key not in ("$ref", "$defs")}}
    return {key: _follow_references(value, definitions) for key, value in whole.items()}


def _find_arms(node: Node) -> list[Node]:
    """The branches of a union, or the node itself."""
    arms: list[Node] = node.get("anyOf", [node])
    return arms


def _find_child(node: Node, part: str | int) -> Node | None:
    """The node of a key or list item; None where `part` only names a branch of a union."""
    for arm in _find_arms(node):
        if isinstance(part, int) and "items" in arm:
            return _find_arms(arm["items"])[0]
        if isinstance(part, str) and "properties" in arm:
            child: Node = arm["properties"].get(part, {})
            return child
    return None


def _find_key(location: Sequence[str | int], root: Node) -> Key:
    key: list[str | int] = []
    node = root
    for part in location:
        child = _find_child(node, part)
        if child is not None:
            key.append(part)
            node = child
    return tuple(key)


def _find_node(key: Key, root: Node) -> Node:
    node = root
    for part in key:
        node = _find_child(node, part) or {}
    return node


def _find_value(key: Key, given: Mapping[str, Any]) -> object:
    value: Any = given
    for part in key:
        value = value[part]
    return value


def _find_choices(node: Node) -> list[str | bool]:
    choices: list[str | bool] = []
    for arm in _find_arms(node):
        choices += arm.get("enum", [arm["const"]] if "const" in arm else [])
        choices += [True, False] if arm.get("type") == "boolean" else []
    return choices


def _describe(node: Node) -> str:
    """What is allowed, such as `"auto" or a whole number from 1 to 64`."""
    choices = _find_choices(node)
    words = [_describe_type(arm) for arm in _find_arms(node) if not _find_choices(arm)]
    if len(choices) > 1:
        words.insert(0, f"one of {_join_choices(choices)}")
    elif choices:
        words.insert(0, _render_value(choices[0]))
    return " or ".join(words)


def _join_choices(choices: Iterable[str | bool]) -> str:
    return ", ".join(choice if isinstance(choice, str) else _render_value(choice) for choice in choices)


def _describe_type(node: Node) -> str:
    match node.get("type"):
        case "integer":
            return f"a whole number from {node['minimum']} to {node['maximum']}"
        case "number":
            limits = {
                "minimum": "at least",
                "exclusiveMinimum": "above",
                "maximum": "at most",
                "exclusiveMaximum": "below",
            }
            return "a number " + " and ".join(f"{limits[name]} {node[name]:.15g}" for name in limits if name in node)
        case "array":
            item = _find_arms(node["items"])[0]
            choices, keys = _find_choices(item), list(item.get("properties", []))
            what = _join_choices(choices) if choices else f"tables {{{', '.join(keys)}}}" if keys else "texts"
            return f"a non-empty list of {what}"
        case "object":
            return "a table"
    if "examples" in node:
        return f"a size with its unit, such as {' or '.join(map(_quote, node['examples']))}"
    return "text"


def _render_value(value: object) -> str:
    """The value as TOML would have it, cut to what fits into a message."""
    if isinstance(value, list):
        return _shorten(f"[{', '.join(_render_scalar(item) for item in value[:_SHOWN_CHARACTERS])}]")
    return _shorten(_render_scalar(value))


def _render_scalar(value: object) -> str:
    if isinstance(value, str):
        return _quote(value)
    if isinstance(value, bool) or value is None:
        return json.dumps(value)
    if isinstance(value, int) and value.bit_length() > 1000:
        return hex(value)  # Python refuses to write thousands of decimal digits
    if isinstance(value, list):
        return "a list"
    return "a table" if isinstance(value, dict) else str(value)


def _quote(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _shorten(text: str) -> str:
    return text if len(text) <= _SHOWN_CHARACTERS else text[: _SHOWN_CHARACTERS - 1] + "…"
