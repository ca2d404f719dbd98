"""What a prune algorithm is."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from auto_circuit.checks import checked
from auto_circuit.data import PromptDataLoader, check_wrong_answers
from auto_circuit.errors import ConfigError
from auto_circuit.fingerprints import FOR_READERS
from auto_circuit.prompt_files import Prompt
from auto_circuit.prune_algos.algo_config import AlgoConfig, config_of
from auto_circuit.types import AlgoKey, PruneScores


@dataclass(frozen=True)
class AlgoNotes:
    """What to know of an algorithm before running it, as plain text; it changes no number.

    idea: what an edge's score is, in a line.
    paper: authors, year and number in the arXiv, or why there is none.
    cost: passes of the model for one batch of prompts: F forward, B backward.
    use: when it is the one to take, and when it is not.
    """

    idea: str = ""
    paper: str = ""
    cost: str = ""
    use: str = ""


@checked
@dataclass(frozen=True)
class PruneAlgo:
    """A way to score edges.

    key: its name in results; two algorithms are equal if their keys are.
    name, short_name: for figures and tables.
    func: (model, dataloader, official_edges) -> PruneScores. `model` is a
        PatchableModel; it must be as it was when the function returns.
    needs_true_edges: does it work only on tasks with true edges?
    needs_wrong_answers: does it compare answers with wrong ones?
    scores_crossings: does it score edges through attention too, in graphs that have them?
    notes: for those who choose between algorithms; the members of `PRUNE_ALGOS` have all.
    """

    key: AlgoKey
    name: str = field(compare=False)
    func: Callable[..., PruneScores] = field(compare=False)
    _short_name: str | None = field(default=None, compare=False)
    needs_true_edges: bool = field(default=False, compare=False)
    needs_wrong_answers: bool = field(default=False, compare=False)
    scores_crossings: bool = field(default=True, compare=False, kw_only=True)
    notes: AlgoNotes = field(
        default=AlgoNotes(), compare=False, kw_only=True, metadata=FOR_READERS
    )

    @property
    def short_name(self) -> str:
        """The short name, or the name if there is none."""
        return self._short_name or self.name

    @property
    def config(self) -> AlgoConfig | None:
        """The options that `func` runs with; None for a function that takes no config."""
        return config_of(self.func)

    def description(self) -> dict[str, Any]:
        """Plain data: the key, and the description of the config (or None)."""
        config = self.config
        return {
            "key": self.key,
            "config": None if config is None else config.description(),
        }

    def check_prompts(self, dataloader: PromptDataLoader | Sequence[Prompt]) -> None:
        """Raise DataError if it compares with wrong answers that some prompt has not."""
        if self.needs_wrong_answers:
            check_wrong_answers(dataloader, f"the algorithm {self.short_name!r}")

    def with_seed(self, seed: int) -> PruneAlgo:
        """The same algorithm, drawing all that it draws at random from this seed.

        An algorithm draws if its function has a parameter `seed`, or if it starts warm from
        one that draws (`warm_start`). One that draws nothing is returned as it is.
        """
        defaults = _defaults(self.func)
        options: dict[str, Any] = {"seed": seed} if "seed" in defaults else {}
        warm_start = defaults.get("warm_start")
        if isinstance(warm_start, PruneAlgo):
            options["warm_start"] = warm_start.with_seed(seed)
        return replace(self, func=partial(self.func, **options)) if options else self


MSE_USE = "Models whose output is a number, such as compiled ones."
"""When to use the variants that lower the squared error to the answers."""


@checked
def with_squared_error(algo: PruneAlgo) -> PruneAlgo:
    """The algorithm, made to lower the squared error to the answers.

    For models whose output is a number (see `answer_loss`). Raises ConfigError for an
    algorithm that has neither an `answer_function` nor a `faithfulness_target`.
    """
    defaults = _defaults(algo.func)
    options: dict[str, Any] = {}
    if "answer_function" in defaults:
        options = {"grad_function": "logit", "answer_function": "mse"}
    elif "faithfulness_target" in defaults:
        options = {"faithfulness_target": "mse"}
    else:
        raise ConfigError(
            f"The algorithm {algo.key!r} has no `answer_function` and no "
            "`faithfulness_target` that could be the squared error."
        )
    warm_start = defaults.get("warm_start")
    if isinstance(warm_start, PruneAlgo):
        options["warm_start"] = with_squared_error(warm_start)
    return PruneAlgo(
        key=f"MSE {algo.key}",
        name=f"MSE {algo.name}",
        func=partial(algo.func, **options),
        _short_name=f"{algo.short_name} (MSE)",
        needs_true_edges=algo.needs_true_edges,
        notes=replace(
            algo.notes, idea=f"{algo.short_name} of the squared error", use=MSE_USE
        ),
    )


def _defaults(func: Callable[..., PruneScores]) -> dict[str, Any]:
    """Every parameter's name and default."""
    parameters = inspect.signature(func).parameters
    return {name: parameter.default for name, parameter in parameters.items()}
