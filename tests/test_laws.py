"""The laws of edge patching, on every architecture."""

from __future__ import annotations

from typing import Any

import pytest
import torch as t
from torch import Tensor

from auto_circuit.data import PromptDataLoader, PromptDataset
from auto_circuit.types import AblationType
from auto_circuit.utils.ablation_activations import src_ablations
from auto_circuit.utils.graph_utils import (
    mask_fn_mode,
    patch_mode,
    patchable_model,
    set_all_masks,
    set_mask_batch_size,
    starting_at,
    train_mask_mode,
    unpatch,
)
from auto_circuit.utils.patchable_model import PatchableModel
from tests.models import (
    ARCHITECTURES,
    D_MODEL,
    MORE_ARCHITECTURES,
    architectures,
    folded,
    gpt2,
    llama,
    state_snapshot,
    tokens,
)
from tests.path_patching import patch_each_edge

SEQ = 5
CLEAN, CORRUPT = tokens(3, SEQ, seed=1), tokens(3, SEQ, seed=2)
EXACT: dict[str, Any] = {"atol": 1e-5, "rtol": 0.0}

GRAPHS = [
    pytest.param(factorized, separate_qkv, seq_len, id=f"{kind}-{qkv}-{positions}")
    for factorized, kind in ((True, "edges"), (False, "nodes"))
    for separate_qkv, qkv in ((True, "qkv"), (False, "head"))
    for seq_len, positions in ((None, "all"), (SEQ, "positions"))
]
on_all_graphs = pytest.mark.parametrize("factorized,separate_qkv,seq_len", GRAPHS)
on_all_architectures = pytest.mark.parametrize(
    "name", architectures("gemma2", "gpt2_folded")
)


def make(name: str, *graph: object) -> PatchableModel:
    factorized, separate_qkv, seq_len = graph
    bridge = MORE_ARCHITECTURES[name]()
    return patchable_model(
        bridge, bool(factorized), seq_len=seq_len, separate_qkv=bool(separate_qkv)  # type: ignore[arg-type]
    )


def run(model: PatchableModel, inputs: Tensor, patch: Tensor) -> Tensor:
    with t.no_grad(), patch_mode(model, patch):
        return model(inputs)


def run_with_grad(model: PatchableModel, inputs: Tensor, patch: Tensor) -> Tensor:
    with train_mask_mode(model), patch_mode(model, patch):
        return model(inputs).detach()


def random_masks(model: PatchableModel, seed: int = 0) -> None:
    generator = t.Generator().manual_seed(seed)
    for mask in model.patch_masks.values():
        mask.data = t.rand(mask.shape, generator=generator, dtype=mask.dtype)


@on_all_architectures
@on_all_graphs
def test_no_mask_is_clean_and_all_masks_are_corrupt(
    name: str, factorized: bool, separate_qkv: bool, seq_len: int | None
) -> None:
    model = make(name, factorized, separate_qkv, seq_len)
    with t.no_grad():
        clean, corrupt = model.wrapped_model(CLEAN), model.wrapped_model(CORRUPT)
    assert (clean - corrupt).abs().max() > 0.01
    patch = src_ablations(model, CORRUPT)
    for forward in (run, run_with_grad):
        set_all_masks(model, 0.0)
        t.testing.assert_close(forward(model, CLEAN, patch), clean, **EXACT)
        set_all_masks(model, 1.0)
        t.testing.assert_close(forward(model, CLEAN, patch), corrupt, **EXACT)


@on_all_architectures
def test_outside_of_patch_mode_and_after_unpatch_the_model_is_bit_for_bit_bare(
    name: str,
) -> None:
    bridge = MORE_ARCHITECTURES[name]()
    with t.no_grad():
        bare = bridge(CLEAN)
    before = state_snapshot(bridge)
    model = patchable_model(bridge, True, separate_qkv=True)
    with t.no_grad():
        assert t.equal(model(CLEAN), bare)
        random_masks(model)
        assert not t.allclose(run(model, CLEAN, src_ablations(model, CORRUPT)), bare)
        assert t.equal(model(CLEAN), bare)
    assert unpatch(model) is bridge
    assert state_snapshot(bridge) == before
    assert t.equal(bridge(CLEAN), bare)


