"""Models over several devices: where a tensor is, and how it gets elsewhere."""

from __future__ import annotations

import torch as t
from jaxtyping import Shaped
from torch import Tensor


def device_of(tensor: Shaped[Tensor, "..."]) -> t.device:
    """Where a tensor is. (Tests put others in its place: they have one device.)"""
    return tensor.device


def moved(tensor: Shaped[Tensor, "..."], device: t.device) -> Shaped[Tensor, "..."]:
    """The tensor on a device; itself, if it is there."""
    return tensor if device_of(tensor) == device else tensor.to(device)
