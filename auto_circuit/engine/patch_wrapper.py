"""The patch masks: one PatchWrapper for each module that is a node site.

A wrapper holds the only state that outlives a call: its mask, and how the mask's values
are read. What a forward pass leaves behind lives in `patch_session`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch as t
from jaxtyping import Float
from torch import Tensor
from torch.nn import Module, Parameter

from auto_circuit.errors import ConfigError, GoneError, GraphError
from auto_circuit.gates import sample_hard_concrete
from auto_circuit.precision import mask_dtype
from auto_circuit.types import MaskFn, PatchWrapper
from auto_circuit.utils.torch_state import own_computation

_ACTIVATIONS = (
    "activations are nobody's state. `src_ablations` computes them, and "
    "`patch_mode(model, patch_src_outs, curr_src_outs=buffer)` stores a pass's"
)
GONE_ATTRIBUTES = {
    "curr_src_outs": _ACTIVATIONS,
    "patch_src_outs": _ACTIVATIONS,
    "patch_mode": "patches act inside of `graph_utils.patch_mode` alone",
    "dropout_layer": "`graph_utils.mask_fn_mode(model, mask_fn, dropout_p)` sets the dropout",
    "module": "it wraps no module: `module_by_name(model.wrapped_model, name)` is the one "
    "that is patched",
}
"""What auto-circuit's wrappers had -> what is there in its place."""

MaskWeights = Float[Tensor, "mask_batch mask_seq mask_head src"]
"""A mask as it is used; batch, positions and heads are 1 where it tells none apart."""
Mask = Float[Tensor, "*batch_seq_head src"]
"""A mask as it is kept: [src], or with those of batch, seq and head that it tells apart."""