@pytest.mark.parametrize("name", architectures("gpt2_folded"))
@pytest.mark.parametrize("separate_qkv", [True, False], ids=["qkv", "head"])
@pytest.mark.parametrize("seq_len", [None, SEQ], ids=["all", "positions"])
def test_each_single_edge_is_an_independent_path_patch(
    name: str, separate_qkv: bool, seq_len: int | None
) -> None:
    model = make(name, True, separate_qkv, seq_len)
    edges = list(model.edges)[:: 1 if seq_len is None else 9]
    clean, corrupt = CLEAN[:1], CORRUPT[:1]
    patch = src_ablations(model, corrupt)
    with t.no_grad():
        unpatched = model(clean)
    rows = []
    for edge in edges:
        with t.no_grad(), patch_mode(model, patch, [edge]):
            rows.append(model(clean)[0])
    ours = t.stack(rows)
    names = [(edge.src.name, edge.dest.name, edge.seq_idx) for edge in edges]
    with t.no_grad():
        reference = patch_each_edge(model.wrapped_model, clean, corrupt, names)  # type: ignore[arg-type]
    t.testing.assert_close(ours, reference, **EXACT)
    effects = (ours - unpatched).abs().amax(dim=(1, 2))
    assert (effects > 1e-6).float().mean() > 0.9  # not a comparison of nothing


@pytest.mark.parametrize("name", ["gpt2", "pythia", "llama"])
@pytest.mark.parametrize("seq_len", [None, SEQ], ids=["all", "positions"])
def test_masks_of_each_example_are_as_if_it_was_alone(
    name: str, seq_len: int | None
) -> None:
    model = make(name, True, True, seq_len)
    patch = src_ablations(model, CORRUPT)
    masks_before = model.patch_masks
    with set_mask_batch_size(model, len(CLEAN)):
        random_masks(model)
        assert all(model.patch_masks[k] is m for k, m in masks_before.items())
        masks = {k: mask.data.clone() for k, mask in model.patch_masks.items()}
        together = run(model, CLEAN, patch)
    assert all((mask == 0).all() for mask in model.patch_masks.values())
    for i in range(len(CLEAN)):
        for key, mask in model.patch_masks.items():
            mask.data = masks[key][i]
        alone = run(model, CLEAN[i : i + 1], patch[:, i : i + 1])
        t.testing.assert_close(together[i : i + 1], alone, **EXACT)


@on_all_architectures
@on_all_graphs
def test_sparse_and_dense_computations_agree(
    name: str, factorized: bool, separate_qkv: bool, seq_len: int | None
) -> None:
    """Few edges patched, few edges not patched, any values: one result."""
    model = make(name, factorized, separate_qkv, seq_len)
    patch = src_ablations(model, CORRUPT)
    generator = t.Generator().manual_seed(3)
    for share in (0.02, 0.1, 0.5, 0.9, 0.98):
        for mask in model.patch_masks.values():
            mask.data = (t.rand(mask.shape, generator=generator) < share).float()
        sparse, dense = run(model, CLEAN, patch), run_with_grad(model, CLEAN, patch)
        t.testing.assert_close(sparse, dense, **EXACT)
    random_masks(model)
    t.testing.assert_close(
        run(model, CLEAN, patch), run_with_grad(model, CLEAN, patch), **EXACT
    )


