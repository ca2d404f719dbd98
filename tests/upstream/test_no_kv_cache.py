"""`tail_divergence` with a model that has no KV cache: said, and done without."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch as t

from auto_circuit.data import NoPrefixWarning, load_datasets_from_json
from auto_circuit.prune import run_circuits
from auto_circuit.utils.graph_utils import patchable_model
from tests.models import attn_only
from tests.texts import word_tokenizer

PROMPTS = [
    ("Ann and Bob met", "Ann and Cat met", " Bob", " Ann"),
    ("Ann and Dan met", "Ann and Eve met", " Dan", " Ann"),
]


def loaders(tmp_path: Path, tail_divergence: bool) -> Any:
    path = tmp_path / "prompts.json"
    keys = ("clean", "corrupt", "answers", "wrong_answers")
    prompts = [dict(zip(keys, (a, b, [c], [d]), strict=True)) for a, b, c, d in PROMPTS]
    path.write_text(json.dumps({"prompts": prompts}))
    model = attn_only()
    model.tokenizer = word_tokenizer()
    return model, load_datasets_from_json(
        model,
        path,
        prepend_bos=True,
        batch_size=2,
        train_test_size=(2, 0),
        return_seq_length=True,
        tail_divergence=tail_divergence,
    )


def test_prompts_stay_whole(tmp_path: Path) -> None:
    with pytest.warns(NoPrefixWarning, match="gives no KV cache.*cuts nothing off"):
        model, (train_loader, _) = loaders(tmp_path, True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _, (expected, _) = loaders(tmp_path, False)
    assert train_loader.diverge_idx == 0 and train_loader.kv_cache is None
    assert train_loader.seq_len == expected.seq_len == 5
    (batch,), (other,) = train_loader, expected
    assert t.equal(batch.clean, other.clean) and batch.key == other.key
    graph = patchable_model(
        model,
        True,
        "last_seq",
        separate_qkv=True,
        kv_caches=(train_loader.kv_cache,),
    )
    outs = run_circuits(graph, train_loader, [graph.n_edges], graph.new_prune_scores(1.0))
    t.testing.assert_close(
        outs[graph.n_edges][batch.key], graph(batch.clean)[:, -1], rtol=1e-4, atol=1e-4
    )
