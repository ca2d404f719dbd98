"""What a model's weights are, told cheaply enough to ask before every pass.

Its buffers (rotary frequencies, say) count as weights: outputs depend on them as well.

Whatever is remembered between calls (a prefix's keys and values, biases that belong to no
node) holds for the weights that it was made from. A weight that is replaced, moved or
changed by torch is known by its address and version. `weight.data.copy_(...)` changes
neither, so values are looked at as well: all of them in a small model, and 2 ** 15 of them,
evenly spread, in a larger one.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch as t
from jaxtyping import Float
from torch import Tensor
from torch.nn import Linear, Module

from auto_circuit import devices
from auto_circuit.errors import ModelError
from auto_circuit.utils.torch_state import all_modules

N_SAMPLED = 2**15
"""How many values are looked at in a large model."""

N_SMALL = 2**17
"""A model of so many weights is looked at as a whole."""


QUANTISED = ("Linear8bitLt", "Linear4bit")
"""bitsandbytes' linear maps, which are torch's with packed weights."""


MORE_THAN_WEIGHTS = (
    "There linear maps are taken to be their weights, and some may do more, such as LoRA's: "
    "put adapters into the weights first (`merge_and_unload()`)."
)
"""Why a model may compute something else where its heads can be seen."""


def is_linear(module: object) -> bool:
    """Does a module compute just `x @ dense_weight.T + bias`?"""
    return type(module) is Linear or type(module).__name__ in QUANTISED


def dense_weight(
    linear: Any, dtype: t.dtype | None = None
) -> Float[Tensor, "d_out d_in"]:
    """A linear map's weight as numbers, also of one that bitsandbytes has quantised.

    dtype: that of quantised weights (else float32, or what 4 bits were made from); others are
        given as they are.

    8 bits: a row is `whole numbers * scale / 127`. 4 bits: bitsandbytes' own function. Packed
    weights of other kinds raise ModelError. It is made anew in each call: between calls a
    model takes no more memory than it does.
    """
    weight = linear.weight
    if weight.is_floating_point():
        return weight  # type: ignore[no-any-return]
    kind = type(weight).__name__
    if kind == "Int8Params":
        state = linear.state  # from the first pass on the numbers are there
        numbers = weight.data if state.CB is None else state.CB
        scale = weight.SCB if state.SCB is None else state.SCB
        dense = numbers.float() * (scale.float() / 127).unsqueeze(1)
        return dense.to(dtype or t.float32)
    if kind == "Params4bit":
        if getattr(weight.quant_state, "packing_format_for_cpu", False):
            raise ModelError(
                "bitsandbytes has packed the weights of a Linear4bit for bfloat16 on the "
                "CPU, where they have no gradients. Its first pass does that: give the "
                "model to `load_tl_model` before you run it, or run it on a GPU."
            )
        dense = _bitsandbytes().functional.dequantize_4bit(
            weight.data, weight.quant_state
        )
        return dense if dtype is None else dense.to(dtype)  # type: ignore[no-any-return]
    raise ModelError(
        f"A {type(linear).__name__} has packed weights ({weight.dtype}, {kind}) that cannot "
        "be read as numbers. Load the model in 8 or 4 bits by bitsandbytes, or in bfloat16."
    )


def input_rounding(model: Module) -> float:
    """What a model's linear maps round their inputs to, as a share of the largest; often 0.

    bitsandbytes' maps of 8 bits multiply whole numbers from -127 to 127 by whole numbers, in
    each pass: what they write is no linear function of what they read, but for rounding.
    """
    kinds = {type(module).__name__ for module in all_modules(model)}
    return 0.5 / 127 if "Linear8bitLt" in kinds else 0.0


def keep_differentiable(model: Module) -> None:
    """Keep maps of 4 bits from becoming what has no gradients.

    On a CPU with instructions for bfloat16, bitsandbytes packs them for that in the first
    pass that needs no gradients; no later pass has any then.
    """
    for module in all_modules(model):
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


def has_packed_weights(model: Module) -> bool:
    """Are some of a model's weights not numbers as they are (see `dense_weight`)?"""
    return any(not weight.is_floating_point() for weight in model.parameters())


