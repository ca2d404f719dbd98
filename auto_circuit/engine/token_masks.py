"""Masks of single prompts and tokens, for those who want gradients of each.

A mask says how much an edge is patched at a position (or span, or everywhere), in all prompts;
each use of it, by one token of one prompt, can be told apart by its gradient.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from jaxtyping import Float
from torch import Tensor

Uses = Float[Tensor, "_batch *_token_or_head _row _col"]
"""[batch token row src] of edges from sources; [batch head token token] of crossing ones."""


@dataclass(eq=False)
class TokenMasks:
    """What the masks of a pass are at each token, as leaves of its graph.

    uses: by destination module. score_changes, patterns: [batch head token token] of the
    destinations that are keys: how far each score is from that with the patched key, and how
    much is read.
    """

    uses: dict[str, Uses] = field(default_factory=dict)
    score_changes: dict[str, Float[Tensor, "batch head token token"]] = field(
        default_factory=dict
    )
    patterns: dict[str, Float[Tensor, "batch head token token"]] = field(
        default_factory=dict
    )

    def leaf(self, name: str, mask: Uses, *leading: int) -> Uses:
        """The mask with these leading dimensions, as a leaf of its own."""
        shape = (*leading, *mask.shape[len(leading) :])
        use = mask.detach().expand(shape).clone().requires_grad_()
        self.uses[name] = use
        return use
