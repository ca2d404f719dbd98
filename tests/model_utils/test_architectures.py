"""Every family of Hugging Face models, against the same model with plain hooks."""

from __future__ import annotations

import random

import pytest
import torch as t

from auto_circuit.errors import ModelError
from auto_circuit.utils.ablation_activations import src_ablations
from auto_circuit.utils.graph_utils import patch_mode, patchable_model
from tests.architectures import FAMILIES
from tests.models import tokens
from tests.plain_patching import in_float64, patch_each_edge

FAST = ("gpt2", "llama")
on_all_families = pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=() if n in FAST else pytest.mark.slow) for n in FAMILIES],
)
CLEAN, CORRUPT = tokens(1, 6, seed=1), tokens(1, 6, seed=2)
N_EDGES = 60


@on_all_families
def test_single_edges_are_those_of_plain_hooks(name: str) -> None:
    family = FAMILIES[name]
    with in_float64(), t.no_grad():
        try:
            bridge = family.bridge(t.float64)
            model = patchable_model(bridge, True, None, separate_qkv=True)
        except (ModelError, RuntimeError) as error:
            pytest.skip(f"not supported: {error}")
        edges = random.Random(0).sample(list(model.edges), N_EDGES)
        names = [(edge.src.name, edge.dest.name) for edge in edges]
        if family.plan is None or {"A0", "A1"} & {src for src, _ in names}:
            pytest.skip("whole layers are sources")
        plain, patch = family.plain(t.float64), src_ablations(model, CORRUPT)
        expected = patch_each_edge(plain, CLEAN, CORRUPT, names)
        for edge, of_edge in zip(edges, expected, strict=True):
            with patch_mode(model, patch, [edge]):
                t.testing.assert_close(model(CLEAN)[0], of_edge, rtol=0.0, atol=1e-10)
        change = (expected - plain.logits(CLEAN)).abs().amax((1, 2))
        assert change.median() > 1e-3
