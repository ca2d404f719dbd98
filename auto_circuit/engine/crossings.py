"""Edges that lead through attention: what a head reads at a position of all positions.

At position j a head reads `sum_i p_ij v_i`, with the pattern `p_j = softmax_i(s_ij)` of scores
`s_ij` of its query at j and its key at i. Let `v*_i` and `k*_i` be value and key in the run
that is patched in, and `s*_ij` the score of the query at j with `k*_i`. To patch the edges from
i to j by the weights m and n is to let the head read

    sum_i p_ij (v_i + m_ij (v*_i - v_i)),    p_j = softmax_i(s_ij + n_ij (s*_ij - s_ij)).

`v_i` and `k_i` are those of *this* pass, where their own inputs may be patched. What they are
in the other run needs no recording: it follows from what its sources wrote, as the residual
stream does that attention read there (`PatchSession._patched_base`).

Both sums go through the model's own products, by keys and values that are added to its own:
`k*_i` to the keys, and `v*_i - v_i`, read with the pattern `m_ij p_ij`, to the values. PyTorch
then gives all gradients.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch as t

from auto_circuit.engine.edge_matrices import TokenPairs
from auto_circuit.engine.token_masks import TokenMasks
from auto_circuit.model_utils.model_adapter import (
    AttentionReader,
    HeadVectors,
    Scores,
)


class _Recorded(Exception):
    """Keys and values have been seen; the rest of the pass is not needed."""


@dataclass(eq=False)
class AttentionPatches(AttentionReader):
    """What the pass that is running does to one block's attention.

    pairs: the weights of the edges that do something; patched: keys and values in the run
    that is patched in. token_masks: what asks for the scores' changes too, if anything does.
    """

    pairs: dict[str, TokenPairs] = field(default_factory=dict)
    patched: dict[str, HeadVectors] = field(default_factory=dict)
    token_masks: TokenMasks | None = None
    names: Mapping[str, str] = field(default_factory=dict)
    is_recording: bool = False

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Inside, a pass of the attention ends when its keys and values are known."""
        self.is_recording = True
        try:
            yield
        except _Recorded:
            pass
        finally:
            self.is_recording = False

    def further_keys(self, keys: HeadVectors) -> HeadVectors | None:
        """Those of the run that is patched in."""
        if self.is_recording:
            self.patched["key"] = keys
            return None
        return self.patched.pop("key") if "key" in self.pairs else None

    def further_values(self, values: HeadVectors) -> HeadVectors | None:
        """How far the values are from those of the run that is patched in."""
        if self.is_recording:
            self.patched["value"] = values
            # Both are known: what the heads make of them is not asked for.
            raise _Recorded
        # Added to the model's own: what each position reads of it is its share.
        return self.patched.pop("value") - values if "value" in self.pairs else None

    def scores(self, own: Scores, further: Scores) -> Scores:
        """`s + n (s* - s)`; the positions of a prefix, which come first, are what they are."""
        n_prefix = own.shape[-1] - further.shape[-1]
        # Of 2 positions in the prefix and 3 of the input, 5 scores: the last 3 change.
        change = further - own[..., n_prefix:]
        if self.token_masks is not None:
            self.token_masks.score_changes[self.names["key"]] = change.detach()
        added = self.pairs.pop("key").to(change.dtype) * change
        return own + (t.nn.functional.pad(added, (n_prefix, 0)) if n_prefix else added)

    def further_pattern(self, pattern: Scores) -> Scores | None:
        """`m p`."""
        if self.token_masks is not None:
            n_tokens = pattern.shape[-2]
            self.token_masks.patterns[self.names["key"]] = pattern.detach()[
                ..., -n_tokens:
            ]
        pairs = self.pairs.pop("value", None)
        if pairs is None:
            return None
        return pairs.to(pattern.dtype) * pattern[..., -pairs.shape[-1] :]
