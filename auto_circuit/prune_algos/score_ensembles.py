"""Better scores from scores: ensembles of algorithms, and what is sure over prompts.

An ensemble averages the scores of several algorithms, as ranks or in a common unit. The
bootstrap tells how much a score depends on the sample of prompts. No model is run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch as t
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from auto_circuit.checks import check_count, check_number, checked, seeded_generator
from auto_circuit.errors import ConfigError, DataError, GraphError
from auto_circuit.ranking import desc_prune_scores, flat_prune_scores, score_tensors
from auto_circuit.types import PruneScores

MAX_BOOTSTRAP_VALUES = 2**22
"""How many means of resampled prompts are in memory at once."""

# -------------------------------------------------------------------------- ensembles


@checked
def mean_rank_prune_scores(ensemble: Sequence[PruneScores]) -> PruneScores:
    """Each edge's rank by |score|, the mean over the ensemble.

    From 1, the least important edge, to the number of edges, the most important one.
    Edges that tie get the mean of their ranks. Signs are lost. Units, and how fast the
    scores fall off, do not matter; infinite scores are allowed.

    Raises ConfigError for an empty ensemble, GraphError for scores of different graphs
    and for NaN scores.
    """
    ranks = [_ranks(scores.abs()) for scores in _flat_ensemble(ensemble)]
    return _like(ensemble[0], t.stack(ranks).mean(0))


@checked
def mean_normalised_prune_scores(
    ensemble: Sequence[PruneScores], by_magnitude: bool = False
) -> PruneScores:
    """Each edge's score in units of the algorithm's mean |score|, averaged.

    The mean |score| of each member is 1 before the average: an edge at 5 matters five
    times as much as the mean edge. Signs are kept, so that members that disagree cancel.

    by_magnitude: average |scores| instead; for members whose scores have no sign.

    Raises ConfigError for an empty ensemble, GraphError for scores of different graphs,
    for NaN and infinite scores, and for a member whose scores are all 0.
    """
    normalised = []
    for idx, scores in enumerate(_flat_ensemble(ensemble)):
        unit = scores.abs().mean()
        if not 0 < unit.item() < t.inf:
            raise GraphError(
                f"The scores of member {idx} of the ensemble have a mean magnitude of "
                f"{unit.item()}, by which they cannot be divided. Leave the member out, "
                "or use `mean_rank_prune_scores`, which takes infinite scores too (those of "
                "edges that ACDC never takes out)."
            )
        normalised.append((scores.abs() if by_magnitude else scores) / unit)
    return _like(ensemble[0], t.stack(normalised).mean(0))


def _flat_ensemble(ensemble: Sequence[PruneScores]) -> list[Float[Tensor, "edges"]]:
    """The members' scores in one dimension, modules in the order of the first member."""
    if not ensemble:
        raise ConfigError("The ensemble is empty; give the scores of some algorithms.")
    ensemble = [score_tensors(member) for member in ensemble]
    shapes = {name: scores.shape for name, scores in ensemble[0].items()}
    for idx, member in enumerate(ensemble):
        if {name: scores.shape for name, scores in member.items()} != shapes:
            raise GraphError(
                f"The scores of members 0 and {idx} of the ensemble differ in modules or "
                "shapes. Compute them all on the same graph (`factorized`, "
                "`separate_qkv`, `seq_len`)."
            )
        desc_prune_scores(member)  # Raises for NaN.
    return [
        flat_prune_scores({name: member[name] for name in shapes}).double()
        for member in ensemble
    ]


def _ranks(magnitudes: Float[Tensor, "edges"]) -> Float[Tensor, "edges"]:
    """1 for the smallest; the mean of their ranks for those that tie."""
    _, group_of, group_sizes = t.unique(
        magnitudes, return_inverse=True, return_counts=True
    )
    last_ranks = group_sizes.cumsum(0).double()
    return (last_ranks - (group_sizes - 1) / 2)[group_of]


def _like(prune_scores: PruneScores, flat: Float[Tensor, "edges"]) -> PruneScores:
    prune_scores = score_tensors(prune_scores)
    parts = flat.float().split([scores.numel() for scores in prune_scores.values()])
    return {
        name: part.view(scores.shape)
        for (name, scores), part in zip(prune_scores.items(), parts, strict=True)
    }


# -------------------------------------------------------------------------- bootstrap


@dataclass(frozen=True, eq=False)
class BootstrapScores:
    """How sure each edge's score is, given the sample of prompts.

    All scores are [seq?, head?, src] per module, in the unit of the prompts' scores.
    mean: the mean over the prompts.
    lower, upper: the percentile interval of the mean, edge by edge: among many edges
        without effect, a share of 1 - confidence still has an interval without 0.
    sign_consistency: the share of resampled means whose sign is the mean's, in [0, 1];
        1 is sure, about 0.5 a coin flip; 0 where the mean is 0.
    """

    mean: PruneScores
    lower: PruneScores
    upper: PruneScores
    sign_consistency: PruneScores
    confidence: float
    n_samples: int
    n_prompts: int

    @property
    def excludes_zero(self) -> dict[str, Bool[Tensor, "*_seq_head _src"]]:
        """True for the edges whose interval lies on one side of 0."""
        return {
            name: (lower > 0) | (self.upper[name] < 0)
            for name, lower in self.lower.items()
        }


