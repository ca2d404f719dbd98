"""Gradient scores against independent computations."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch as t
from torch import Tensor

from auto_circuit.errors import ConfigError
from auto_circuit.prune import run_circuits
from auto_circuit.prune_algos.edge_attribution_patching import (
    edge_attribution_patching_prune_scores,
)
from auto_circuit.prune_algos.mask_gradient import mask_gradient_prune_scores
from auto_circuit.prune_algos.objectives import answer_loss, answer_values
from auto_circuit.types import AblationType, PatchType, PruneScores
from auto_circuit.utils.ablation_activations import src_ablations
from auto_circuit.utils.graph_utils import (
    patch_mode,
    patchable_model,
    preserved_masks,
    set_all_masks,
)
from auto_circuit.utils.patchable_model import PatchableModel
from tests.micro import micro_loader, micro_model
from tests.models import ARCHITECTURES, architectures, gpt2
from tests.test_prune import token_loader

EAP: dict[str, Any] = {
    "grad_function": "logit",
    "answer_function": "avg_diff",
    "mask_val": 0.0,
}
SWITCHES = ("set_use_attn_result", "set_use_split_qkv_input", "set_use_hook_mlp_in")


def make(
    name: str = "gpt2", seq_len: int | None = None, qkv: bool = True
) -> PatchableModel:
    return patchable_model(
        ARCHITECTURES[name](), True, "last_seq", seq_len, separate_qkv=qkv
    )


def answer_diff(outputs: Tensor) -> Tensor:
    """Of the answers that `token_loader` has: 1 against 2."""
    return (outputs[:, -1, 1] - outputs[:, -1, 2]).mean()


@contextmanager
def switches(bridge: Any) -> Iterator[None]:
    for name in SWITCHES:
        getattr(bridge, name)(True)
    try:
        yield
    finally:
        for name in SWITCHES:
            getattr(bridge, name)(False)


def reference_eap(model: PatchableModel, clean: Tensor, corrupt: Tensor) -> Tensor:
    """Gradient at the destination times difference at the source: TransformerLens alone.

    For a model with separate q, k and v. A score [seq] for each edge of `model.edges`.
    """
    bridge: Any = model.wrapped_model
    stored: dict[tuple[str, str], Tensor] = {}

    def store(kind: str, name: str, with_grad: bool = False) -> Any:
        def hook(value: Tensor, hook: Any) -> Tensor:
            if with_grad:
                value = value.clone().requires_grad_()
                value.retain_grad()
            stored[kind, name] = value
            return value

        return hook

    dests = list(dict.fromkeys(node.module_name for node in model.dests))
    srcs = list(dict.fromkeys(node.module_name for node in model.srcs))
    with switches(bridge):
        for kind, inputs in (("clean", clean), ("corrupt", corrupt)):
            hooks = [(name, store(kind, name)) for name in srcs]
            with t.no_grad():
                bridge.run_with_hooks(inputs, fwd_hooks=hooks)
        # A gradient is taken at the destination only, through the whole model above it.
        scores = []
        grads: dict[str, Tensor] = {}
        for name in dests:
            out = bridge.run_with_hooks(
                clean, fwd_hooks=[(name, store("grad", name, True))]
            )
            site = stored["grad", name]
            (grads[name],) = t.autograd.grad(-answer_diff(out), site)
    for edge in model.edges:
        src, dest = edge.src, edge.dest
        change = stored["corrupt", src.module_name] - stored["clean", src.module_name]
        grad = grads[dest.module_name]
        change = change if src.head_idx is None else change[:, :, src.head_idx]
        grad = grad if dest.head_idx is None else grad[:, :, dest.head_idx]
        scores.append((change * grad).sum((0, 2)))
    return t.stack(scores)


@pytest.mark.parametrize("name", architectures())
def test_eap_is_gradient_times_difference(name: str) -> None:
    model = make(name)
    loader = token_loader(4, 4)
    (batch,) = loader
    scores = edge_attribution_patching_prune_scores(model, loader, None)
    ours = t.stack([edge.prune_score(scores) for edge in model.edges])
    expected = reference_eap(model, batch.clean, batch.corrupt).sum(1)
    assert (expected.abs() > 1e-6).float().mean() > 0.9
    t.testing.assert_close(ours, expected, atol=1e-6, rtol=1e-3)


def test_eap_by_position() -> None:
    """auto-circuit gave every position the sum over positions."""
    model, by_position = make(), make(seq_len=5)
    loader = token_loader(4, 4)
    (batch,) = loader
    scores = edge_attribution_patching_prune_scores(by_position, loader, None)
    expected = reference_eap(model, batch.clean, batch.corrupt)
    for idx, edge in enumerate(model.edges):
        head = () if edge.dest.head_idx is None else (edge.dest.head_idx,)
        ours = scores[edge.dest.module_name][(slice(None), *head, edge.src.src_idx)]
        t.testing.assert_close(ours, expected[idx], atol=1e-6, rtol=1e-3)


@pytest.mark.parametrize("qkv", [True, False])
@pytest.mark.parametrize("answer_diff", [True, False])
def test_eap_is_the_mask_gradient_at_0(qkv: bool, answer_diff: bool) -> None:
    model, loader = make(qkv=qkv), token_loader()
    eap = edge_attribution_patching_prune_scores(model, loader, None, answer_diff)
    gradient = mask_gradient_prune_scores(
        model,
        loader,
        None,
        "logit",
        "avg_diff" if answer_diff else "avg_val",
        mask_val=0.0,
    )
    assert all(t.equal(eap[name], gradient[name]) for name in eap)
    assert any((scores != 0).any() for scores in eap.values())


@pytest.mark.parametrize("name", ["gpt2", "llama"])
@pytest.mark.parametrize("seq_len", [None, 5], ids=["all", "positions"])
def test_a_heads_score_is_the_sum_of_its_inputs_scores(
    name: str, seq_len: int | None
) -> None:
    """Without separate_qkv: an edge into a head patches query, key and value together."""
    bridge = ARCHITECTURES[name]().to(t.float64)

    def totals(separate_qkv: bool) -> dict[str, Tensor]:
        model = patchable_model(bridge, True, "last_seq", seq_len, separate_qkv)
        scores = edge_attribution_patching_prune_scores(model, token_loader(), None)
        found: dict[str, Tensor] = {}
        for edge in model.edges:
            dest = edge.dest.name.removesuffix(".Q").removesuffix(".K").removesuffix(".V")
            # With grouped queries, a group has as many query heads: compare the layer.
            dest = dest.partition(".")[0] if name == "llama" else dest
            key = f"{edge.src.name}->{dest} {edge.seq_idx}"
            found[key] = found.get(key, t.zeros(())) + edge.prune_score(scores)
        return found

    together, apart = totals(False), totals(True)
    assert together.keys() == apart.keys()
    values = t.stack(list(together.values()))
    t.testing.assert_close(
        values, t.stack([apart[key] for key in together]), atol=1e-7, rtol=1e-4
    )
    assert (values != 0).float().mean() > 0.4  # early positions


@pytest.mark.parametrize("seq_len", [None, 5], ids=["all", "positions"])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_integrated_gradients_add_up_to_the_effect_of_all_edges(
    name: str, seq_len: int | None
) -> None:
    bridge = ARCHITECTURES[name]().to(t.float64)
    model = patchable_model(bridge, True, "last_seq", seq_len, separate_qkv=True)
    loader = token_loader(5, 3)
    with t.no_grad():
        clean, corrupt = (
            t.cat([model(batch.model_input(side)[0]) for batch in loader])
            for side in ("clean", "corrupt")
        )
    effect = answer_diff(clean) - answer_diff(corrupt)
    assert abs(effect) > 0.01
    errors = []
    for n_samples in (2, 24):
        scores = mask_gradient_prune_scores(
            model, loader, None, "logit", "avg_diff", integrated_grad_samples=n_samples
        )
        errors.append(abs(float(sum(s.sum() for s in scores.values()) - effect)))
    assert errors[1] < 1e-3 * abs(effect)
    assert errors[1] < errors[0]


MASKS_ON_THE_PATH: dict[Any, list[float]] = {
    "midpoints": [1 / 6, 0.5, 5 / 6],
    "clean_end": [0.0, 1 / 3, 2 / 3],
    "corrupt_end": [1 / 3, 2 / 3, 1.0],
    "both_ends": [0.0, 1 / 3, 2 / 3, 1.0],
}


def test_path_points() -> None:
    """Against finite differences at each mask value: the plain mean over the points."""
    bridge = ARCHITECTURES["gpt2"]().to(t.float64)
    model = patchable_model(bridge, True, "last_seq", separate_qkv=True)
    loader = token_loader(4, 4)
    (batch,) = loader
    patch = src_ablations(model, batch.corrupt)
    (edge,) = model.find_edges("A0.1->A1.2.V")
    slopes = {}
    for value in {value for masks in MASKS_ON_THE_PATH.values() for value in masks}:
        losses = []
        for step in (1e-4, -1e-4):
            with preserved_masks(model), t.no_grad(), patch_mode(model, patch):
                set_all_masks(model, value)
                edge.patch_mask(model).data[edge.patch_idx] += step
                losses.append(-float(answer_diff(model(batch.clean))))
        slopes[value] = (losses[0] - losses[1]) / 2e-4
    for path_points, masks in MASKS_ON_THE_PATH.items():
        scores = mask_gradient_prune_scores(
            model,
            loader,
            None,
            "logit",
            "avg_diff",
            integrated_grad_samples=3,
            path_points=path_points,
        )
        expected = sum(slopes[value] for value in masks) / len(masks)
        assert abs(expected) > 1e-5
        assert edge.prune_score(scores).item() == pytest.approx(expected, rel=1e-5)


def test_on_a_linear_model_scores_are_the_exact_effects() -> None:
    model, loader = micro_model(), micro_loader([1.0, 2.0, 5.0], batch_size=2)
    scores = edge_attribution_patching_prune_scores(model, loader, None)

    def mean_diff(edge: Any) -> float:
        circuit = model.circuit_prune_scores(edges=[] if edge is None else [edge])
        outs = run_circuits(
            model,
            loader,
            [0 if edge is None else 1],
            circuit,
            PatchType.EDGE_PATCH,
            reverse_clean_corrupt=True,
        )
        ((_, by_batch),) = outs.items()
        logits = t.cat(list(by_batch.values()))
        return float((logits[:, 1] - logits[:, 0]).mean())

    effects = [mean_diff(None) - mean_diff(edge) for edge in model.edges]
    assert sum(effect != 0 for effect in effects) == 12  # the direct path favours neither
    found = [float(edge.prune_score(scores)) for edge in model.edges]
    assert found == pytest.approx(effects, rel=1e-5, abs=1e-4)


@pytest.mark.parametrize("samples", [None, 3])
def test_scores_do_not_depend_on_batch_size(samples: int | None) -> None:
    """auto-circuit's grew with the number of batches and of samples."""
    model = make()
    options: dict[str, Any] = EAP | {"mask_val": 0.0 if samples is None else None}
    one, all_ = (
        mask_gradient_prune_scores(
            model, token_loader(5, size), None, integrated_grad_samples=samples, **options
        )
        for size in (2, 5)
    )
    for name, scores in one.items():
        t.testing.assert_close(scores, all_[name])


