"""Latents, neurons, skips and cuts in models of many families, against plain hooks."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any

import pytest
import torch as t

from auto_circuit.errors import ConfigError, ModelError
from auto_circuit.experiment_utils import load_tl_model
from auto_circuit.features import Autoencoder, Neurons, spliced
from auto_circuit.utils.ablation_activations import src_ablations
from auto_circuit.utils.backward_modifiers import gim_backward, relp_backward
from auto_circuit.utils.graph_utils import (
    patch_mode,
    patchable_model,
    set_all_masks,
    train_mask_mode,
)
from auto_circuit.utils.patchable_model import PatchableModel
from tests import plain_parts
from tests.architecture_table import loss, off
from tests.architectures import hugging_face, plain_model
from tests.families import D_MODEL
from tests.models import tokens
from tests.plain_parts import Place
from tests.plain_patching import PlainModel, in_float64

CLEAN, CORRUPT = tokens(1, 6, seed=1), tokens(1, 6, seed=2)
N_LATENTS, KEPT = 4, [0, 3, 11]
READS = {"normed": "mlp.hook_in", "bare": "ln2.hook_normalized", "stream": "hook_mlp_in"}
EXACT = 1e-10


def autoencoder(hook: str, out: str | None, kind: str, skip: bool = False) -> Autoencoder:
    generator = t.Generator().manual_seed(3)

    def random(*shape: int) -> t.Tensor:
        return 0.3 * t.randn(shape, generator=generator, dtype=t.float64)

    return Autoencoder(
        kind=kind,  # type: ignore[arg-type]
        encoder_weight=random(N_LATENTS, D_MODEL),
        encoder_bias=random(N_LATENTS),
        decoder_weight=random(N_LATENTS, D_MODEL),
        decoder_bias=random(D_MODEL),
        k=2 if kind == "topk" else None,
        skip_weight=random(D_MODEL, D_MODEL) if skip else None,
        centres_input=out is None,
        hook_name=hook,
        hook_name_out=out,
    )


Made = tuple[Any, Callable[[PlainModel], Place]]


def place(name: str) -> Made:
    """(what is spliced in, the same place in a plain model)"""
    kind, _, reads = name.partition(" ")
    if kind == "neurons":
        item: Any = Neurons(0, as_destinations=True)
        return item, lambda plain: plain_parts.neurons(plain, 0, KEPT)
    if kind == "cut":
        item = autoencoder("blocks.0.hook_resid_mid", None, "standard")
        return item, lambda plain: plain_parts.cut_inside(plain, 0, item)
    item = autoencoder(
        f"blocks.0.{READS[reads]}",
        "blocks.0.hook_mlp_out",
        "topk" if kind == "topk" else "standard",
        kind == "skip",
    )
    return item, lambda plain: plain_parts.transcoder(plain, 0, item, reads)


def subject(family: str, name: str) -> tuple[PatchableModel, PlainModel, Place]:
    item, of_plain = place(name)
    plain = plain_model(family, t.float64)
    bridge = load_tl_model(hugging_face(family, t.float64))
    kept = [KEPT] if name == "neurons" else None
    model = patchable_model(spliced(bridge, [item], kept), True, separate_qkv=True)
    return model, plain, of_plain(plain)


CASES = (
    *(("gptj", name) for name in ("standard normed", "skip bare", "neurons")),
    *(("phi", "neurons"), ("falcon", "skip bare"), ("cohere", "neurons")),
    *(
        ("pythia", "standard normed"),
        ("llama", "skip normed"),
        ("gpt2", "standard stream"),
    ),
    *(("granite", name) for name in ("skip normed", "cut")),
    *(("gemma2", name) for name in ("neurons", "topk bare", "cut")),
    *(("olmo2", "skip stream"), ("olmo2", "neurons")),
)
FAST = (("gptj", "skip bare"),)
on_all_cases = pytest.mark.parametrize(
    ("family", "name"),
    [pytest.param(*c, marks=() if c in FAST else pytest.mark.slow) for c in CASES],
)


@on_all_cases
def test_parts_are_those_of_the_plain_model(family: str, name: str) -> None:
    with in_float64():
        _check_masks_edges_and_gradients(*subject(family, name))


def _check_masks_edges_and_gradients(
    model: PatchableModel, plain: PlainModel, of: Place
) -> None:
    patch = src_ablations(model, CORRUPT)
    for value, prompt in ((0.0, CLEAN), (1.0, CORRUPT)):
        set_all_masks(model, value)
        with t.no_grad(), patch_mode(model, patch):
            assert off(model(CLEAN), plain.logits(prompt)) < EXACT
    set_all_masks(model, 0.0)
    with t.no_grad():
        before = plain.logits(CLEAN)[0]
    effects = []
    for edge in _some_edges(model, of):
        src, dest = edge.src.name, edge.dest.name
        expected = plain_parts.edge(plain, of, CLEAN, CORRUPT, src, dest)[0] - before
        with t.no_grad(), patch_mode(model, patch, [edge]):
            found = model(CLEAN)[0] - before
        t.testing.assert_close(found, expected, rtol=1e-7, atol=1e-9, msg=edge.name)
        effects.append(float(expected.abs().max()))
    assert sum(effect > 1e-3 for effect in effects) >= len(effects) // 2, effects
    for value in (0.0, 0.5):
        assert _gradient_is_off(model, patch, value) < 1e-6


def _some_edges(model: PatchableModel, of: Place) -> list[Any]:
    """Into and out of the place; the skip's and the error's among them."""
    edges = list(model.edges)
    Random(0).shuffle(edges)
    into = [edge for edge in edges if edge.dest.name in of.words]
    out = [edge for edge in edges if edge.src.name in of.words]
    last = [e for e in (*into, *out) if {e.src.name, e.dest.name} & {*of.words[-2:]}]
    return [*into[:5], *out[:5], *last[:4], *last[-4:]]


def _gradient_is_off(model: PatchableModel, patch: t.Tensor, value: float) -> float:
    """All masks' gradient along a random direction, from finite differences."""
    generator, step = t.Generator().manual_seed(1), 1e-5
    with train_mask_mode(model) as masks, patch_mode(model, patch):
        set_all_masks(model, value)
        loss(model(CLEAN)).backward()
        grads = {name: mask.grad for name, mask in masks.items() if mask.grad is not None}
        assert [*grads] == [*masks] and all(grad.any() for grad in grads.values())
        way = {
            name: t.randn(mask.shape, generator=generator, dtype=mask.dtype)
            for name, mask in masks.items()
        }
        slope = t.stack([(grads[name] * way[name]).sum() for name in way]).sum()
        values = []
        for factor in (1, -1, 2, -2):
            for name, mask in masks.items():
                mask.data = value + factor * step * way[name]
            with t.no_grad():
                values.append(loss(model(CLEAN)))
    set_all_masks(model, 0.0)
    near, far = values[0] - values[1], values[2] - values[3]
    return off(slope, (8 * near - far) / (12 * step))


def test_what_an_architecture_cannot_have_is_refused() -> None:
    parallel = load_tl_model(hugging_face("gptj"))
    with pytest.raises(ModelError, match="there is none between them"):
        spliced(parallel, [autoencoder("blocks.0.hook_resid_mid", None, "standard")])
    inside = load_tl_model(hugging_face("bloom"))
    with pytest.raises(
        ModelError, match="not what is added.*Use autoencoders of `hook_m"
    ):
        spliced(inside, [autoencoder("blocks.0.mlp.hook_out", None, "standard")])
    model = patchable_model(
        spliced(parallel, [Neurons(0)], [KEPT]), True, separate_qkv=True
    )
    for modifier in (gim_backward, relp_backward):
        with pytest.raises(
            ConfigError, match="no rule for latents.*Run the algorithm with"
        ):
            with modifier(model):
                pass
