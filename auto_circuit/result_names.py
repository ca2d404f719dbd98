"""What a configuration's results are called: after all that determines them."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from enum import Enum
from typing import Any


class NamesResults:
    """Of a frozen configuration, with a field `out`: the place where its results go."""

    @property
    def json(self) -> str:
        """All that determines the results, as text (the place of `out` does not)."""
        this: Any = self
        fields = {key: value for key, value in asdict(this).items() if key != "out"}
        return json.dumps(fields, indent=2, default=_plain) + "\n"

    @property
    def digest(self) -> str:
        """8 hexadecimal digits: the same for the same configuration, in every process."""
        return hashlib.sha256(self.json.encode()).hexdigest()[:8]


def _plain(value: object) -> object:
    return value.name if isinstance(value, Enum) else str(value)