class PatchWrapperImpl(PatchWrapper):
    """The state of one node site.

    module_name: the module that the wrapper stands at.
    head_dim: the dimension of the module's activation that counts heads, or None.
    seq_dim: the dimension that counts positions if each has a mask of its own, or None.
    is_src, src_idxs: the sources that the module's output contains.
    is_dest, patch_mask, in_srcs: the mask [seq?, head?, src] of the edges from the
        sources `in_srcs` into the module.

    `train()` mode makes `dropout_p` effective. The mask's
    Parameter stays the same object when it gets a batch dimension; a wrapper is not in the
    model and runs nothing, so that it has no hooks (GraphError), no `module`, and no
    activations (GoneError says where they are).
    """

    def __init__(
        self,
        module_name: str,
        head_dim: int | None = None,
        seq_dim: int | None = None,
        is_src: bool = False,
        src_idxs: slice | None = None,
        is_dest: bool = False,
        patch_mask: Mask | None = None,
        in_srcs: slice | None = None,
    ) -> None:
        if isinstance(head_dim, Module):
            raise ConfigError(
                f"`head_dim` is a {type(head_dim).__name__}: a PatchWrapper takes no module "
                "(see `patchable_model`)."
            )
        super().__init__()
        self.module_name = module_name
        self.head_dim = head_dim
        self.seq_dim = seq_dim
        self.is_src = is_src
        self.src_idxs = src_idxs
        self.is_dest = is_dest
        self.in_srcs = in_srcs
        self.patch_mask = None
        if patch_mask is not None:
            self.patch_mask = Parameter(patch_mask, requires_grad=False)
        self.mask_fn: MaskFn = None
        self.dropout_p = 0.0
        self.generator: t.Generator | None = None
        self.mask_batch_size: int | None = None
        # (How many examples randomness is drawn for, those of them that a pass has.)
        self.drawn: tuple[int, slice] | None = None
        self.eval()

    def __getattr__(self, name: str) -> Any:
        if name in GONE_ATTRIBUTES:
            raise _gone(name)
        return super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in GONE_ATTRIBUTES:
            raise _gone(name)
        super().__setattr__(name, value)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Raises GraphError: a wrapper runs nothing."""
        raise _runs_nothing(self)

    def _refuse_hook(self, *args: Any, **kwargs: Any) -> Any:
        raise _runs_nothing(self)

    register_forward_hook = register_forward_pre_hook = _refuse_hook  # type: ignore[assignment]
    register_full_backward_hook = register_full_backward_pre_hook = _refuse_hook  # type: ignore[assignment]

    @property
    def batch_size(self) -> int | None:
        """auto-circuit's name of `mask_batch_size`."""
        return self.mask_batch_size

    @property
    def mask(self) -> Parameter:
        """The mask of a destination."""
        assert self.patch_mask is not None, f"{self.module_name} is no destination"
        return self.patch_mask

    @property
    def one_mask(self) -> Mask:
        """The mask's values; where every example has its own, the first one's."""
        return self.mask.data if self.mask_batch_size is None else self.mask.data[0]

    def set_mask_batch_size(self, batch_size: int | None) -> None:
        """Repeat the mask for each of `batch_size` examples, or keep the first's (None).

        Raises ConfigError if the mask has a batch dimension already.
        """
        if batch_size is None:
            if self.mask_batch_size is not None:
                self._replace_mask(self.mask.data[0])
        elif self.mask_batch_size is not None:
            raise ConfigError(
                f"The mask of {self.module_name} has a batch dimension already "
                f"({self.mask_batch_size}). Leave one `set_mask_batch_size` before you "
                "enter the next."
            )
        else:
            self._replace_mask(self.mask.data.expand(batch_size, *self.mask.shape))
        self.mask_batch_size = batch_size

    def _replace_mask(self, values: Mask) -> None:
        # Same Parameter, other shape: `patch_masks` dictionaries stay true. A model may
        # keep parts of its last pass (attention patterns), and with them the graph's idea
        # of the mask's shape; PyTorch drops it when the data change their type.
        with own_computation():
            self.mask.data = values.to(
                t.float16 if values.dtype != t.float16 else t.float32
            )
            self.mask.data = values.clone()
        self.mask.grad = None

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Module:
        """As `Module._apply` (`.to()`, `.half()` ...), but masks stay float32 at least."""
        super()._apply(fn, recurse)
        if self.patch_mask is not None:
            self.patch_mask.data = self.patch_mask.data.to(mask_dtype(self.mask.dtype))
        return self

    def mask_weights(self, batch_size: int) -> MaskWeights:
        """The share of each edge that is patched, after mask function and dropout.

        One independent hard-concrete sample per example.
        """
        weights = self.mask
        has_batch = self.mask_batch_size is not None
        if self.mask_fn == "hard_concrete":
            n_drawn, rows = self.drawn or (batch_size, None)
            weights = sample_hard_concrete(
                weights, n_drawn, has_batch, self.generator, rows
            )
            has_batch = True
        elif self.mask_fn == "sigmoid":
            weights = t.sigmoid(weights)
        if self.dropout_p > 0.0 and self.training:
            weights = weights * self._dropout_factors(weights, has_batch)
        # A mask [5 src] of 5 heads becomes [1 1 5 src]; one [7 src] of 7 positions of an MLP
        # becomes [1 7 1 src]; with a mask for each of 3 examples it is [3 7 1 src].
        if not has_batch:
            weights = weights.unsqueeze(0)
        if self.seq_dim is None:
            weights = weights.unsqueeze(1)
        if self.head_dim is None:
            weights = weights.unsqueeze(-2)
        return weights

    def _dropout_factors(self, weights: Mask, has_batch: bool) -> Mask:
        shape, rows = weights.shape, None
        if has_batch and self.drawn is not None:
            n_drawn, rows = self.drawn
            shape = t.Size([n_drawn, *shape[1:]])
        # Not torch's dropout: that one draws from the caller's global generator.
        noise = t.rand(
            shape,
            generator=self.generator,
            device=weights.device,
            dtype=weights.dtype,
        )
        noise = noise if rows is None else noise[rows]
        return (noise >= self.dropout_p).to(weights.dtype) / (1 - self.dropout_p)

    def extra_repr(self) -> str:
        """The site's name and role."""
        roles = ["source"] * self.is_src + ["destination"] * self.is_dest
        return f"{self.module_name!r}, {' and '.join(roles)}"


def _gone(name: str) -> GoneError:
    return GoneError(f"A PatchWrapper has no `{name}`: {GONE_ATTRIBUTES[name]}.")


def _runs_nothing(wrapper: PatchWrapperImpl) -> GraphError:
    return GraphError(
        f"The PatchWrapper at {wrapper.module_name!r} holds a mask and runs nothing, so it "
        "cannot be called, and its hooks would never fire. Put them on the module itself: "
        f"`module_by_name(model.wrapped_model, {wrapper.module_name!r})`."
    )
