"""Latents and neurons as nodes: the laws of every graph, and edges against plain hooks."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from copy import deepcopy
from dataclasses import replace
from random import Random
from typing import Any

import pytest
import torch as t
from torch import Tensor
from transformer_lens.model_bridge.sources._bridge_builder import (
    build_bridge_from_module,
)
from transformers import GPT2Config, GPT2LMHeadModel

from auto_circuit.errors import ConfigError, ModelError
from auto_circuit.features import (
    Autoencoder,
    Neurons,
    Placed,
    active_latents,
    spliced,
)
from auto_circuit.prune_algos.edge_attribution_patching import (
    edge_attribution_patching_prune_scores,
)
from auto_circuit.prune_algos.mask_gradient import mask_gradient_prune_scores
from auto_circuit.utils.ablation_activations import src_ablations
from auto_circuit.utils.component_links import component_links
from auto_circuit.utils.graph_utils import (
    patch_mode,
    patchable_model,
    set_all_masks,
    train_mask_mode,
)
from auto_circuit.utils.patchable_model import PatchableModel
from tests.models import (
    D_MODEL,
    N_CTX,
    VOCAB,
    gemma2,
    gpt2,
    llama,
    pythia,
    randomize,
    tokens,
)
from tests.models import state_snapshot as snapshot
from tests.plain_features import Place, PlainGPT2, plain_latents
from tests.test_prune import token_loader

CLEAN, CORRUPT = tokens(3, 6), tokens(3, 6, seed=1)
EXACT: Any = {"rtol": 0, "atol": 1e-5}
N_LATENTS = 7


def autoencoder(
    hook: str,
    out: str | None = None,
    kind: Any = "standard",
    d_in: int = D_MODEL,
    seed: int = 0,
    **more: Any,
) -> Autoencoder:
    generator = t.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return 0.3 * t.randn(shape, generator=generator)

    of_kind: dict[str, dict[str, Any]] = {
        "jumprelu": {"threshold": random(N_LATENTS).abs()},
        "batchtopk": {"threshold": 0.1 + t.zeros(N_LATENTS)},
        "topk": {"k": 3},
        "gated": {
            "magnitude_bias": random(N_LATENTS),
            "log_magnitude": random(N_LATENTS),
        },
    }
    return Autoencoder(
        kind=kind,
        encoder_weight=random(N_LATENTS, d_in),
        encoder_bias=random(N_LATENTS),
        decoder_weight=random(N_LATENTS, D_MODEL if out else d_in),
        decoder_bias=random(D_MODEL if out else d_in),
        centres_input=out is None,
        hook_name=hook,
        hook_name_out=out,
        **of_kind.get(kind, {}),
        **more,
    )  # fmt: skip


class Plain:
    """An object with encode and decode, and no more."""

    def __init__(self, inner: Autoencoder) -> None:
        self.inner = inner

    def encode(self, x: Tensor) -> Tensor:
        return self.inner.encode(x)

    def decode(self, latents: Tensor) -> Tensor:
        return self.inner.decode(latents)


MLP_IN, NORMED, MLP_OUT = "mlp.hook_in", "ln2.hook_normalized", "blocks.{}.hook_mlp_out"
PLACES: dict[str, Callable[[], list[Any]]] = {
    "resid": lambda: [
        autoencoder("blocks.1.hook_resid_pre"),
        autoencoder("blocks.1.hook_resid_post", kind="jumprelu", seed=1),
    ],
    "mid": lambda: [
        autoencoder("blocks.0.hook_resid_mid", kind="jumprelu"),
        autoencoder("blocks.1.hook_resid_mid", kind="topk", seed=1),
    ],
    "start": lambda: [autoencoder("blocks.0.hook_resid_pre", kind="gated")],
    "outs": lambda: [
        autoencoder("blocks.0.hook_mlp_out", kind="batchtopk"),
        autoencoder("blocks.1.hook_attn_out", kind="topk"),
    ],
    "z": lambda: [autoencoder("blocks.0.attn.hook_z"), Neurons(1)],
    "transcoder": lambda: [
        autoencoder("blocks.0.mlp.hook_in", "blocks.0.hook_mlp_out"),
        autoencoder("blocks.1.ln2.hook_normalized", "blocks.1.hook_mlp_out", "topk"),
    ],
    "neurons": lambda: [Neurons(0, as_destinations=True)],
    "object": lambda: [
        Placed(Plain(autoencoder("", kind="topk")), "blocks.1.hook_resid_pre")
    ],
    "normalised": lambda: [
        autoencoder("blocks.1.hook_resid_pre", normalization="layer_norm"),
        autoencoder("blocks.0.hook_mlp_out", normalization="constant_norm_rescale"),
    ],
}
NEURONS_KEPT = {"neurons": [[0, 3, 11]], "z": [[1, 2, 5], [0, 7]]}


def slow_but(*fast: str, of: Iterable[str]) -> list[Any]:
    """Places as parameters; those that are not fast run with --runslow."""
    return [
        pytest.param(place, marks=() if place in fast else pytest.mark.slow)
        for place in of
    ]


def make(
    bridge: Any, place: str, factorized: bool = True, **options: Any
) -> PatchableModel:
    model = spliced(bridge, PLACES[place](), NEURONS_KEPT.get(place))
    options = {"separate_qkv": True, **options}
    return patchable_model(model, factorized, "last_seq", **options)


@pytest.mark.parametrize("place", slow_but("resid", "transcoder", of=PLACES))
@pytest.mark.parametrize(
    "architecture",
    [gpt2, *(pytest.param(f, marks=pytest.mark.slow) for f in (pythia, llama, gemma2))],
)
def test_the_laws_of_every_graph(architecture: Any, place: str) -> None:
    bridge = architecture()
    if architecture is pythia and place == "mid":
        pytest.skip("refused: see test_what_an_architecture_cannot_have_is_refused")
    with t.no_grad():
        clean, corrupt = bridge(CLEAN), bridge(CORRUPT)
    before = snapshot(bridge)
    model = make(bridge, place)
    with t.no_grad():
        assert t.equal(model(CLEAN), clean)  # bit for bit the bare model
        patch = src_ablations(model, CORRUPT)
        for value, expected in ((0.0, clean), (1.0, corrupt)):
            set_all_masks(model, value)
            with patch_mode(model, patch):
                t.testing.assert_close(model(CLEAN), expected, **EXACT)
    assert snapshot(bridge) == before


# ------------------------------------------------------------- edges against plain hooks


@pytest.fixture(scope="module")
def twins() -> tuple[Any, Any]:
    """(Hugging Face's model, a bridge over a copy of it)"""
    config = GPT2Config(
        n_layer=2, n_head=4, n_embd=D_MODEL, vocab_size=VOCAB, n_positions=N_CTX,
        attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0,
    )  # fmt: skip
    plain = GPT2LMHeadModel(config).eval()
    randomize(plain)
    bridge = build_bridge_from_module(
        deepcopy(plain), "GPT2LMHeadModel", hf_config=config
    )
    return plain, bridge.eval().requires_grad_(False)


def plain_places(plain: PlainGPT2, place: str) -> dict[str, Any]:
    """The same places as those of PLACES, for the plain model."""
    items: Any = PLACES[place]()
    blocks = plain.blocks
    if place == "resid":
        return {
            "Resid Pre 1": plain.cut(items[0], "resid1"),
            "Resid Post 1": plain.cut(items[1], "end"),
        }
    if place == "mid":
        return {f"Resid Mid {b}": plain.cut(items[b], f"mid{b}") for b in range(2)}
    if place == "object":
        return {"Resid Pre 1": plain.cut(items[0].autoencoder.inner, "resid1")}
    if place == "transcoder":
        return {
            f"MLP {block}": plain.transcoder(items[block], block, bare=block == 1)
            for block in range(2)
        }
    if place == "neurons":
        return {"MLP 0": plain.neurons(0)}
    if place == "outs":
        return {
            "MLP 0": plain.encoded(items[0], "mlp0", "mlp0", None),
            "A1": plain.encoded(items[1], "attn1", "attn1", None),
        }
    assert place == "z"
    return {"A0": plain.encoded(items[0], "z0", "attn0", blocks[0].attn.c_proj.weight)}


def touched(edge: Any) -> tuple[bool, bool]:
    """Is its source, is its destination, a latent, a neuron or an error?"""
    words = ("Latent", "Neuron", "Error", "Rest")
    return tuple(  # type: ignore[return-value]
        any(word in node.name for word in words) for node in (edge.src, edge.dest)
    )


EDGES = {
    "resid": 20,
    "mid": 12,
    "transcoder": 24,
    "neurons": 8,
    "object": 8,
    "outs": 8,
    "z": 8,
}


@pytest.mark.parametrize("place", slow_but("resid", of=EDGES))
def test_edges_are_what_plain_hooks_do(twins: tuple[Any, Any], place: str) -> None:
    hf, bridge = twins
    plain = PlainGPT2(hf, {})
    plain.places = plain_places(plain, place)
    items, kept = PLACES[place](), NEURONS_KEPT.get(place)
    if place == "z":
        items, kept = items[:1], kept[:1]  # type: ignore[index]
    if kept:
        plain.places = {k: only(v, kept[0]) for k, v in plain.places.items()}
    model = patchable_model(
        spliced(bridge, items, kept), True, "last_seq", separate_qkv=True
    )
    runs = [plain.record(tokens) for tokens in (CLEAN, CORRUPT)]
    clean = plain.forward(CLEAN)
    patch = src_ablations(model, CORRUPT)
    edges = [edge for edge in model.edges if any(touched(edge))]
    Random(0).shuffle(edges)
    has_dests = place in ("resid", "mid", "transcoder", "neurons", "object")
    as_dests = [edge for edge in edges if touched(edge)[1]][: EDGES[place] // 2]
    assert len(as_dests) == (EDGES[place] // 2 if has_dests else 0)
    as_srcs = [edge for edge in edges if not touched(edge)[1]]
    effects = []
    for edge in [*as_dests, *as_srcs[: EDGES[place] - len(as_dests)]]:
        change = plain.written(runs[1], edge.src.name) - plain.written(
            runs[0], edge.src.name
        )
        expected = plain.patched(CLEAN, runs[0], edge.dest.name, change)
        with t.no_grad(), patch_mode(model, patch, [edge]):
            ours = model(CLEAN)
        t.testing.assert_close(ours, expected, **EXACT, msg=lambda m, e=edge: f"{e}: {m}")
        effects.append(float((expected - clean).abs().max()))
    assert len(effects) == EDGES[place]
    assert sum(effect > 1e-3 for effect in effects) >= len(effects) // 3, effects


def only(place: Place, kept: list[int]) -> Place:
    """The error is all that these do not write: the others have no direction of their own."""
    directions = t.zeros_like(place.directions)
    directions[kept] = place.directions[kept]
    return replace(place, directions=directions)


@pytest.mark.parametrize(
    "place", slow_but("transcoder", of=("resid", "mid", "transcoder", "neurons"))
)
def test_gradients_of_masks_are_finite_differences(place: str) -> None:
    bridge = gpt2().to(t.float64)
    items = PLACES[place]()
    model = make(bridge, place, seq_len=6)
    patch = src_ablations(model, CORRUPT)
    assert items
    for value in (0.0, 0.5):
        set_all_masks(model, value)
        with train_mask_mode(model), patch_mode(model, patch):
            model(CLEAN)[model.out_slice].square().sum().backward()
            grads: dict[str, Any] = {
                n: mask.grad for n, mask in model.patch_masks.items()
            }
        names = [n for n in grads if n.endswith(("_in", "hook_mlp_in"))][:4]
        for name in names:
            index = tuple(int(i) for i in (grads[name].abs() > 1e-3).nonzero()[-1])
            outs = []
            for step in (1e-6, -1e-6):
                set_all_masks(model, value)
                model.patch_masks[name].data[index] += step
                with t.no_grad(), patch_mode(model, patch):
                    outs.append(model(CLEAN)[model.out_slice].square().sum())
            expected = (outs[0] - outs[1]) / 2e-6
            t.testing.assert_close(
                grads[name][index].double(), expected, rtol=1e-3, atol=1e-4
            )


@pytest.mark.parametrize("place", slow_but(of=("resid", "object", "z")))
def test_attribution_is_the_mask_gradient(place: str) -> None:
    model = make(gpt2(), place)
    loader = token_loader(3, 2)
    eap = edge_attribution_patching_prune_scores(model, loader, None)
    gradients = mask_gradient_prune_scores(
        model, loader, None, "logit", "avg_diff", mask_val=0.0
    )
    for name, scores in eap.items():
        t.testing.assert_close(scores, gradients[name], **EXACT)
    assert any(scores.abs().max() > 1e-3 for scores in eap.values())


# ------------------------------------------------------------------- nodes, and refusals


def test_names_of_nodes_and_what_they_read() -> None:
    model = make(gpt2(), "resid")
    srcs = [src.name for src in model.srcs]
    cut = [*(f"Resid Pre 1 Latent {i}" for i in range(N_LATENTS)), "Resid Pre 1 Error"]
    first = ["Resid Start", *(f"A0.{i}" for i in range(4)), "MLP 0"]
    assert srcs[: len(first) + len(cut)] == [*first, *cut]
    edges = model.edge_name_dict[None]
    for name in ("MLP 0->Resid Pre 1 Latent 3", "MLP 0->Resid Pre 1 Error",
                 "Resid Pre 1 Latent 3->A1.2.K", "Resid Pre 1 Error->MLP 1",
                 "MLP 1->Resid Post 1 Latent 0", "Resid Post 1 Latent 6->Resid End"):  # fmt: skip
        assert name in edges
    # Cut: what came before reaches what comes after through latents and the error alone.
    for name in ("MLP 0->MLP 1", "MLP 0->Resid Post 1 Error", "MLP 1->Resid End"):
        assert name not in edges
    links = component_links(model)
    fed = {dest.name: [link.src.name for link in links[dest]] for dest in model.dests}
    assert fed["Resid Pre 1 Latent 3"] == ["Resid Pre 1 Latent 3"]
    assert fed["Resid Pre 1 Error"] == ["Resid Pre 1 Error"]
    for place in ("z", "transcoder"):
        component_links(make(gpt2(), place))
    inside = make(gpt2(), "mid")
    edges = inside.edge_name_dict[None]
    for name in ("A0.1->Resid Mid 0 Latent 3", "Resid Mid 0 Error->MLP 0",
                 "MLP 0->A1.0.Q", "MLP 0->Resid Mid 1 Error", "Resid Mid 1 Latent 2->MLP 1",
                 "MLP 1->Resid End"):  # fmt: skip
        assert name in edges
    for name in ("A0.1->MLP 0", "Resid Start->A1.0.Q", "MLP 0->MLP 1"):
        assert name not in edges
    # A module of Hugging Face, and TransformerLens 4's own names.
    bridge = gpt2()
    for hook, name in (
        ("model.layers.1", "Resid Post 1"), ("transformer.h.0.mlp", "MLP 0"),
        ("gpt_neox.layers.1.attention", "A1"), ("blocks.1.ln2.hook_in", "Resid Mid 1"),
        ("blocks.1.hook_out", "Resid Post 1"), ("blocks.0.attn.o.hook_out", "A0"),
    ):  # fmt: skip
        (splice,) = spliced(bridge, [autoencoder(hook)]).splices
        assert splice.name == name


@pytest.mark.parametrize("top_n", [None, 2])
def test_latents_that_are_active_on_the_data(top_n: int | None) -> None:
    bridge, loader = gpt2(), token_loader(3, 2)
    items = [autoencoder("blocks.0.hook_mlp_out", kind="jumprelu"), Neurons(1)]
    sums: list[Any] = [0, 0]
    for batch in loader:
        for inputs in (batch.clean, batch.corrupt):
            _, cache = bridge.run_with_cache(inputs)
            sums[0] += plain_latents(items[0], cache["blocks.0.hook_mlp_out"]).sum((0, 1))
            sums[1] += cache["blocks.1.mlp.hook_post"].abs().sum((0, 1))
    found = active_latents(bridge, items, loader, top_n)
    for total, latents in zip(sums, found, strict=True):
        best = total.topk(min(top_n or len(total), int((total > 0).sum()))).indices
        assert latents == sorted(best.tolist())
    changes: list[Any] = [0, 0]
    for batch in loader:
        caches = [bridge.run_with_cache(x)[1] for x in (batch.clean, batch.corrupt)]
        encoded = [
            plain_latents(items[0], cache["blocks.0.hook_mlp_out"]) for cache in caches
        ]
        changes[0] += (encoded[0] - encoded[1]).abs().sum((0, 1))
        acts = [cache["blocks.1.mlp.hook_post"] for cache in caches]
        changes[1] += (acts[0] - acts[1]).abs().sum((0, 1))
    differing = active_latents(bridge, items, loader, 2, prompts="differ")
    assert differing == [sorted(c.topk(2).indices.tolist()) for c in changes]
    few = active_latents(bridge, items, loader, threshold=1e9)
    assert few == [[], []]
    model = spliced(bridge, items, found)
    names = [src.name for src in patchable_model(model, True, separate_qkv=True).srcs]
    assert [f"MLP 0 Latent {i}" for i in found[0]] == [n for n in names if "0 Lat" in n]


@pytest.mark.slow
def test_copies_of_spliced_models() -> None:
    model = make(gpt2(), "transcoder")
    copied = deepcopy(model)
    patch = src_ablations(copied, CORRUPT)
    t.testing.assert_close(patch, src_ablations(model, CORRUPT), **EXACT)
    double = make(gpt2(), "resid")
    double.wrapped_model.to(t.float64)
    patch = src_ablations(double, CORRUPT)
    assert patch.dtype == t.float64
    ungrouped = make(llama(), "outs", ungroup=True)
    assert "A1.3.K" in [dest.name for dest in ungrouped.dests]


RESID = "blocks.1.hook_resid_pre"


def test_what_cannot_be_done_is_refused() -> None:
    bridge = gpt2()

    def refused(kind: type[Exception], message: str, items: Any, *more: Any) -> None:
        with pytest.raises(kind, match=message):
            spliced(bridge, items, *more)

    good = autoencoder(RESID)
    refused(ConfigError, "encodes 7 numbers, of which this model has 32 there",
            [autoencoder(RESID, d_in=7)])  # fmt: skip
    refused(
        ConfigError, "no hook point 'blocks.2", [autoencoder("blocks.2.hook_mlp_out")]
    )
    refused(ConfigError, "no hook point 'x'", [autoencoder("x")])
    refused(ConfigError, "hook_mlp_outt.*not known. Did you mean 'hook_mlp_out'",
            [autoencoder("blocks.1.hook_mlp_outt")])  # fmt: skip
    refused(ConfigError, "'blocks.1.ln2.hook_out' cannot be put into the graph",
            [autoencoder("blocks.1.ln2.hook_out")])  # fmt: skip
    refused(
        ConfigError, "no hook point 'model.layers.2'", [autoencoder("model.layers.2")]
    )
    refused(ConfigError, "of the same block",
            [autoencoder("blocks.0.mlp.hook_in", "blocks.1.hook_mlp_out")])  # fmt: skip
    refused(ConfigError, "from 'blocks.1.hook_resid_pre' to", [
        autoencoder(RESID, "blocks.1.hook_mlp_out")])  # fmt: skip
    refused(ConfigError, "Two autoencoders replace 'MLP 1'",
            [autoencoder("blocks.1.hook_mlp_out"), Neurons(1)])  # fmt: skip
    refused(ConfigError, r"no latents \[7\]; it has 7", [good], [[0, 7]])
    refused(ConfigError, "would have none", [good], [[]])
    refused(ConfigError, "`latents` for 2", [good], [[0], [1]])
    refused(ConfigError, "0 autoencoders", [])
    refused(ConfigError, "does not say which hook point", [Plain(good)])
    refused(ConfigError, "has no `encode`", [Placed(3, RESID)])
    refused(ConfigError, "cannot encode an activation",
            [Placed(Plain(autoencoder(RESID, d_in=7)), RESID)])  # fmt: skip
    refused(ConfigError, "no neurons of block 5", [Neurons(5)])

    class Squared(Plain):
        def decode(self, latents: Tensor) -> Tensor:
            return self.inner.decode(latents) ** 2

    refused(ConfigError, "Expected a linear `decode`", [Placed(Squared(good), RESID)])

    class Odd:
        def __init__(self, encoded: Any, decoded: Any) -> None:
            self.encode, self.decode = lambda x: encoded(good.encode(x)), decoded

    for encoded, decoded, message in (
        (lambda z: z, lambda z: (good.decode(z),), r"`decode` of a Odd gives a tuple"),
        (lambda z: z, lambda z: good.decode(z)[:, :5], r"expected a Tensor \[9, 32\]"),
        (
            lambda z: z,
            lambda z: 1 / 0,
            r"`decode` of a Odd cannot take.*division by zero",
        ),
        (lambda z: z.reshape(-1, 7), good.decode, r"expected a Tensor \[1, 2, latents\]"),
        (lambda z: z.numpy(), good.decode, "`encode` of a Odd gives a ndarray"),
        (lambda z: z / 0, good.decode, "`encode` of a Odd gives NaN or infinity"),
    ):
        refused(ConfigError, message, [Placed(Odd(encoded, decoded), RESID)])
    damaged = replace(good, decoder_bias=good.decoder_bias / 0)
    refused(ModelError, "is damaged: its decoder_bias", [damaged])
    bridge = gpt2()
    bridge.blocks[0].mlp.original_component.act = t.nn.Tanh()
    inner = bridge.blocks[0].mlp.original_component
    forward = inner.forward
    inner.forward = lambda x: 3 * forward(x)
    refused(ModelError, "is a matrix times what is seen", [Neurons(0)], [[1]])
    inner.forward = lambda x: inner.c_proj(inner.c_fc(x).relu())
    refused(ModelError, "neurons are what the MLP's inputs say",
            [Neurons(0, as_destinations=True)], [[1]])  # fmt: skip
    with pytest.raises(ConfigError, match="a factorized graph only"):
        make(gpt2(), "resid", factorized=False)
