"""The gradient of each mask, halfway between the clean and the corrupt prompt.

An algorithm of your own, next to one that is there: `python examples/algorithm.py` prints how much
of a task, in %, the circuits of both do. What it needs is in CONTRIBUTING.md.
"""

from __future__ import annotations

from collections.abc import Collection

import auto_circuit as ac
from auto_circuit.data import PromptDataLoader, check_wrong_answers
from auto_circuit.prune_algos.prune_algo import AlgoNotes, PruneAlgo
from auto_circuit.types import AblationType, Edge, PruneScores
from auto_circuit.utils.ablation_activations import iter_src_ablations
from auto_circuit.utils.graph_utils import patch_mode, set_all_masks, train_mask_mode
from auto_circuit.utils.patchable_model import PatchableModel
from auto_circuit.utils.tensor_ops import batch_avg_answer_diff
from auto_circuit.utils.torch_state import in_own_state


@in_own_state(grad=True)
def halfway_gradient_prune_scores(
    model: PatchableModel,
    dataloader: PromptDataLoader,
    official_edges: Collection[Edge] | None,
) -> PruneScores:
    """How fast the answers' lead falls as an edge is patched."""
    check_wrong_answers(dataloader, "the halfway gradient")
    ablations = iter_src_ablations(model, dataloader, AblationType.RESAMPLE, "corrupt")
    with train_mask_mode(model) as masks:
        set_all_masks(model, 0.5)
        for batch, patch_src_outs in ablations:
            tokens, kwargs = batch.model_input("clean")
            with patch_mode(model, patch_src_outs):
                lead = batch_avg_answer_diff(model.sliced(tokens, **kwargs), batch)
                (-lead).backward()
        return {name: mask.grad for name, mask in masks.items() if mask.grad is not None}


HALFWAY_GRADIENT_PRUNE_ALGO = PruneAlgo(
    key="Halfway Gradient",
    name="Halfway Gradient",
    func=halfway_gradient_prune_scores,
    needs_wrong_answers=True,
    notes=AlgoNotes(
        idea="The mask's gradient halfway between clean and corrupt",
        paper="none: an example",
        cost="F + (F + B)",
        use="To see how an algorithm is added.",
    ),
)


def main() -> None:
    """Measure circuits of both algorithms."""
    task = ac.find_task("Pocket IOI")
    for algo in (HALFWAY_GRADIENT_PRUNE_ALGO, ac.find_prune_algo("EAP")):
        scores = algo.func(task.model, task.train_loader, None)
        sizes = [10, 50, 200, task.model.n_edges]
        outs = ac.run_circuits(
            task.model, task.test_loader, sizes, scores, ac.PatchType.TREE_PATCH
        )
        for n_edges, percent in ac.find_metric("Logit Diff Percent").measure(
            task.model, task.test_loader, outs
        ):
            print(f"{algo.short_name}: {n_edges} edges do {percent:.1f} % of the task")


if __name__ == "__main__":
    main()
