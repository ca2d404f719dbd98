"""The compiled models: tracr's outputs, and circuits that are known by construction."""

from __future__ import annotations

import itertools
from functools import partial
from pathlib import Path
from typing import get_args

import pytest
import torch as t
from safetensors.torch import load_file

from auto_circuit.data import PromptDataLoader, load_datasets_from_json
from auto_circuit.errors import ConfigError, DataError
from auto_circuit.metrics.prune_metrics.answer_diff import measure_answer_diff
from auto_circuit.metrics.prune_metrics.answer_value import measure_answer_val
from auto_circuit.model_utils.tracr_model_utils import (
    BOS,
    MAX_SEQ_LEN,
    REVERSE_VOCAB,
    TRACR_TASK_KEY,
    XPROPORTION_VOCAB,
    get_tracr_model,
)
from auto_circuit.prune import run_circuits
from auto_circuit.types import AblationType, Edge, PatchType
from auto_circuit.utils.ablation_activations import src_ablations
from auto_circuit.utils.graph_utils import patch_mode, patchable_model
from auto_circuit.utils.patchable_model import PatchableModel

REPO = Path(__file__).resolve().parents[2]
KEYS = get_args(TRACR_TASK_KEY)
VOCAB = {"reverse": REVERSE_VOCAB, "xproportion": XPROPORTION_VOCAB}
CIRCUITS = {
    "reverse": ("Resid Start->A3.0.V", "A3.0->Resid End"),
    "xproportion": ("Resid Start->MLP 0", "MLP 0->A1.0.V", "A1.0->Resid End"),
}
close = partial(t.testing.assert_close, atol=1e-5, rtol=0.0)


def tracr_said(key: str) -> dict[str, t.Tensor]:
    """What tracr itself computed for all inputs."""
    tensors = load_file(REPO / "tests" / "model_utils" / "tracr_outputs.safetensors")
    return {
        name.removeprefix(f"{key}."): value
        for name, value in tensors.items()
        if name.startswith(f"{key}.")
    }


def loader(key: str, count: int = 64) -> PromptDataLoader:
    path = REPO / "datasets" / "tracr" / f"tracr_{key}_len_5_prompts.json"
    prompts, _ = load_datasets_from_json(
        None,
        path,
        prepend_bos=False,
        batch_size=32,
        train_test_size=(count, 0),
        return_seq_length=True,
    )
    return prompts


def token_model(key: TRACR_TASK_KEY) -> PatchableModel:
    model, _ = get_tracr_model(key)
    return patchable_model(model, True, "not_first_seq", MAX_SEQ_LEN + 1, True)


def circuit(model: PatchableModel, key: str, positions: range | list[int]) -> set[Edge]:
    """The edges of the program's one information path, at some positions."""
    return {
        edge
        for edge in model.edges
        if edge.name in CIRCUITS[key] and edge.seq_idx in positions
    }


@pytest.mark.parametrize("key", KEYS)
def test_outputs_are_those_of_tracr_on_every_input(key: TRACR_TASK_KEY) -> None:
    expected = tracr_said(key)
    model, encoding = get_tracr_model(key)
    assert len(expected["tokens"]) == len(VOCAB[key]) ** MAX_SEQ_LEN
    outputs = model(expected["tokens"])
    close(outputs, expected["outputs"])
    unembedded = outputs.argmax(-1) if key == "reverse" else outputs[..., 0]
    close(unembedded.float(), expected["unembedded"])
    inputs = itertools.product(VOCAB[key], repeat=MAX_SEQ_LEN)
    encoded = [encoding.encode([BOS, *words]) for words in inputs]
    assert encoded == expected["tokens"].tolist()


@pytest.mark.parametrize("key", KEYS)
def test_every_residual_stream_is_that_of_tracr(key: TRACR_TASK_KEY) -> None:
    expected = tracr_said(key)
    model, encoding = get_tracr_model(key)
    _, cache = model.run_with_cache(expected["tokens"][-1:])
    streams = [cache["blocks.0.hook_resid_pre"][0]]
    for block in range(model.cfg.n_layers):
        streams += [
            cache[f"blocks.{block}.hook_resid_{part}"][0] for part in ("mid", "post")
        ]
    close(t.stack(streams), expected["last_residuals"])
    assert streams[0].shape == (MAX_SEQ_LEN + 1, len(encoding.residual_labels))


def test_reverse_reverses() -> None:
    model, encoding = get_tracr_model("reverse")
    inputs = list(itertools.product(REVERSE_VOCAB, repeat=MAX_SEQ_LEN))
    outputs = model(t.tensor([encoding.encode([BOS, *words]) for words in inputs]))
    decoded = [encoding.decode(output) for output in outputs]
    assert decoded == [[BOS, *reversed(words)] for words in inputs]
    # An indicator: 1 for the answer, 0 for the others.
    close(outputs[:, 1:].sort(-1).values, t.tensor([0.0, 0.0, 1.0]).expand(243, 5, 3))


def test_reverse_of_a_shorter_sequence() -> None:
    model, encoding = get_tracr_model("reverse")
    outputs = model(t.tensor([encoding.encode([BOS, 3, 1, 2])]))[0]
    assert encoding.decode(outputs) == [BOS, 2, 1, 3]
    assert encoding.output_labels == ("reverse_1:1", "reverse_1:2", "reverse_1:3")