@pytest.mark.parametrize("name", architectures("gpt2_folded"))
@on_all_graphs
def test_mask_gradients_are_finite_differences(
    name: str, factorized: bool, separate_qkv: bool, seq_len: int | None
) -> None:
    bridge = MORE_ARCHITECTURES[name]().to(t.float64)
    model = patchable_model(
        bridge, factorized, seq_len=seq_len, separate_qkv=separate_qkv
    )
    patch = src_ablations(model, CORRUPT)
    weights = t.randn(40, generator=t.Generator().manual_seed(0), dtype=t.float64)
    # All but GPT-2 compute softmax or norm in float32, whatever the model's type is.
    noise = 1e-8 if name.startswith("gpt2") else 1e-4

    def loss() -> Tensor:
        return (model(CLEAN) @ weights).square().mean()

    def loss_at(mask: Tensor, entry: tuple[int, ...], step: float) -> Tensor:
        value = mask.data[entry].clone()
        mask.data[entry] = value + step
        with t.no_grad():
            moved = loss()
        mask.data[entry] = value
        return moved

    random_masks(model)
    with train_mask_mode(model) as masks, patch_mode(model, patch):
        loss().backward()
        grads = {key: mask.grad for key, mask in masks.items()}
        for key, mask in masks.items():
            grad = grads[key]
            assert grad is not None and (grad != 0).any(), key
            entry = tuple(int(i) for i in (grad.abs() == grad.abs().max()).nonzero()[0])
            far = loss_at(mask, entry, 0.06) - loss_at(mask, entry, -0.06)
            near = loss_at(mask, entry, 0.03) - loss_at(mask, entry, -0.03)
            difference = (8 * near - far) / 0.36
            t.testing.assert_close(grad[entry], difference, rtol=1e-3, atol=noise)


def test_gradients_of_two_forward_passes_do_not_mix() -> None:
    model = make("gpt2", True, True, None)
    patch = src_ablations(model, CORRUPT)
    random_masks(model)
    inputs = [CLEAN, CLEAN.flip(0)]

    def grads(losses: list[Tensor]) -> list[Tensor]:
        found = t.autograd.grad(sum(losses), list(model.patch_masks.values()))  # type: ignore[arg-type]
        return list(found)

    with train_mask_mode(model), patch_mode(model, patch):
        alone = [grads([model(x)[..., 0].mean()]) for x in inputs]
        together = grads([model(x)[..., 0].mean() for x in inputs])
        losses = model(CLEAN)[..., 0].mean()
        masks = list(model.patch_masks.values())
        first = t.autograd.grad(losses, masks, retain_graph=True)
        second = t.autograd.grad(losses, masks)
    for one, two, both in zip(*alone, together, strict=True):
        t.testing.assert_close(one + two, both)
    for a, b, c in zip(first, second, alone[0], strict=True):
        t.testing.assert_close(a, b)
        t.testing.assert_close(a, c)


def test_tied_masks_over_positions_are_masks_without_positions() -> None:
    by_position = make("gpt2", True, True, SEQ)
    model = patchable_model(by_position.wrapped_model, True, separate_qkv=True)
    patch = src_ablations(model, CORRUPT)
    random_masks(model)
    for key, mask in by_position.patch_masks.items():
        mask.data = model.patch_masks[key].data.expand(SEQ, *model.patch_masks[key].shape)
    outputs = [run(m, CLEAN, patch) for m in (model, by_position)]
    t.testing.assert_close(*outputs, **EXACT)
    with train_mask_mode(model) as masks, patch_mode(model, patch):
        model(CLEAN).square().mean().backward()
        grads = {key: mask.grad for key, mask in masks.items()}
    with train_mask_mode(by_position) as masks, patch_mode(by_position, patch):
        by_position(CLEAN).square().mean().backward()
        for key, mask in masks.items():
            assert mask.grad is not None and mask.grad.abs().max() > 0
            t.testing.assert_close(mask.grad.sum(0), grads[key])


@pytest.mark.parametrize("dtype,atol", [(t.float64, 1e-12), (t.bfloat16, 0.05)])
@pytest.mark.parametrize("name", architectures())
def test_other_float_types(name: str, dtype: t.dtype, atol: float) -> None:
    bridge = ARCHITECTURES[name]().to(dtype)
    model = patchable_model(bridge, True, separate_qkv=True)
    patch = src_ablations(model, CORRUPT)
    assert patch.dtype == dtype
    with t.no_grad():
        clean, corrupt = bridge(CLEAN), bridge(CORRUPT)
    set_all_masks(model, 0.0)
    t.testing.assert_close(run(model, CLEAN, patch), clean, atol=atol, rtol=0)
    set_all_masks(model, 1.0)
    t.testing.assert_close(run(model, CLEAN, patch), corrupt, atol=atol, rtol=0)
    t.testing.assert_close(run_with_grad(model, CLEAN, patch), corrupt, atol=atol, rtol=0)


