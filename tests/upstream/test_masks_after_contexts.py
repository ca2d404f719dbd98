"""Masks after `patch_mode` and `train_mask_mode`: there they stayed, here they are put back.

Whoever would see the difference is told.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch as t
from torch import Tensor

from auto_circuit.engine.masks_put_back import MasksPutBackWarning
from auto_circuit.errors import GraphError
from auto_circuit.types import Edge
from auto_circuit.utils.ablation_activations import src_ablations
from auto_circuit.utils.graph_utils import (
    patch_mode,
    preserved_masks,
    set_all_masks,
    train_mask_mode,
)
from auto_circuit.utils.patchable_model import PatchableModel
from auto_circuit.visualize import draw_seq_graph, net_viz
from tests.micro import CLEAN, micro_model

NAMES = ["B0.1->Resid End", "B0.0->B1.1"]
PUT_BACK = "masks are again what they were before `patch_mode`"


@pytest.fixture
def model() -> PatchableModel:
    return micro_model()


def acts(model: PatchableModel) -> Tensor:
    return src_ablations(model, -CLEAN[None])


def leave_patch_mode(model: PatchableModel, names: list[str] = NAMES) -> Tensor:
    with patch_mode(model, acts(model), names):
        return model(CLEAN[None])


def edges(model: PatchableModel, names: list[str] = NAMES) -> list[Edge]:
    return [edge for name in names for edge in model.find_edges(name)]


def drawn(model: PatchableModel) -> set[str]:
    (sankey,) = draw_seq_graph(model, display_ipython=False).data
    link: Any = sankey.link
    return {name for name, _ in link.customdata}


def test_edges_are_drawn_inside(model: PatchableModel) -> None:
    with patch_mode(model, acts(model), NAMES):
        assert drawn(model) == set(NAMES)
        sankey, n_layers = net_viz(model, model.edges, None, (0.0, 1.0))
        drawn_links: Any = sankey.link
        assert {name for name, _ in drawn_links.customdata} == set(NAMES)
        assert n_layers == 3


@pytest.mark.parametrize("value", [0.0, 1.0], ids=["none set before", "all set before"])
def test_drawing_after_it_says_where_to_draw(model: PatchableModel, value: float) -> None:
    set_all_masks(model, value)
    leave_patch_mode(model)
    for draw in (
        lambda: draw_seq_graph(model),
        lambda: net_viz(model, model.edges, None, (0.0, 1.0)),
    ):
        with pytest.raises(GraphError, match=f"{PUT_BACK}.*call this inside"):
            draw()
    fig = draw_seq_graph(model, model.circuit_prune_scores(NAMES))
    assert set(fig.data[0].link.label) == set(NAMES)  # type: ignore[union-attr]
    set_all_masks(model, 0.5)
    assert len(drawn(model)) == 13


@pytest.mark.parametrize(
    "read",
    [
        lambda model: model.current_patch_masks_as_prune_scores(),
        lambda model: call_again(model),
    ],
    ids=["scores", "patch_mode without edges"],
)
def test_reading_after_it_warns_once(
    model: PatchableModel, read: Callable[[PatchableModel], Any]
) -> None:
    leave_patch_mode(model)
    with pytest.warns(MasksPutBackWarning, match=PUT_BACK):
        read(model)
    read(model)  # no warning
    leave_patch_mode(model)
    set_all_masks(model, 0.0)
    read(model)  # nor if masks have been set since


def call_again(model: PatchableModel) -> Tensor:
    with patch_mode(model, acts(model)):
        return model(CLEAN[None])


def test_one_more_edge_by_hand(model: PatchableModel) -> None:
    """There the edge came on top of those of `patch_mode`; here it is alone."""
    leave_patch_mode(model, NAMES[:1])
    (second,) = edges(model, NAMES[1:])
    second.patch_mask(model).data[second.patch_idx] = 1.0
    with pytest.warns(MasksPutBackWarning, match="names no edges"):
        alone = call_again(model)
    t.testing.assert_close(alone, leave_patch_mode(model, NAMES[1:]))
    (first,) = edges(model, NAMES[:1])
    model.patch_masks[first.dest.module_name].data[first.patch_idx] = 1.0
    t.testing.assert_close(call_again(model), leave_patch_mode(model))


def test_masks_that_are_all_set_by_hand_are_no_surprise(model: PatchableModel) -> None:
    leave_patch_mode(model)
    for mask in model.patch_masks.values():
        mask.data.fill_(0.25)
    call_again(model)
    assert len(drawn(model)) == 13


def test_set_all_masks_and_patch_mode_without_edges(model: PatchableModel) -> None:
    """All edges patched: the output of the corrupt prompt, with or without a context."""
    set_all_masks(model, 1.0)
    t.testing.assert_close(call_again(model), model(-CLEAN[None]))
    with patch_mode(model, acts(model)):
        set_all_masks(model, 0.0)
        t.testing.assert_close(model(CLEAN[None]), CLEAN[None] * t.tensor([25.0, 49.0]))
    assert draw_seq_graph(model).data == ()  # the masks are 0 now, here as there


def test_trained_masks_are_read_inside(model: PatchableModel) -> None:
    with train_mask_mode(model) as masks:
        for mask in masks.values():
            mask.data.fill_(0.7)
        inside = {
            name: scores.clone()
            for name, scores in model.current_patch_masks_as_prune_scores().items()
        }
    assert {float(scores.min()) for scores in inside.values()} == {t.tensor(0.7).item()}
    with pytest.warns(MasksPutBackWarning, match="before `train_mask_mode`"):
        outside = model.current_patch_masks_as_prune_scores()
    assert {float(scores.max()) for scores in outside.values()} == {0.0}


def test_contexts_that_change_nothing_say_nothing(model: PatchableModel) -> None:
    set_all_masks(model, 1.0)
    with train_mask_mode(model), patch_mode(model, acts(model)):
        model(CLEAN[None])
    with preserved_masks(model):
        set_all_masks(model, 0.0)  # no context that auto-circuit had
    assert {float(m.min()) for m in model.current_patch_masks_as_prune_scores().values()}
    call_again(model)