def _bitsandbytes() -> Any:
    try:
        import bitsandbytes  # type: ignore[import-not-found]
    except ImportError as error:
        raise ModelError(
            "The model's weights are in 4 bits of bitsandbytes, which is not installed: "
            "`pip install bitsandbytes`."
        ) from error
    return bitsandbytes


def has_values(model: Module) -> bool:
    """Are a model's weights there, and not only their shapes (torch's meta device)?"""
    return any(not weight.is_meta for weight in model.parameters())


def check_not_offloaded(model: Module) -> None:
    """Raise ModelError if accelerate keeps weights elsewhere, and loads them in each pass."""
    away = [name for name, weight in model.named_parameters() if weight.is_meta]
    if away and any(hasattr(module, "_hf_hook") for module in all_modules(model)):
        raise ModelError(
            f"{len(away)} weights of this model are offloaded, such as {away[0]!r}: "
            "accelerate loads them for each pass and forgets them after it. Patching reads "
            "them between passes, and gradients keep all of them anyway. Load the model in "
            "a smaller dtype or in 4 bits, or over more GPUs; a device map that names "
            "'cpu' beside GPUs, or 'disk', offloads."
        )


class WeightFingerprint:
    """The weights of a model at one moment, and whether they are still the same.

    A change of a few single weights of a large model by `weight.data[...] = x` may go
    unnoticed; every other change is noticed.
    """

    def __init__(self, model: Module) -> None:
        # The dictionaries themselves, so that a Parameter put in another's place is seen:
        # to walk through a model's modules again takes longer than all the rest.
        self._homes = tuple(filter(None, _homes(model)))
        weights = self._weights()
        self._stamps = [_stamp(weight) for weight in weights]
        total = sum(weight.numel() for weight in weights)
        # Odd: an even stride would see the same columns of every matrix.
        stride = 1 if total <= N_SMALL else total // N_SAMPLED | 1
        groups: dict[tuple[t.device, t.dtype], list[Tensor]] = {}
        for weight in weights:
            if weight.layout == t.strided and weight.numel() and not weight.is_meta:
                place = devices.device_of(weight)
                group = groups.setdefault((place, weight.dtype), [])
                group.append(_sampled(weight, stride))
        with t.no_grad():
            self._samples = [(views, t.cat(views)) for views in groups.values()]

    def _weights(self) -> list[Tensor]:
        return [
            weight
            for home in self._homes
            for weight in home.values()
            if weight is not None
        ]

    def holds(self) -> bool:
        """Are the weights what they were?"""
        if [_stamp(weight) for weight in self._weights()] != self._stamps:
            return False
        with t.no_grad():
            return all(t.equal(t.cat(views), values) for views, values in self._samples)

    def is_of(self, model: Module) -> bool:
        """Are these weights, as they were, weights of this model?"""
        weights = [w for home in _homes(model) for w in home.values() if w is not None]
        addresses = {weight.data_ptr() for weight in weights}
        return self.holds() and all(address in addresses for address, _ in self._stamps)


def _homes(model: Module) -> Iterator[dict[str, Any]]:
    """The dictionaries that hold the weights of all modules."""
    for module in all_modules(model):
        yield from (module._parameters, module._buffers)


def _stamp(weight: Tensor) -> tuple[int, int]:
    return weight.data_ptr(), 0 if weight.is_inference() else weight._version


def _sampled(weight: Tensor, stride: int) -> Tensor:
    """Every so many values in the memory that the weight takes up; nothing is copied."""
    sizes = zip(weight.shape, weight.stride(), strict=True)
    span = 1 + sum((size - 1) * step for size, step in sizes)
    return weight.detach().as_strided((-(-span // stride),), (stride,))
