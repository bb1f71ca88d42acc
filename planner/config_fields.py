"""Reads a config.json's values one by one; an error names the field, its value and what is allowed."""

from __future__ import annotations

import json
from collections.abc import Mapping

from ..recipes.errors import ModelError

# beyond every size of every model, so that a slip of the keyboard is an error and not an endless loop
_LARGEST = 2**31 - 1


class ConfigFields:
    """The values of one config, with its family's defaults for the keys that it lacks.

    config:    the content of config.json, or the text part of a multimodal one
    defaults:  values of missing keys, as in the family's config class in transformers
    keys:      this family's own name of a key where it has one: {"hidden_size": "n_embd"}; both are read
    """

    def __init__(
        self, config: Mapping[str, object], *, defaults: Mapping[str, object], keys: Mapping[str, str] | None = None
    ) -> None:
        self._config = config
        self._defaults = defaults
        self._keys = keys or {}

    def name(self, key: str) -> str:
        """The key as this family, and therefore the reader of an error, knows it."""
        return self._keys.get(key, key)

    def value(self, key: str) -> object:
        for name in (self.name(key), key):
            if name in self._config:
                return self._config[name]
        return self._defaults.get(key)

    def error(self, key: str, allowed: str) -> ModelError:
        written = json.dumps(self.value(key), default=repr)
        return ModelError(f"config.json: {self.name(key)}: {written} is not {allowed}")

    def integer(self, key: str, *, minimum: int = 1) -> int:
        value = self.value(key)
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            raise self.error(key, f"a whole number of {minimum} or more")
        if value > _LARGEST:
            raise self.error(key, f"a whole number of at most {_LARGEST:,}")
        return value

    def optional_integer(self, key: str, *, minimum: int = 1) -> int | None:
        return None if self.value(key) is None else self.integer(key, minimum=minimum)

    def integers(self, key: str) -> tuple[int, ...]:
        value = self.value(key)
        if value is None:
            return ()
        if not isinstance(value, list | tuple) or any(isinstance(x, bool) or not isinstance(x, int) for x in value):
            raise self.error(key, "a list of whole numbers")
        return tuple(value)

    def texts(self, key: str) -> tuple[str, ...] | None:
        value = self.value(key)
        if value is None:
            return None
        if not isinstance(value, list | tuple) or not all(isinstance(item, str) for item in value):
            raise self.error(key, "a list of words")
        return tuple(value)

    def flag(self, key: str) -> bool:
        value = self.value(key)
        if not isinstance(value, bool):
            raise self.error(key, "true or false")
        return value

    def text(self, key: str) -> str:
        value = self.value(key)
        if not isinstance(value, str) or not value:
            raise self.error(key, "a word")
        return value

    def positive_number(self, key: str) -> float | None:
        """A number above 0, or None where the config says null or the family has no such key."""
        value = self.value(key)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float) or not 1e-9 <= value <= 1e9:
            raise self.error(key, "a number above 0 and of usual size")
        return float(value)

    def probability(self, key: str) -> float:
        value = 0.0 if self.value(key) is None else self.value(key)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
            raise self.error(key, "a number from 0 to below 1")
        return float(value)