@pytest.mark.parametrize("grad_function", ["logit", "prob", "logprob", "logit_exp"])
@pytest.mark.parametrize("answer_function", ["avg_diff", "avg_val"])
def test_every_function_is_a_finite_difference(
    grad_function: Any, answer_function: Any
) -> None:
    """The score of an edge is the change of the loss when its mask moves."""
    model = patchable_model(gpt2().double(), True, "last_seq", separate_qkv=True)
    loader = token_loader(3, 3)
    (batch,) = loader
    scores = mask_gradient_prune_scores(
        model, loader, None, grad_function, answer_function, mask_val=0.0
    )
    edge = max(model.edges, key=lambda edge: abs(float(edge.prune_score(scores))))
    patch = src_ablations(model, batch.corrupt)
    losses = []
    with t.no_grad(), patch_mode(model, patch):
        constant = model(batch.clean)[model.out_slice].exp().sum(-1, keepdim=True)
        for step in (-1e-4, 1e-4):
            edge.patch_mask(model).data[edge.patch_idx] = step
            logits = model(batch.clean)[model.out_slice]
            if grad_function == "logit_exp":  # its denominator gets no gradient
                values = logits.exp() / constant
                diff = values[:, 1] - (
                    values[:, 2] if answer_function == "avg_diff" else 0
                )
                losses.append(-diff.mean())
            else:
                losses.append(answer_loss(logits, batch, grad_function, answer_function))
    difference = (losses[1] - losses[0]) / 2e-4
    assert float(edge.prune_score(scores)) == pytest.approx(float(difference), rel=1e-4)