@pytest.mark.parametrize("name", architectures())
@on_all_graphs
def test_patch_idx_is_a_bijection_between_edges_and_mask_entries(
    name: str, factorized: bool, separate_qkv: bool, seq_len: int | None
) -> None:
    model = make(name, factorized, separate_qkv, seq_len)
    entries = {(edge.dest.module_name, *edge.patch_idx) for edge in model.edges}
    masks = model.patch_masks
    expected = {
        (key, *entry.tolist()) for key, m in masks.items() for entry in (m == 0).nonzero()
    }
    assert entries == expected
    assert len(model.edges) == len(entries) == model.n_edges
    assert list(model.edges) == sorted(model.edges)
    factor = 1 if factorized else None
    for edge in model.edges:
        assert edge.src.layer < edge.dest.layer
        assert factor or edge.src.layer + 1 == edge.dest.layer


def test_two_models_over_one_module_do_not_disturb_each_other() -> None:
    """auto-circuit's older model read the newer one's masks."""
    bridge = gpt2()
    first = patchable_model(bridge, True, separate_qkv=True)
    second = patchable_model(bridge, True, separate_qkv=False)
    clean, corrupt = bridge(CLEAN), bridge(CORRUPT)
    patch = src_ablations(first, CORRUPT)
    set_all_masks(first, 1.0)
    t.testing.assert_close(run(first, CLEAN, patch), corrupt, **EXACT)
    t.testing.assert_close(run(second, CLEAN, patch), clean, **EXACT)
    set_all_masks(second, 1.0)
    both = src_ablations(second, CORRUPT)
    set_all_masks(first, 0.0)
    t.testing.assert_close(run(first, CLEAN, patch), clean, **EXACT)
    t.testing.assert_close(run(second, CLEAN, both), corrupt, **EXACT)


def test_state_is_restored_also_after_an_error() -> None:
    model = make("llama", True, True, None)
    random_masks(model)
    patch = src_ablations(model, CORRUPT)
    model.wrapped_model.requires_grad_(True)
    before = state_snapshot(model)
    generator = t.Generator().manual_seed(0)
    contexts = [
        lambda: patch_mode(model, patch),
        lambda: patch_mode(model, patch, ["A0.1->MLP 1"]),
        lambda: train_mask_mode(model),
        lambda: mask_fn_mode(model, "hard_concrete", 0.1, generator),
        lambda: set_mask_batch_size(model, 3),
    ]
    for context in contexts:
        with context():
            model(CLEAN)
        assert state_snapshot(model) == before
        with pytest.raises(ZeroDivisionError), context():
            set_all_masks(model, 0.3) if context is not contexts[0] else None
            _ = 1 / 0
        if context is contexts[3]:  # sets no masks, so it leaves them to the caller
            random_masks(model)
        assert state_snapshot(model) == before


def test_ablations_restore_state() -> None:
    model = make("gpt2", True, True, None)
    before = state_snapshot(model)
    for ablation_type in (AblationType.RESAMPLE, AblationType.ZERO):
        src_ablations(model, CLEAN, ablation_type)
    assert state_snapshot(model) == before


def test_a_changed_weight_is_noticed() -> None:
    """The residual stream's constants (attention's output bias) are computed once."""
    bridge = gpt2()
    model = patchable_model(bridge, True, separate_qkv=True)
    run(model, CLEAN, src_ablations(model, CORRUPT))
    with t.no_grad():
        # Not the same for all dimensions: layer norm would take that away again.
        bridge.blocks[0].attn.o.bias.add_(t.linspace(-1, 1, D_MODEL))
        corrupt = bridge(CORRUPT)
    set_all_masks(model, 1.0)
    patch = src_ablations(model, CORRUPT)
    t.testing.assert_close(run(model, CLEAN, patch), corrupt, **EXACT)
    # What is remembered is that of the new weights, not refused as that of others.
    with t.no_grad(), patch_mode(model, patch, keeps_layers=True):
        whole = model(CLEAN).clone()
        with starting_at(model, next(d for d in model.dests if d.name == "MLP 1")):
            t.testing.assert_close(model(CLEAN), whole, **EXACT)


