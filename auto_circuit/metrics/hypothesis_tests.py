"""Statistical tests of what is claimed of a circuit, after Shi et al. 2024.

The *score* of a circuit on a prompt is a metric's value there (logit difference, unless
another is given); its *distance* is the mean over prompts of |its score - the full
model's|. The input is clean, and the ablation is patched in along all other edges. A
*random circuit* has as many edges as the tested one, each set equally likely.

| test              | null hypothesis                                       | a good circuit |
|-------------------|-------------------------------------------------------|----------------|
| sufficiency       | it is nearer to the model than at most a share q of   | is rejected    |
|                   | random circuits                                       |                |
| partial necessity | removing it harms the model more than removing at     | is rejected    |
|                   | most a share q of random circuits                     |                |
| equivalence       | it scores higher than the model on half of all        | is not         |
|                   | prompts, give or take epsilon                         |                |
| independence      | without it, the model's scores tell nothing of what   | is not         |
|                   | they were                                             |                |
| minimality        | each edge matters more than a share q of edges that   | is not         |
|                   | were added at random                                  |                |

A test that does not reject proves nothing; with few prompts it seldom rejects.

Source: Shi et al. 2024 (arXiv 2410.13032). Differs from its code, which took the mean
score difference for the share of prompts with a positive one in the equivalence test,
and did not correct the minimality test for its many edges.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch as t
from jaxtyping import Float
from torch import Tensor

from auto_circuit.checks import check_count, check_number, checked, seeded_generator
from auto_circuit.circuits import Circuit, CircuitMasks, all_edges, as_circuit
from auto_circuit.data import PromptDataLoader
from auto_circuit.errors import ConfigError, DataError
from auto_circuit.metrics.circuit_outs import circuit_prompt_vals
from auto_circuit.metrics.minimality import removal_effects
from auto_circuit.metrics.prune_metrics.prune_metrics import (
    LOGIT_DIFF_METRIC,
    PruneMetric,
)
from auto_circuit.types import AblationType, Edge
from auto_circuit.utils.patchable_model import PatchableModel


@dataclass(frozen=True)
class HypothesisTest:
    """The result of a test.

    statistic: what was observed (each test says what). n: how many random circuits, or
        prompts, that is about.
    p_value: how likely it is, if the null hypothesis holds, to see this or something
        that speaks even more against it; in [0, 1].
    alpha: the null hypothesis is rejected if p_value is below this.
    rejection_is_good: does a rejection speak for the circuit, or against it?
    """

    name: str
    statistic: float
    n: int
    p_value: float
    alpha: float
    rejection_is_good: bool

    @property
    def rejected(self) -> bool:
        """Is the null hypothesis rejected?"""
        return self.p_value < self.alpha

    @property
    def speaks_for_circuit(self) -> bool:
        """Is the decision the one that a good circuit gets?"""
        return self.rejected == self.rejection_is_good


@dataclass(frozen=True)
class EdgeMinimalityTest:
    """The test of one edge: its effect is |m(circuit) - m(circuit without the edge)|.

    test.statistic: the share of random added edges whose effect is smaller.
    """

    edge: Edge
    effect: float
    test: HypothesisTest


@dataclass(frozen=True)
class MinimalityTest:
    """The tests of all edges of a circuit, in graph order.

    A single edge is rejected below alpha / number of edges (Bonferroni), so that some
    edge of a minimal circuit is rejected with a probability of at most alpha.
    """

    edges: tuple[EdgeMinimalityTest, ...]
    alpha: float

    @property
    def superfluous(self) -> tuple[Edge, ...]:
        """The edges that matter no more than random ones."""
        return tuple(edge.edge for edge in self.edges if edge.test.rejected)

    @property
    def rejected(self) -> bool:
        """Is it rejected that the circuit is minimal?"""
        return bool(self.superfluous)

    @property
    def speaks_for_circuit(self) -> bool:
        """Is the decision the one that a good circuit gets?"""
        return not self.rejected


# ------------------------------------------------------------- against random circuits


@checked
def sufficiency_test(
    model: PatchableModel,
    dataloader: PromptDataLoader,
    circuit: CircuitMasks,
    share: float = 0.9,
    n_random: int = 100,
    alpha: float = 0.05,
    seed: int = 0,
    metric: PruneMetric = LOGIT_DIFF_METRIC,
    ablation_type: AblationType = AblationType.RESAMPLE,
) -> HypothesisTest:
    """Does the circuit do what the model does, better than random circuits?

    statistic: the share of random circuits whose distance is larger; a tie counts
    against the circuit. p_value: that of a binomial test against `share`. seed: of the
    random circuits; the global generator is left alone.

    Raises ConfigError for a circuit without edges or with all of them, and for numbers
    out of range. Cost: a forward pass per random circuit and batch.
    """
    circuit = as_circuit(model, circuit)
    circuits = [
        circuit,
        *_random_alternatives(circuit, n_random, seed, share, alpha),
    ]
    distances = _distances(model, dataloader, circuits, metric, ablation_type)
    n_worse = int((distances[1:] > distances[0]).sum())
    return _beats_share("Sufficiency", n_worse, n_random, share, alpha)


@checked
def partial_necessity_test(
    model: PatchableModel,
    dataloader: PromptDataLoader,
    circuit: CircuitMasks,
    share: float = 0.9,
    n_random: int = 100,
    alpha: float = 0.05,
    seed: int = 0,
    metric: PruneMetric = LOGIT_DIFF_METRIC,
    ablation_type: AblationType = AblationType.RESAMPLE,
) -> HypothesisTest:
    """Does the model need the circuit, more than random circuits?

    statistic: the share of random circuits whose removal leaves a smaller distance; a
    tie counts against the circuit. Parameters, errors and cost: `sufficiency_test`.
    """
    circuit = as_circuit(model, circuit)
    circuits = [
        circuit,
        *_random_alternatives(circuit, n_random, seed, share, alpha),
    ]
    rests = [removed.complement() for removed in circuits]
    distances = _distances(model, dataloader, rests, metric, ablation_type)
    n_harmless = int((distances[1:] < distances[0]).sum())
    return _beats_share("Partial necessity", n_harmless, n_random, share, alpha)


def _beats_share(
    name: str, count: int, n_random: int, share: float, alpha: float
) -> HypothesisTest:
    return HypothesisTest(
        name=name,
        statistic=count / n_random,
        n=n_random,
        p_value=binomial_tail(count, n_random, share),
        alpha=alpha,
        rejection_is_good=True,
    )


def _distances(
    model: PatchableModel,
    dataloader: PromptDataLoader,
    circuits: list[Circuit],
    metric: PruneMetric,
    ablation_type: AblationType,
) -> Float[Tensor, "circuit"]:
    """The mean over prompts of |score of the circuit - score of the full model|."""
    vals = circuit_prompt_vals(
        model, dataloader, [all_edges(model), *circuits], metric, ablation_type
    )
    return (vals[1:] - vals[0]).abs().mean(1)


def _random_alternatives(
    circuit: Circuit,
    n_random: int,
    seed: int,
    share: float,
    alpha: float,
) -> list[Circuit]:
    """Random circuits of the same size, once all arguments are known to be right."""
    _check_shares(share=share, alpha=alpha)
    check_count("n_random", n_random)
    everywhere, n_edges = all_edges(circuit.model), circuit.n_edges
    if not 0 < n_edges < everywhere.n_edges:
        raise ConfigError(
            f"The circuit has {n_edges} of {everywhere.n_edges} edges: every circuit of that "
            "size is the same, so it cannot be compared with random ones."
        )
    generator = seeded_generator(seed)
    return [everywhere.sample(n_edges, generator) for _ in range(n_random)]


# ---------------------------------------------------------------- against the full model


@checked
def equivalence_test(
    model: PatchableModel,
    dataloader: PromptDataLoader,
    circuit: CircuitMasks,
    epsilon: float = 0.1,
    alpha: float = 0.05,
    metric: PruneMetric = LOGIT_DIFF_METRIC,
    ablation_type: AblationType = AblationType.RESAMPLE,
) -> HypothesisTest:
    """Is the circuit above the model as often as below it?

    statistic: |share of prompts on which the circuit scores higher - 1/2|, in [0, 1/2];
    a prompt with equal scores counts one half. See `equivalence_of_scores`.

    Raises GraphError for a circuit of another graph.
    """
    circuit = as_circuit(model, circuit)
    _check_equivalence(epsilon, alpha)
    model_scores, circuit_scores = circuit_prompt_vals(
        model, dataloader, [all_edges(model), circuit], metric, ablation_type
    )
    return equivalence_of_scores(circuit_scores, model_scores, epsilon, alpha)


@checked
def equivalence_of_scores(
    circuit_scores: Float[Tensor, "prompt"],
    model_scores: Float[Tensor, "prompt"],
    epsilon: float = 0.1,
    alpha: float = 0.05,
) -> HypothesisTest:
    """`equivalence_test` of scores that were measured already.

    The null hypothesis is |P(circuit > model) - 1/2| <= epsilon; p_value is the chance
    of a statistic at least as large if P = 1/2 + epsilon.

    Differs from the paper's code, whose statistic was |mean difference - 1/2|, and from
    the paper, where a tie was a prompt on which the circuit is below.
    Raises DataError for scores of different prompts, ConfigError for an epsilon or
    alpha out of range.
    """
    _check_pairs(circuit_scores, model_scores)
    _check_equivalence(epsilon, alpha)
    n = len(circuit_scores)
    n_above = float((circuit_scores > model_scores).sum())
    n_above += 0.5 * float((circuit_scores == model_scores).sum())
    excess = abs(n_above - n / 2)
    n_upper, n_lower = math.ceil(n / 2 + excess), math.floor(n / 2 - excess)
    p_value = binomial_tail(n_upper, n, 0.5 + epsilon)
    p_value += _lower_tail(n_lower, n, 0.5 + epsilon)
    return HypothesisTest(
        name="Equivalence",
        statistic=excess / n,
        n=n,
        p_value=min(1.0, p_value),
        alpha=alpha,
        rejection_is_good=False,
    )


@checked
def independence_test(
    model: PatchableModel,
    dataloader: PromptDataLoader,
    circuit: CircuitMasks,
    n_permutations: int = 1000,
    alpha: float = 0.05,
    seed: int = 0,
    metric: PruneMetric = LOGIT_DIFF_METRIC,
    ablation_type: AblationType = AblationType.RESAMPLE,
) -> HypothesisTest:
    """Is what the model does without the circuit independent of what it did with it?

    statistic: the HSIC of the complement's scores and the model's; 0 if they are
    independent, positive if not. See `independence_of_scores`.

    Raises GraphError for a circuit of another graph.
    """
    circuit = as_circuit(model, circuit)
    _check_shares(alpha=alpha)
    check_count("n_permutations", n_permutations)
    model_scores, rest_scores = circuit_prompt_vals(
        model, dataloader, [all_edges(model), circuit.complement()], metric, ablation_type
    )
    return independence_of_scores(rest_scores, model_scores, n_permutations, alpha, seed)


@checked
def independence_of_scores(
    rest_scores: Float[Tensor, "prompt"],
    model_scores: Float[Tensor, "prompt"],
    n_permutations: int = 1000,
    alpha: float = 0.05,
    seed: int = 0,
) -> HypothesisTest:
    """`independence_test` of scores that were measured already.

    p_value: the share of permutations of the prompts, the identity among them, whose
    HSIC is at least that observed. Raises DataError for scores of different prompts.
    """
    _check_pairs(rest_scores, model_scores)
    _check_shares(alpha=alpha)
    check_count("n_permutations", n_permutations)
    kernel = _centred(_gaussian_kernel(rest_scores))
    other = _gaussian_kernel(model_scores)
    n = len(rest_scores)
    observed = (kernel * other).sum() / n**2
    generator = seeded_generator(seed)
    n_reached = 0
    for _ in range(n_permutations):
        order = t.randperm(n, generator=generator).to(other.device)
        permuted = (kernel * other[order][:, order]).sum() / n**2
        # Sums in another order differ by rounding, which must not break a tie.
        n_reached += bool(permuted >= observed - 1e-12)
    return HypothesisTest(
        name="Independence",
        statistic=float(observed),
        n=n,
        p_value=(1 + n_reached) / (1 + n_permutations),
        alpha=alpha,
        rejection_is_good=False,
    )


def _gaussian_kernel(values: Float[Tensor, "prompt"]) -> Float[Tensor, "prompt prompt"]:
    """exp(-distance^2 / (2 width^2)), the width being the median distance."""
    values = values.double()
    distances = (values[:, None] - values[None, :]).abs()
    positive = distances[distances > 0]
    if not positive.numel():
        return t.ones_like(distances)
    return t.exp(-((distances / positive.median()) ** 2) / 2)


def _centred(kernel: Float[Tensor, "prompt prompt"]) -> Float[Tensor, "prompt prompt"]:
    rows, columns = kernel.mean(0, keepdim=True), kernel.mean(1, keepdim=True)
    return kernel - rows - columns + kernel.mean()


# --------------------------------------------------------------------------- minimality


@checked
def minimality_test(
    model: PatchableModel,
    dataloader: PromptDataLoader,
    circuit: CircuitMasks,
    share: float = 0.9,
    n_random: int = 100,
    alpha: float = 0.05,
    seed: int = 0,
    n_added: int | None = None,
    metric: PruneMetric = LOGIT_DIFF_METRIC,
    ablation_type: AblationType = AblationType.RESAMPLE,
) -> MinimalityTest:
    """Does each edge of the circuit matter more than edges that were added at random?

    The effect of an edge of the circuit is compared with `n_random` effects of added
    edges: each time, `n_added` random edges from outside are added to the circuit (as
    many as it has, or all there are, if None), and one of these is removed again. The
    null hypothesis, that the edge's effect is larger than at least a `share` of them,
    is rejected if it too seldom is.

    Differs from the paper, which adds a random path from input to output.
    Raises ConfigError for a circuit without edges or with all of them, and for numbers
    out of range. Cost: a forward pass per edge, and two per random effect, and batch.
    """
    circuit = as_circuit(model, circuit)
    edges = circuit.edges
    _check_shares(share=share, alpha=alpha)
    check_count("n_random", n_random)
    n_outside = model.n_edges - len(edges)
    if not edges or not n_outside:
        raise ConfigError(
            f"The circuit has {len(edges)} of {model.n_edges} edges; it needs at least "
            "one, and one must be left to be added."
        )
    n_added = min(len(edges), n_outside) if n_added is None else n_added
    check_count("n_added", n_added, at_most=n_outside)
    effects = removal_effects(model, dataloader, circuit, metric, ablation_type)
    pairs = _inflated_pairs(circuit, n_added, n_random, seed)
    vals = circuit_prompt_vals(
        model, dataloader, [c for pair in pairs for c in pair], metric, ablation_type
    ).mean(1)
    random_effects = (vals[0::2] - vals[1::2]).abs()
    level = alpha / len(edges)
    return MinimalityTest(
        edges=tuple(
            EdgeMinimalityTest(
                edge=edge_effect.edge,
                effect=abs(edge_effect.effect),
                test=edge_minimality(
                    abs(edge_effect.effect), random_effects, share, level
                ),
            )
            for edge_effect in effects
        ),
        alpha=alpha,
    )


@checked
def edge_minimality(
    effect: float, random_effects: Float[Tensor, "random"], share: float, alpha: float
) -> HypothesisTest:
    """The binomial test of one edge; a tie of effects counts against the edge."""
    n_smaller = int((random_effects < effect).sum())
    n = len(random_effects)
    return HypothesisTest(
        name="Minimality",
        statistic=n_smaller / n,
        n=n,
        p_value=_lower_tail(n_smaller, n, share),
        alpha=alpha,
        rejection_is_good=False,
    )


def _inflated_pairs(
    circuit: Circuit, n_added: int, n_pairs: int, seed: int
) -> list[tuple[Circuit, Circuit]]:
    """(the circuit and random edges, the same without one of these edges)"""
    generator = seeded_generator(seed)
    outside = circuit.complement()
    pairs = []
    for _ in range(n_pairs):
        added = outside.sample(n_added, generator)
        inflated = circuit.union(added)
        pairs.append((inflated, inflated.without(added.sample(1, generator))))
    return pairs


# ------------------------------------------------------------------------------- helpers


@checked
def binomial_tail(count: int, n: int, p: float) -> float:
    """P(X >= count) of a binomial X: `n` trials, each a success with probability `p`.

    Exact but for rounding. Raises ConfigError for a probability outside of [0, 1].
    """
    check_number("p", p, 0, 1)
    if count <= 0:
        return 1.0
    if p in (0, 1):
        return float(p == 1 and count <= n)
    log_p, log_q = math.log(p), math.log1p(-p)
    logs = (
        math.lgamma(n + 1)
        - math.lgamma(k + 1)
        - math.lgamma(n - k + 1)
        + k * log_p
        + (n - k) * log_q
        for k in range(count, n + 1)
    )
    return min(1.0, math.fsum(math.exp(log) for log in logs))


def _lower_tail(count: int, n: int, p: float) -> float:
    """P(X <= count): as many failures or more. Without the cancellation of 1 - tail."""
    return binomial_tail(n - count, n, 1 - p)


def _check_pairs(scores: Tensor, other_scores: Tensor) -> None:
    if scores.ndim != 1 or scores.shape != other_scores.shape or not len(scores):
        raise DataError(
            f"The scores have the shapes {tuple(scores.shape)} and "
            f"{tuple(other_scores.shape)}; expected one number for each of the same "
            "prompts, and at least one prompt."
        )


def _check_equivalence(epsilon: float, alpha: float) -> None:
    _check_shares(alpha=alpha)
    check_number("epsilon", epsilon, low=0, below=0.5)


def _check_shares(**shares: float) -> None:
    for name, value in shares.items():
        check_number(name, value, above=0, below=1)