def test_xproportion_counts() -> None:
    model, encoding = get_tracr_model("xproportion")
    outputs = model(t.tensor([encoding.encode([BOS, "x", "w", "x", "z", "x"])]))[0]
    assert encoding.decode(outputs)[0] == BOS
    assert encoding.decode(outputs)[1:] == pytest.approx([1, 1 / 2, 2 / 3, 1 / 2, 3 / 5])


@pytest.mark.parametrize("key", KEYS)
def test_answers_of_the_prompts_are_the_outputs(key: TRACR_TASK_KEY) -> None:
    model = token_model(key)
    prompts = loader(key, count=243)
    assert (prompts.seq_len, prompts.n_prompts) == (MAX_SEQ_LEN + 1, 243)
    for batch in prompts:
        for tokens, answers in (
            (batch.clean, batch.answers),
            (batch.corrupt, batch.wrong_answers),
        ):
            assert isinstance(answers, t.Tensor)
            outputs = model(tokens)[model.out_slice]
            said = outputs.argmax(-1, keepdim=True) if key == "reverse" else outputs
            close(said, answers)
        assert (batch.clean != batch.corrupt).any(-1).all()


@pytest.mark.parametrize("key", KEYS)
def test_patching_the_end_of_the_stream_gives_the_clean_output(
    key: TRACR_TASK_KEY,
) -> None:
    model = token_model(key)
    ends = [edge for edge in model.edges if edge.dest.name == "Resid End"]
    batch, *_ = loader(key)
    with patch_mode(model, src_ablations(model, batch.clean), ends):
        patched = model(batch.corrupt)
    close(patched, model(batch.clean))
    assert not t.allclose(model(batch.corrupt), patched)


def test_answer_value_is_one_and_answer_difference_the_share_of_other_answers() -> None:
    model, prompts = token_model("reverse"), loader("reverse")
    full = {
        model.n_edges: {
            batch.key: model(batch.clean)[model.out_slice] for batch in prompts
        }
    }
    ((_, value),) = measure_answer_val(model, prompts, full)
    assert value == pytest.approx(1.0, abs=1e-5)
    differs = [
        (batch.clean[:, 1:] != batch.corrupt[:, 1:]).float().mean() for batch in prompts
    ]
    ((_, diff),) = measure_answer_diff(model, prompts, full)
    assert diff == pytest.approx(float(t.stack(differs).mean()), abs=1e-5)


@pytest.mark.parametrize("key", KEYS)
def test_the_circuit_alone_does_the_whole_task(key: TRACR_TASK_KEY) -> None:
    """Length and positions are the same in every prompt: nothing else matters."""
    model, prompts = token_model(key), loader(key)
    edges = circuit(model, key, range(1, MAX_SEQ_LEN + 1))
    assert len(edges) == len(CIRCUITS[key]) * MAX_SEQ_LEN
    scores = model.circuit_prune_scores(edges)
    outs = run_circuits(
        model,
        prompts,
        [len(edges)],
        scores,
        PatchType.TREE_PATCH,
        AblationType.RESAMPLE,
    )
    for batch in prompts:
        clean = model(batch.clean)[model.out_slice]
        close(outs[len(edges)][batch.key], clean)


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("position", range(1, MAX_SEQ_LEN + 1))
def test_without_a_position_of_the_circuit_it_fails(
    key: TRACR_TASK_KEY, position: int
) -> None:
    """Also `reverse` at 3, the middle, which auto-circuit's official edges leave out."""
    model, prompts = token_model(key), loader(key)
    others = [i for i in range(1, MAX_SEQ_LEN + 1) if i != position]
    edges = circuit(model, key, others)
    batch, *_ = prompts
    patched = set(model.edges) - edges
    with patch_mode(model, src_ablations(model, batch.corrupt), list(patched)):
        broken = model(batch.clean)[:, position]
    corrupt = model(batch.corrupt)[:, position]
    if key == "reverse":
        close(broken, corrupt)
    assert not t.allclose(broken, model(batch.clean)[:, position], atol=1e-3)


def test_an_unknown_key_and_unknown_words_are_refused() -> None:
    with pytest.raises(ConfigError, match="`tracr_task_key` is 'sort'; .*'xproportion'"):
        get_tracr_model("sort")  # type: ignore[arg-type]
    _, encoding = get_tracr_model("reverse")
    with pytest.raises(DataError, match=r"does not know \[4\]; its words are \[1, 2, 3"):
        encoding.encode([BOS, 1, 4])
    with pytest.raises(DataError, match="reads 'BOS' and up to 5 words"):
        encoding.encode([1, 2])
    with pytest.raises(DataError, match="up to 5 words"):
        encoding.encode([BOS, 1, 2, 3, 1, 2, 3])


def test_loading_draws_no_random_numbers_and_needs_no_gradients() -> None:
    state = t.get_rng_state()
    model, _ = get_tracr_model("xproportion", device="cpu")
    assert t.equal(t.get_rng_state(), state)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not model.training
