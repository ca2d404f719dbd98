"""Names, attributes and parameters of auto-circuit: each works, or says what does."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch as t
from torch.nn import Identity

from auto_circuit.errors import ConfigError, GoneError, GraphError
from auto_circuit.model_utils.micro_model_utils import MicroModel
from auto_circuit.prune_algos.ground_truth import ground_truth_prune_scores
from auto_circuit.tasks import (
    DATASET_CACHE,
    MODEL_CACHE,
    TASK_DICT,
    FrozenTaskError,
    Task,
    find_task,
)
from auto_circuit.utils.ablation_activations import src_ablations
from auto_circuit.utils.graph_utils import patch_mode, patchable_model, set_all_masks
from auto_circuit.utils.misc import module_by_name, set_module_by_name
from auto_circuit.utils.patch_wrapper import GONE_ATTRIBUTES, PatchWrapperImpl
from auto_circuit.utils.patchable_model import PatchableModel
from auto_circuit.visualize import net_viz, node_name
from tests.micro import CLEAN, micro_loader, micro_model
from tests.texts import write_prompts


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = CLEAN.tolist()
    prompt = {"clean": rows, "corrupt": rows[::-1], "answers": [1], "wrong_answers": [0]}
    return write_prompts(tmp_path_factory.mktemp("prompts"), [prompt] * 6)


def micro_task(prompts: Path, **options: Any) -> Task:
    return Task("mine", "Mine", 2, 1, False, MicroModel(), prompts, **options)


# ------------------------------------------------------------------------- wrappers


def test_a_node_s_module_is_its_wrapper() -> None:
    model = micro_model()
    edge = model.find_edges("B0.0->B1.1")[0]
    wrapper: Any = module_by_name(model, edge.dest.module_name)
    assert wrapper is edge.dest.module(model) is model.wrapper(edge.dest.module_name)
    wrapper.patch_mask.data[edge.patch_idx] = 1.0
    with patch_mode(model, src_ablations(model, -CLEAN[None])):
        by_wrapper = model(CLEAN[None])
    set_all_masks(model, 0.0)
    with patch_mode(model, src_ablations(model, -CLEAN[None]), [edge]):
        t.testing.assert_close(model(CLEAN[None]), by_wrapper)
    inner = module_by_name(model.wrapped_model, edge.dest.module_name)
    assert not isinstance(inner, PatchWrapperImpl)
    assert module_by_name(model, "blocks.1") is model.wrapped_model.blocks[1]
    with pytest.raises(GraphError, match="is a node of this PatchableModel"):
        set_module_by_name(model, edge.dest.module_name, Identity())


def test_a_wrapper_says_what_it_does_not_have() -> None:
    wrapper: Any = next(iter(micro_model().dest_wrappers))
    for name in GONE_ATTRIBUTES:
        assert not hasattr(wrapper, name)
        with pytest.raises(GoneError, match=f"has no `{name}`: "):
            getattr(wrapper, name)
        with pytest.raises(GoneError, match=f"has no `{name}`: "):
            setattr(wrapper, name, None)
    for call in (
        lambda: wrapper(CLEAN),
        lambda: wrapper.register_forward_hook(print),
        lambda: wrapper.register_forward_pre_hook(print),
        lambda: wrapper.register_full_backward_hook(print),
    ):
        with pytest.raises(GraphError, match="runs nothing.*on the module itself"):
            call()
    assert wrapper.batch_size is None


# ---------------------------------------------------------------------------- tasks


def test_fields_of_a_task_cannot_be_set_and_it_says_how(prompts: Path) -> None:
    task: Any = micro_task(prompts)
    for name in ("batch_size", "_model_def", "_model", "device", "new"):
        with pytest.raises(FrozenTaskError, match=f"replace.task, {name}="):
            setattr(task, name, 3)
    assert replace(task, batch_size=3).train_loader.n_prompts == 3


def test_init_task_and_the_private_names(prompts: Path) -> None:
    task: Any = micro_task(
        prompts, _true_edge_func=lambda model: set(list(model.edges)[:2])
    )
    assert "_model" not in vars(task)
    task.init_task()
    assert task.__init_complete__
    assert task._model is task.model and isinstance(task.model, PatchableModel)
    assert task._train_loader is task.train_loader
    assert task._test_loader is task.test_loader
    assert task._true_edges == task.true_edges and task.true_edge_count == 2
    model = task.model
    task.init_task()
    assert task.model is model
    task.free()
    assert "_model" not in vars(task) and task.model is not model


def test_a_subclass_may_bring_its_own_model_and_loaders(prompts: Path) -> None:
    class Mine(Task):
        def init_task(self) -> None:
            self._train_loader = micro_loader([1.0, 2.0])
            self._test_loader = micro_loader([3.0])
            self._model = micro_model(seq_len=3)
            self._true_edges = {next(iter(self._model.edges))}
            self.__init_complete__ = True

    class Changed(Task):
        def init_task(self) -> None:
            super().init_task()
            self._model = patchable_model(MicroModel(3), True)

    mine = Mine("m", "M", 1, 1, False, "no such model", "no such file")
    assert mine.true_edge_count == 1
    assert (mine.train_loader.n_prompts, mine.test_loader.n_prompts) == (2, 1)
    assert mine.model.seq_len == 3
    scores = ground_truth_prune_scores(mine.model, mine.train_loader, mine.true_edges)
    assert sum(float(score.sum()) for score in scores.values()) == 1
    changed = Changed(**{**vars(micro_task(prompts)), "key": "changed"})
    assert changed.model.n_edges > micro_task(prompts).model.n_edges == 13
    assert changed.train_loader.n_prompts == 2
    with pytest.raises(FrozenTaskError):
        changed.batch_size = 3  # type: ignore[misc]


def test_a_registered_task_is_found_by_its_key(
    monkeypatch: pytest.MonkeyPatch, prompts: Path
) -> None:
    from auto_circuit.metrics.prune_metrics.measure_prune_metrics import (
        measure_prune_metrics,
    )
    from auto_circuit.metrics.prune_metrics.prune_metrics import (
        CLEAN_KL_DIV_METRIC,
    )
    from auto_circuit.types import AblationType, PatchType

    task = micro_task(prompts)
    monkeypatch.setitem(TASK_DICT, task.key, task)
    assert find_task("mine") is task
    scores = {task.key: {"Random": task.model.new_prune_scores(1.0)}}
    found = measure_prune_metrics(
        [AblationType.RESAMPLE],
        [CLEAN_KL_DIV_METRIC],
        scores,
        PatchType.TREE_PATCH,
        test_edge_counts=[13],
    )
    points = found[AblationType.RESAMPLE][CLEAN_KL_DIV_METRIC.key][task.key]["Random"]
    assert points == [(13, pytest.approx(0, abs=1e-6))]


@pytest.mark.parametrize("cache", [MODEL_CACHE, DATASET_CACHE])
def test_global_caches_say_that_there_are_none(cache: Any) -> None:
    for use in (
        lambda: cache.clear(),
        lambda: len(cache),
        lambda: "gpt2" in cache,
        lambda: cache["gpt2"],
        lambda: cache.pop("gpt2", None),
        lambda: list(cache),
    ):
        with pytest.raises(ConfigError, match="task.free"):
            use()


# --------------------------------------------------------------------------- figures


def test_node_names() -> None:
    names = {
        "Resid Start": "Embed",
        "Resid End": "",
        "A9.11.Q": "A9.11",
        "MLP 3": "MLP 3",
    }
    assert {name: node_name(name) for name in names} == names
    assert node_name("Resid End", unembed=True) == "Unembed"


def test_net_viz_takes_auto_circuit_s_parameters() -> None:
    model = micro_model(seq_len=2)
    scores = model.circuit_prune_scores(
        edge_dict={
            "B0.0->B1.1 @ 0": 2.0,
            "B0.1->Resid End @ 0": -0.5,
            "Resid Start->B0.0 @ 0": 0.001,
            "B0.0->B1.1 @ 1": 3.0,
        }
    )
    sankey, n_layers = net_viz(
        model=model,
        seq_edges=set(model.edge_dict[0]),
        prune_scores=scores,
        vert_interval=(0.25, 0.75),
        seq_idx=0,
        layer_spacing=False,
        orientation="h",
    )
    shown = dict(zip(sankey.link.label, sankey.link.value, strict=True))  # type: ignore[union-attr]
    assert shown == {"B0.0->B1.1 @ 0": 2.0, "B0.1->Resid End @ 0": 0.5}
    assert tuple(sankey.domain.y) == (0.25, 0.75) and n_layers == 3  # type: ignore[union-attr]
    _, all_layers = net_viz(model, model.edge_dict[0], scores, (0, 1), 0, 0.0, True, "v")
    assert all_layers == len({node.layer for node in model.nodes}) == 4
    with pytest.raises(GraphError, match="is not at the position"):
        net_viz(model, model.edge_dict[1], scores, (0.0, 1.0), 0)
