"""How many times as likely as the wrong answers the circuit finds the correct ones.

A metric of your own: `python examples/metric.py` prints how surely circuits of growing size prefer
the right name, on average over the prompts. What it needs is in CONTRIBUTING.md.
"""

from __future__ import annotations

import math

from jaxtyping import Float
from torch import Tensor

import auto_circuit as ac
from auto_circuit.data import PromptPairBatch
from auto_circuit.metrics.prune_metrics.full_model_outs import (
    FullModelOuts,
    apply_prob_func,
)
from auto_circuit.metrics.prune_metrics.prune_metric import PruneMetric
from auto_circuit.utils.tensor_ops import batch_answer_diffs


def prompt_answer_ratios(
    out: Float[Tensor, "batch *pos vocab"], batch: PromptPairBatch, full: FullModelOuts
) -> Float[Tensor, "batch"]:
    """Each prompt's ratio of probabilities (geometric means): above 0, 1 without preference."""
    return batch_answer_diffs(apply_prob_func(out, "log_softmax"), batch).exp()


ANSWER_RATIO_METRIC = PruneMetric(
    key="Answer Ratio",
    name="Correct to Wrong Answers",
    prompt_func=prompt_answer_ratios,
    bounds=(0.0, math.inf),
    needs_wrong_answers=True,
    question="How many times as likely as the wrong answers are the correct ones?",
)


def main() -> None:
    """Measure circuits that edge attribution patching has found."""
    task = ac.find_task("Pocket IOI")
    scores = ac.find_prune_algo("EAP").func(task.model, task.train_loader, None)
    outs = ac.run_circuits(
        *(task.model, task.test_loader, [0, 50, 200, task.model.n_edges], scores),
        ac.PatchType.TREE_PATCH,
    )
    for n_edges, ratio in ANSWER_RATIO_METRIC.measure(task.model, task.test_loader, outs):
        print(f"{n_edges} edges: the right name is {ratio:,.0f} times as likely")


if __name__ == "__main__":
    main()