@checked
def bootstrap_prompt_scores(
    prompt_scores: Mapping[str, Shaped[Tensor, "_prompt *_edge"]],
    n_samples: int = 1000,
    confidence: int | float = 0.95,
    seed: int = 0,
) -> BootstrapScores:
    """Resample the prompts: how much do the mean scores depend on them?

    prompt_scores: {module: [prompt, seq?, head?, src]}, such as those of
        `mask_gradient_prompt_scores`.
    n_samples: how many samples (as many prompts, drawn with replacement; the same ones
        for all edges). confidence: of the interval, between 0 and 1.

    Raises ConfigError for options that make no sense, DataError for fewer than two
    prompts, GraphError for scores that are not finite or differ in their prompts.

    Source: the percentile bootstrap (Efron 1979), used on edges by Nikankin et al. 2025
    (arXiv 2510.25786).
    """
    check_count("n_samples", n_samples, at_least=2)
    check_number("confidence", confidence, above=0, below=1)
    prompt_scores = score_tensors(prompt_scores)
    n_prompts = _n_prompts(prompt_scores)
    shares = _resampled_shares(n_prompts, n_samples, seed)
    margin = (1 - confidence) / 2
    summaries = {
        name: _summary(scores.detach(), shares, margin)
        for name, scores in prompt_scores.items()
    }
    mean, lower, upper, consistency = (
        {name: summary[idx] for name, summary in summaries.items()} for idx in range(4)
    )
    return BootstrapScores(
        mean=mean,
        lower=lower,
        upper=upper,
        sign_consistency=consistency,
        confidence=float(confidence),
        n_samples=n_samples,
        n_prompts=n_prompts,
    )


@checked
def confident_prune_scores(bootstrap: BootstrapScores) -> PruneScores:
    """The mean scores of the edges whose interval excludes 0; 0 for all others.

    Count the former with `bootstrap.excludes_zero`: a circuit of more edges than these
    has all edges, because those at 0 tie.
    """
    return {
        name: bootstrap.mean[name] * is_sure
        for name, is_sure in bootstrap.excludes_zero.items()
    }


def _resampled_shares(
    n_prompts: int, n_samples: int, seed: int
) -> Float[Tensor, "sample prompt"]:
    """The share of each prompt in each sample."""
    generator = seeded_generator(seed)
    drawn = t.randint(n_prompts, (n_samples, n_prompts), generator=generator)
    counts = t.zeros(n_samples, n_prompts)
    return counts.scatter_add_(1, drawn, t.ones_like(counts)) / n_prompts


def _summary(
    scores: Tensor, shares: Float[Tensor, "sample prompt"], margin: float
) -> Float[Tensor, "4 *edges"]:
    """Mean, lower and upper end, and sign consistency of a module's edges."""
    rows = scores.flatten(1).to(t.promote_types(scores.dtype, t.float32))
    shares = shares.to(rows)
    n_columns = max(1, MAX_BOOTSTRAP_VALUES // len(shares))
    ends = rows.new_tensor([margin, 1 - margin])
    parts = []
    for columns in rows.split(n_columns, dim=1):
        mean, means = columns.mean(0), shares @ columns
        lower, upper = means.quantile(ends, dim=0)
        same_sign = means.sign() * mean.sign() > 0
        parts.append(t.stack([mean, lower, upper, same_sign.to(rows).mean(0)]))
    return t.cat(parts, dim=1).view(4, *scores.shape[1:])


def _n_prompts(prompt_scores: Mapping[str, Tensor]) -> int:
    if not prompt_scores:
        raise GraphError("The prompts' scores are empty: they name no module.")
    lengths = {
        len(scores) if scores.ndim > 1 else None for scores in prompt_scores.values()
    }
    n_prompts = lengths.pop()
    if lengths or n_prompts is None:
        raise GraphError(
            "The scores of every module need the same first dimension, the prompts; got "
            f"shapes {[tuple(scores.shape) for scores in prompt_scores.values()]}. "
            "`mask_gradient_prompt_scores` makes such scores."
        )
    if n_prompts < 2:
        raise DataError(
            f"There are scores of {n_prompts} prompt(s); at least 2 are needed to tell "
            "how much scores depend on the prompts."
        )
    for module_name, scores in prompt_scores.items():
        if not scores.isfinite().all():
            raise GraphError(
                f"Scores of {module_name!r} are not finite, so they have no mean. Look "
                "for an infinite loss on one of the prompts."
            )
    return n_prompts
