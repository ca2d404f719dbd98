"""The size of what a node writes, against its own activations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch as t

from auto_circuit.prune_algos.activation_magnitude import (
    activation_magnitude_prune_scores,
)
from auto_circuit.utils.ablation_activations import src_ablations
from auto_circuit.utils.graph_utils import patchable_model
from tests.micro import micro_loader, micro_model
from tests.models import gpt2
from tests.prune_algos.test_mask_gradient import switches
from tests.test_data import RAGGED, load
from tests.test_prune import token_loader
from tests.texts import text_model, word_tokenizer, write_prompts


@pytest.mark.parametrize("factorized", [True, False])
@pytest.mark.parametrize("seq_len", [None, 5], ids=["all", "positions"])
def test_an_edge_has_its_own_source_s_magnitude(
    factorized: bool, seq_len: int | None
) -> None:
    """In unfactorized graphs, auto-circuit gave edges the values of other nodes."""
    bridge: Any = gpt2()
    model = patchable_model(bridge, factorized, "last_seq", seq_len, separate_qkv=True)
    scores = activation_magnitude_prune_scores(model, token_loader(5, 2), None)
    stored: dict[str, t.Tensor] = {}

    def store(name: str) -> Any:
        # By closure: some hook points have several names.
        def hook(value: t.Tensor, hook: Any) -> None:
            stored[name] = value

        return hook

    names = {src.module_name for src in model.srcs}
    (batch,) = token_loader(5, 5)
    with switches(bridge), t.no_grad():
        bridge.run_with_hooks(
            batch.clean, fwd_hooks=[(name, store(name)) for name in names]
        )
    for edge in model.edges:
        written = stored[edge.src.module_name]
        if edge.src.head_idx is not None:
            written = written[:, :, edge.src.head_idx]
        expected = float(written.abs().mean())
        assert float(edge.prune_score(scores)) == pytest.approx(expected, rel=1e-4)


def test_opposite_activations_do_not_cancel() -> None:
    """auto-circuit took the mean before the absolute value."""
    model = micro_model()
    scores = activation_magnitude_prune_scores(model, micro_loader([1.0, -1.0]), None)
    (edge,) = model.find_edges("Resid Start->Resid End")
    assert float(edge.prune_score(scores)) == 2.0  # of 3, 2 and 1


def test_padding_does_not_count(tmp_path: Path) -> None:
    """The mean over the tokens of each prompt, run by itself."""
    bridge = text_model(word_tokenizer())
    model = patchable_model(bridge, True, "last_seq", separate_qkv=True)
    loader, _ = load(write_prompts(tmp_path, RAGGED), bridge, (3, 0))
    scores = activation_magnitude_prune_scores(model, loader, None)
    alone = [
        src_ablations(model, row[mask == 1][None]).abs().mean(-1)[:, 0]
        for batch in loader
        for row, mask in zip(batch.clean, batch.clean_attention_mask, strict=True)
    ]
    assert len({outs.shape for outs in alone}) > 1
    expected = t.cat(alone, 1).mean(1)
    for edge in model.edges:
        score = float(edge.prune_score(scores))
        assert score == pytest.approx(float(expected[edge.src.src_idx]), rel=1e-4)