def test_ablation_type_and_side() -> None:
    model, loader = make(), token_loader(4, 2)

    def scores(**options: Any) -> PruneScores:
        return mask_gradient_prune_scores(model, loader, None, **EAP, **options)

    clean = scores(clean_corrupt="clean")
    assert all((score == 0).all() for score in clean.values())
    mean = scores(ablation_type=AblationType.TOKENWISE_MEAN_CLEAN, clean_corrupt=None)
    zero = scores(ablation_type=AblationType.ZERO)
    resample = scores()
    for one, other in ((mean, zero), (zero, resample), (mean, resample)):
        assert not all(t.allclose(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    "options,message",
    [
        ({"mask_val": None}, "Give exactly one of `mask_val`"),
        ({"mask_val": math.nan}, "`mask_val` is nan; expected a finite number"),
        ({"integrated_grad_samples": 5}, "Give exactly one of `mask_val`"),
        ({"mask_val": None, "integrated_grad_samples": 0}, "expected at least 1"),
        (
            {"path_points": "both_ends"},
            "'both_ends', but with `mask_val` there is no path",
        ),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        mask_gradient_prune_scores(make(), token_loader(), None, **{**EAP, **options})


def test_an_unknown_function() -> None:
    options: dict[str, Any] = {**EAP, "grad_function": "logits"}
    with pytest.raises(ConfigError, match="is 'logits'; expected one of 'logit', 'prob'"):
        mask_gradient_prune_scores(make(), token_loader(), None, **options)


def test_what_answers_are_compared_in_by_hand() -> None:
    logits = t.tensor([[1.0, 3.0], [4.0, 1.0]]).log()
    shares = t.tensor([[0.25, 0.75], [0.8, 0.2]])
    t.testing.assert_close(answer_values(logits, "logit"), logits)
    t.testing.assert_close(answer_values(logits, "prob"), shares)
    t.testing.assert_close(answer_values(logits, "logprob"), shares.log())
    t.testing.assert_close(answer_values(logits, "logit_exp"), shares)