def test_grouped_query_attention_has_one_key_input_per_key_value_head() -> None:
    model = patchable_model(llama(), True, separate_qkv=True)
    names = {dest.name for dest in model.dests}
    assert {"A0.3.Q", "A0.1.K", "A0.1.V"} <= names
    assert "A0.2.K" not in names


# --------------------------------------------------------------- biases, folded or not


@pytest.fixture(scope="module")
def plain() -> PatchableModel:
    """As it was published: value biases belong to their heads."""
    return patchable_model(gpt2(), True, separate_qkv=True)


@pytest.fixture(scope="module")
def processed() -> PatchableModel:
    """The same model as `load_tl_model` has it: value biases in the output's bias."""
    return patchable_model(folded(gpt2()), True, separate_qkv=True)


def folded_biases(plain: PatchableModel) -> Tensor:
    """What folding takes from each source, by the weights as published.

    Of a head, what it writes of its value bias, and of what the values make of the norm's
    bias, which is folded first; centred, as all that is written. Of others nothing.
    """
    biases = t.zeros(plain.plan.n_srcs, 1, 1, D_MODEL)
    blocks: Any = plain.wrapped_model.blocks
    for src in plain.srcs:
        if src.head_idx is not None:
            block, head = blocks[int(src.name[1])], src.head_idx
            attn = block.attn
            values = attn.b_V[head] + block.ln1.bias @ attn.W_V[head]
            biases[src.src_idx] = values @ attn.W_O[head]
    return biases - biases.mean(-1, keepdim=True)


def log_probs(model: PatchableModel, edges: list[str], patch: Tensor) -> Tensor:
    with t.no_grad(), patch_mode(model, patch, edges):
        return model(CLEAN).log_softmax(-1)


ONE_HEAD = ["A1.2->Resid End"]
FROM_HEADS = ["A0.1->MLP 0", "A0.1->A1.3.V", "A0.3->A1.0.Q", "A1.2->MLP 1", *ONE_HEAD]
ALSO_OTHERS = [*FROM_HEADS, "Resid Start->A0.0.K", "MLP 0->A1.1.V", "MLP 1->Resid End"]
on_some_edges = pytest.mark.parametrize(
    "edges", [ONE_HEAD, FROM_HEADS, ALSO_OTHERS], ids=["one", "heads", "all kinds"]
)


@on_some_edges
def test_zero_ablation_differs_by_the_folded_biases(
    plain: PatchableModel, processed: PatchableModel, edges: list[str]
) -> None:
    """Zeros in place of a head that has its bias are minus the bias where it was folded."""
    biases = folded_biases(plain)
    zeros = src_ablations(plain, CLEAN, AblationType.ZERO)
    of_plain, of_processed = (log_probs(m, edges, zeros) for m in (plain, processed))
    t.testing.assert_close(log_probs(processed, edges, zeros - biases), of_plain, **EXACT)
    t.testing.assert_close(log_probs(plain, edges, zeros + biases), of_processed, **EXACT)
    assert (of_plain - of_processed).abs().max() > 0.01


NOT_ZERO = [kind for kind in AblationType if kind != AblationType.ZERO]


@on_some_edges
@pytest.mark.parametrize("kind", NOT_ZERO, ids=lambda kind: kind.name)
def test_other_ablations_do_not_depend_on_where_biases_are(
    plain: PatchableModel,
    processed: PatchableModel,
    kind: AblationType,
    edges: list[str],
) -> None:
    sample = prompts() if kind.mean_over_dataset else CORRUPT
    one, two = (
        log_probs(m, edges, src_ablations(m, sample, kind)) for m in (plain, processed)
    )
    t.testing.assert_close(one, two, **EXACT)
    assert (one - log_probs(plain, [], src_ablations(plain, CORRUPT))).abs().max() > 0.01


def prompts() -> PromptDataLoader:
    dataset = PromptDataset(CLEAN, CORRUPT, [t.tensor([1])] * 3, [t.tensor([2])] * 3)
    return PromptDataLoader(dataset, None, 0, batch_size=3)
