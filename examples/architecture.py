"""Micro models whose output is doubled.

A model of your own: `python examples/architecture.py` prints some of its edges and what comes out
when one of them is patched, next to the clean and the corrupt output. What an adapter needs is in
CONTRIBUTING.md.
"""

from __future__ import annotations

from dataclasses import replace

import torch as t
from jaxtyping import Float
from torch import Tensor

import auto_circuit as ac
from auto_circuit.model_utils.micro_model_utils import MICRO_MODEL_ADAPTER, MicroModel


class DoubledModel(MicroModel):
    """A micro model whose output is doubled."""

    def forward(
        self, x: Float[Tensor, "batch seq d_model"]
    ) -> Float[Tensor, "batch seq d_model"]:
        """Twice the micro model's output."""
        return 2 * super().forward(x)


DOUBLED_MODEL_ADAPTER = replace(
    MICRO_MODEL_ADAPTER,
    name="Doubled",
    handles=lambda model: isinstance(model, DoubledModel),
    example=DoubledModel,
)


def main() -> None:
    """Patch one edge, and all of them."""
    model = ac.patchable_model(
        DoubledModel(), factorized=True, adapter=DOUBLED_MODEL_ADAPTER
    )
    clean, corrupt = t.tensor([[[1.0, 2.0]]]), t.tensor([[[3.0, -1.0]]])
    print("Edges:", ", ".join(edge.name for edge in sorted(model.edges)[:4]), "...")
    print("Clean:", model(clean).flatten().tolist())
    print("Corrupt:", model(corrupt).flatten().tolist())
    ablations = ac.src_ablations(model, corrupt)
    for title, edges in {
        "Edge B0.0->Resid End patched": ["B0.0->Resid End"],
        "All edges patched": [edge.name for edge in model.edges],
    }.items():
        with ac.patch_mode(model, ablations, edges):
            print(f"{title}:", model(clean).flatten().tolist())


if __name__ == "__main__":
    main()
