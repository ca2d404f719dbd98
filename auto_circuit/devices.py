"""Where a tensor is, and how numbers get to a device and back."""

from __future__ import annotations

from collections.abc import Sequence

import torch as t
from jaxtyping import Int, Shaped
from torch import Tensor


def device_of(tensor: Shaped[Tensor, "..."]) -> t.device:
    """Where a tensor is. (Tests put others in its place: they have one device.)"""
    return tensor.device


def moved(tensor: Shaped[Tensor, "..."], device: t.device) -> Shaped[Tensor, "..."]:
    """The tensor on a device; itself, if it is there."""
    return tensor if device_of(tensor) == device else tensor.to(device)


def index_tensor(idxs: Sequence[int], device: t.device) -> Int[Tensor, "index"]:
    """Indices as a tensor on a device.

    `t.tensor(idxs, device=...)`, and a list as an index, would wait until a GPU has finished
    all that it was given before.
    """
    if device.type != "cuda":
        return t.tensor(idxs, dtype=t.int64, device=device)
    pinned = t.tensor(idxs, dtype=t.int64, device="cpu", pin_memory=True)
    return pinned.to(device, non_blocking=True)


def low_and_high(indices: Int[Tensor, "*dims"]) -> tuple[int, int]:
    """The smallest and the largest; of none (0, 0). A GPU waits once, not for each."""
    if not indices.numel():
        return 0, 0
    low, high = t.stack(indices.aminmax()).tolist()
    return low, high
