"""The options of algorithms as data: what a config says, and who takes one."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from dataclasses import FrozenInstanceError, replace
from functools import partial
from typing import Any

import pytest
import torch as t

from auto_circuit.errors import ConfigError
from auto_circuit.metrics.completeness_metrics.train_same_under_knockouts import (
    KnockoutTrainingConfig,
    train_same_under_knockout_prune_scores,
)
from auto_circuit.prune_algos.ACDC import AcdcConfig
from auto_circuit.prune_algos.acdc_after_eap import AcdcAfterEapConfig
from auto_circuit.prune_algos.algo_config import AlgoConfig, bound, config_of
from auto_circuit.prune_algos.circuit_probing import (
    CircuitProbingConfig,
    circuit_probing_prune_scores,
    probe_circuits,
)
from auto_circuit.prune_algos.edge_pruning import (
    EdgePruningConfig,
    edge_pruning_prune_scores,
)
from auto_circuit.prune_algos.exact_edge_patching import ExactEdgePatchingConfig
from auto_circuit.prune_algos.integrated_gradients import InputIntegratedGradientsConfig
from auto_circuit.prune_algos.mask_gradient import MaskGradientConfig
from auto_circuit.prune_algos.mask_training import (
    PatchedEdges,
    circuit_logits,
    set_circuit_logits,
)
from auto_circuit.prune_algos.matryoshka import MatryoshkaConfig, train_matryoshka
from auto_circuit.prune_algos.prompt_scores import PromptScoresConfig
from auto_circuit.prune_algos.prune_algo import PruneAlgo
from auto_circuit.prune_algos.prune_algos import PRUNE_ALGOS, find_prune_algo
from auto_circuit.prune_algos.random_edges import RandomConfig
from auto_circuit.prune_algos.subnetwork_probing import (
    INIT_LOGIT,
    SubnetworkProbingConfig,
    subnetwork_probing_prune_scores,
    train_subnetwork,
)
from auto_circuit.types import AblationType, PruneScores
from auto_circuit.utils.graph_utils import train_mask_mode
from auto_circuit.utils.patchable_model import PatchableModel
from tests.micro import micro_loader, micro_model

WITHOUT_OPTIONS = ("GT", "Act Mag")
WITH_OPTIONS = [
    algo
    for algo in PRUNE_ALGOS
    if hasattr(getattr(algo.func, "func", algo.func), "config_type")
]


@pytest.fixture(scope="module")
def model() -> PatchableModel:
    return micro_model()


def are_equal(one: PruneScores, other: PruneScores) -> bool:
    return all(t.equal(one[name], other[name]) for name in one)


# ------------------------------------------------------------------------- what they say


@pytest.mark.parametrize("algo", WITH_OPTIONS, ids=lambda algo: algo.key)
def test_an_algorithms_options_are_plain_data(algo: PruneAlgo) -> None:
    description = algo.description()
    assert json.loads(json.dumps(description)) == description
    assert description["key"] == algo.key
    config = algo.config
    assert config is not None
    assert description["config"] == config.description()
    same = config.with_options()
    assert same == config and hash(same) == hash(config) and same is not config


@pytest.mark.parametrize("algo", WITH_OPTIONS, ids=lambda algo: algo.key)
def test_functions_and_configs_have_the_same_options(algo: PruneAlgo) -> None:
    """With the same defaults, so that one runs what the other says."""
    front: Any = getattr(algo.func, "func", algo.func)
    parameters = inspect.signature(front).parameters
    defaults = front.config_type.option_defaults()
    assert set(defaults) <= set(parameters)
    given = {name: parameters[name].default for name in defaults}
    required = {"grad_function": "logit", "answer_function": "avg_diff", "mask_val": 0.0}
    if inspect.Parameter.empty in given.values():
        given.update(required)
        assert config_of(partial(front, **required)) == front.config_type(**given)
    else:
        assert config_of(front) == front.config_type.from_options(**given)
    assert algo.config == config_of(algo.func)


def test_an_algorithm_without_options_has_no_config() -> None:
    assert len(WITH_OPTIONS) >= 40
    for name in WITHOUT_OPTIONS:
        algo = find_prune_algo(name)
        assert algo.config is None
        assert algo.description() == {"key": algo.key, "config": None}


def test_algorithms_with_other_options_are_other_algorithms() -> None:
    algo = find_prune_algo("EP quick")
    config = algo.config
    assert isinstance(config, EdgePruningConfig)
    assert config.n_steps == 128 and config.warm_start == find_prune_algo("EAP-IG inputs")
    seven = algo.with_seed(7).config
    assert isinstance(seven, EdgePruningConfig)
    assert seven == replace(config, seed=7) != config
    # Whatever a user changes, the config says what runs.
    short = replace(algo, func=partial(algo.func, n_steps=3))
    assert short.config == replace(config, n_steps=3)
    assert PruneAlgo(key="Mine", name="Mine", func=lambda *_: {}).config is None


def test_configs_of_different_classes_and_of_different_scores(
    model: PatchableModel,
) -> None:
    assert EdgePruningConfig() != MatryoshkaConfig()
    assert SubnetworkProbingConfig() != CircuitProbingConfig()
    scores, other = model.new_prune_scores(1.0), model.new_prune_scores(1.0)
    one = EdgePruningConfig(warm_start=scores)
    assert one == EdgePruningConfig(warm_start=other)
    next(iter(other.values())).view(-1)[0] = 1 + 1e-6
    assert one != EdgePruningConfig(warm_start=other)
    edges = list(model.edges)[:5]
    avoiding = SubnetworkProbingConfig(avoid_edges=set(edges))
    assert avoiding == SubnetworkProbingConfig(avoid_edges=edges[::-1])
    assert hash(avoiding) == hash(SubnetworkProbingConfig(avoid_edges=edges))
    assert avoiding != SubnetworkProbingConfig()
    with pytest.raises(FrozenInstanceError):
        one.n_steps = 3  # type: ignore[misc]


def test_a_description_by_hand() -> None:
    """It names results that are stored: it may not change by itself."""
    config = MatryoshkaConfig(n_steps=7, ablation_type=AblationType.ZERO)
    assert config.description() == {
        "config": "MatryoshkaConfig",
        "n_steps": 7,
        "learning_rate": 0.05,
        "temperature": 0.5,
        "sizes": "log_uniform",
        "ablation_type": "ZERO",
        "seed": 0,
        "faithfulness_target": "logit_diff",
    }
    sizes = CircuitProbingConfig(circuit_sizes=[5, "true_size"]).description()
    assert sizes["circuit_sizes"] == [5, "true_size"]
    warm = find_prune_algo("EP quick").description()["config"]["warm_start"]
    assert warm == find_prune_algo("EAP-IG inputs").description()


# ------------------------------------------------------------------------ who takes them


def test_options_come_as_a_config_or_one_by_one(model: PatchableModel) -> None:
    loader, config = micro_loader([1, 2]), EdgePruningConfig(n_steps=3, seed=5)
    expected = edge_pruning_prune_scores(model, loader, None, config)
    for args, options in (
        ((), {"config": config}),
        ((), {"n_steps": 3, "seed": 5}),
        ((0.98, 3), {"seed": 5}),
        ((replace(config, seed=0),), {"seed": 5}),
    ):
        found = edge_pruning_prune_scores(model, loader, None, *args, **options)
        assert are_equal(found, expected)
    changed = edge_pruning_prune_scores(model, loader, None, config, seed=6)
    assert not are_equal(changed, expected)
    with pytest.raises(TypeError, match="unexpected keyword argument 'n_step'"):
        edge_pruning_prune_scores(model, loader, None, n_step=3)
    with pytest.raises(
        ConfigError, match="`config` is a MatryoshkaConfig; .* takes a Edge"
    ):
        edge_pruning_prune_scores(model, loader, None, MatryoshkaConfig())


def test_published_functions_are_fronts_of_configs(model: PatchableModel) -> None:
    loader, edges = micro_loader([1, 2]), list(model.edges)[:4]
    config = SubnetworkProbingConfig(epochs=2, first_logit=0.3, tree_optimisation=True)
    expected = train_subnetwork(model, loader, config).prune_scores
    options: dict[str, Any] = {"epochs": 2, "init_val": -0.3, "tree_optimisation": True}
    found = subnetwork_probing_prune_scores(model, loader, None, **options)
    assert are_equal(found, expected)
    found = train_subnetwork(model, loader, **options).prune_scores
    assert are_equal(found, expected)

    sizes = CircuitProbingConfig(epochs=2, circuit_sizes=("true_size", 7))
    expected = probe_circuits(model, loader, edges, sizes)
    found = circuit_probing_prune_scores(
        model, loader, edges, epochs=2, circuit_sizes=["true_size", 7]
    )
    assert are_equal(found, expected)


def test_a_published_parameter_has_its_own_sign() -> None:
    """`init_val` is minus the logit of being in the circuit, and only outside."""
    assert SubnetworkProbingConfig().first_logit == -INIT_LOGIT
    assert CircuitProbingConfig().first_logit == INIT_LOGIT
    config = SubnetworkProbingConfig.from_options(init_val=2.0)
    assert config.first_logit == -2.0 and config.options()["init_val"] == 2.0
    assert "init_val" not in config.description()
    with pytest.raises(ConfigError, match="`init_val` is inf; expected a finite number"):
        SubnetworkProbingConfig.from_options(init_val=t.inf)


@pytest.mark.parametrize("patched,sign", [("circuit", 1.0), ("others", -1.0)])
def test_masks_speak_of_patching_and_logits_of_the_circuit(
    model: PatchableModel, patched: PatchedEdges, sign: float
) -> None:
    with train_mask_mode(model, notes=False) as masks:
        set_circuit_logits(masks, model.new_prune_scores(3.0), patched)
        assert all((mask == sign * 3).all() for mask in masks.values())
        assert all((x == 3).all() for x in circuit_logits(masks, patched).values())


# -------------------------------------------------------------------------- out of range


@pytest.mark.parametrize(
    "config,options,message",
    [
        (SubnetworkProbingConfig, {"epochs": 0}, "`epochs` is 0; expected at least 1"),
        (SubnetworkProbingConfig, {"circuit_size": -1}, "`circuit_size` is -1; .* 1"),
        (SubnetworkProbingConfig, {"dropout_p": 2}, "`dropout_p` is 2; .* at most 1"),
        (SubnetworkProbingConfig, {"seed": -1}, "`seed` is -1; expected at least 0"),
        (SubnetworkProbingConfig, {"first_logit": t.nan}, "`first_logit` is nan"),
        (
            SubnetworkProbingConfig,
            {"ablation_type": AblationType.ZERO},
            "The ablation Zero patches no clean activations",
        ),
        (CircuitProbingConfig, {"epochs": 0}, "`epochs` is 0; expected at least 1"),
        (CircuitProbingConfig, {"circuit_sizes": (5, 0)}, "is 0; expected at least 1"),
        (CircuitProbingConfig, {"circuit_sizes": (5, 5)}, "expected different sizes"),
        (CircuitProbingConfig, {"circuit_sizes": ()}, "`circuit_sizes` is empty"),
        (
            EdgePruningConfig,
            {"target_sparsity": 1},
            "`target_sparsity` is 1; .*above 0 and below 1",
        ),
        (EdgePruningConfig, {"n_steps": 0}, "`n_steps` is 0; expected at least 1"),
        (
            EdgePruningConfig,
            {"warmup_share": 0},
            "`warmup_share` is 0; .*above 0 and at most 1",
        ),
        (
            EdgePruningConfig,
            {"multiplier_learning_rate": t.inf},
            "`multiplier_learning_rate` is inf; .*above 0",
        ),
        (AcdcConfig, {"tao_bases": (1, 0)}, "`tao_bases` is 0; .*above 0"),
        (AcdcConfig, {"tao_exps": (-400,)}, "`tao_exps` is -400; expected at least -300"),
        (AcdcConfig, {"edges_at_once": 0}, "`edges_at_once` is 0; expected at least 1"),
        (AcdcConfig, {"tao_exps": ()}, "There are no thresholds"),
        (AcdcAfterEapConfig, {"n_candidates": 0}, "`n_candidates` is 0; expected at"),
        (AcdcAfterEapConfig, {"thresholds": (0.1, -1)}, "`threshold` is -1; .*above 0"),
        (ExactEdgePatchingConfig, {"edges_at_once": 0}, "`edges_at_once` is 0; expected"),
        (
            InputIntegratedGradientsConfig,
            {"integrated_grad_samples": 0},
            "`integrated_grad_samples` is 0; expected at least 1",
        ),
        (
            partial(MaskGradientConfig, mask_val=0.0),
            {"mask_val": t.nan},
            "`mask_val` is nan; expected a finite number",
        ),
        (
            partial(MaskGradientConfig, mask_val=0.0),
            {"integrated_grad_samples": 3},
            "exactly one of `mask_val` .* and `integrated_grad_samples`",
        ),
        (PromptScoresConfig, {"mask_val": t.inf}, "`mask_val` is inf"),
        (RandomConfig, {"seed": -1}, "`seed` is -1; expected at least 0"),
        (
            partial(
                KnockoutTrainingConfig, learning_rate=0.1, epochs=1, regularize_lambda=1
            ),
            {"regularize_lambda": -0.5},
            "`regularize_lambda` is -0.5; .*at least 0",
        ),
        (MatryoshkaConfig, {"temperature": 0}, "`temperature` is 0; .*above 0"),
        (MatryoshkaConfig, {"learning_rate": -1}, "`learning_rate` is -1; .*above 0"),
        (MatryoshkaConfig, {"seed": 2**63}, "`seed` is 9.*; expected at least 0 and"),
    ],
)
def test_a_config_out_of_range(
    config: Callable[..., AlgoConfig], options: dict[str, Any], message: str
) -> None:
    """Said when it is made: before any model is there."""
    with pytest.raises(ConfigError, match=message):
        config(**options)
    with pytest.raises(ConfigError, match=message):
        replace(config(), **options)


def test_an_option_out_of_range_costs_no_pass(model: PatchableModel) -> None:
    class NeverRead:
        def __getattr__(self, name: str) -> Any:
            raise AssertionError(f"the loader's {name} was looked at")

    loader: Any = NeverRead()
    with pytest.raises(ConfigError, match="`n_steps` is 0; expected at least 1"):
        train_matryoshka(model, loader, n_steps=0)


def test_a_config_without_defaults_comes_as_one_or_one_by_one() -> None:
    """Whether as the fourth argument, by name, or field by field, in their order."""
    config = KnockoutTrainingConfig(learning_rate=0.1, epochs=1, regularize_lambda=1)
    train: Any = train_same_under_knockout_prune_scores
    for args, options in (
        ((config,), {}),
        ((), {"config": config}),
        ((0.1, 1, 1), {}),
    ):
        with pytest.raises(ConfigError, match="`algo_ps` is None; expected a dictionary"):
            train(None, None, 2, *args, **options)
    with pytest.raises(TypeError, match="missing a required argument: 'epochs'"):
        train(None, None, 2, 0.1)


def test_what_bound_gives_can_still_be_changed(model: PatchableModel) -> None:
    config = MatryoshkaConfig(n_steps=2)
    func = bound(train_matryoshka, config)  # type: ignore[arg-type]
    assert len(func(model, micro_loader()).steps) == 2
    assert len(func(model, micro_loader(), n_steps=4).steps) == 4
