"""What a configuration's results are called: after all that determines them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, fields
from enum import Enum
from typing import Any

ONLY_IF_GIVEN: Mapping[str, bool] = {"only if given": True}
"""The metadata of a field that came when there were results already: where it has its default,
they are called what they were called without it."""


class NamesResults:
    """Of a frozen configuration, with a field `out`: the place where its results go."""

    @property
    def json(self) -> str:
        """All that determines the results, as text (the place of `out` does not)."""
        this: Any = self
        left_out = {"out"} | {
            field.name
            for field in fields(this)
            if field.metadata == ONLY_IF_GIVEN
            and getattr(this, field.name) == field.default
        }
        named = {key: value for key, value in asdict(this).items() if key not in left_out}
        return json.dumps(named, indent=2, default=_plain) + "\n"

    @property
    def digest(self) -> str:
        """8 hexadecimal digits: the same for the same configuration, in every process."""
        return hashlib.sha256(self.json.encode()).hexdigest()[:8]


def _plain(value: object) -> object:
    return value.name if isinstance(value, Enum) else str(value)


def slug(text: str) -> str:
    """A text as part of a file's name."""
    words = "".join(c if c.isalnum() else " " for c in text.lower())
    return "-".join(words.split())
