"""What a page holds, zipped: text that stands anywhere, and that its JavaScript unzips.

`src/packed.js` reads it.
"""

from __future__ import annotations

import base64
import gzip
import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from auto_circuit.explorer.data import AlgorithmView, TaskView
from auto_circuit.explorer.plain_data import as_data


def zipped(content: bytes) -> str:
    """Base64 of gzip, the same for the same content."""
    return base64.b64encode(gzip.compress(content, mtime=0)).decode("ascii")


def packed(views: Sequence[TaskView]) -> str:
    """Some tasks, zipped: JSON's length (uint32, little-endian), JSON, all arrays' bytes.

    In the JSON an array is {dtype, shape, at}; `at` is where its bytes begin: the first of
    each number, then the second of each, and so on, since alike ones that lie together zip
    well. For the same reason `scores` and `plus_minus` are in the order of `order` here.
    """
    arrays = bytearray()

    def placed(array: np.ndarray) -> dict[str, Any]:
        at = len(arrays)
        little = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
        arrays.extend(little.reshape(-1, 1).view(np.uint8).T.tobytes())
        return {"dtype": array.dtype.name, "shape": list(array.shape), "at": at}

    tasks = [
        as_data(replace(view, algorithms=tuple(map(_by_rank, view.algorithms))), placed)
        for view in views
    ]
    text = json.dumps({"tasks": tasks}, allow_nan=False, separators=(",", ":")).encode()
    return zipped(len(text).to_bytes(4, "little") + text + arrays)


def _by_rank(algorithm: AlgorithmView) -> AlgorithmView:
    order, half = algorithm.order, algorithm.plus_minus
    return replace(
        algorithm,
        scores=algorithm.scores[order],
        plus_minus=None if half is None else half[order],
    )
