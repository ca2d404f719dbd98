"""A prompt file as a task.

A task of your own: `python examples/task.py` prints its prompts and the strongest edges of its
circuit. What it needs is in CONTRIBUTING.md; the prompts are in examples/store_prompts.json.
"""

from __future__ import annotations

from pathlib import Path

import auto_circuit as ac
from auto_circuit.tasks import POCKET_MODEL, Task

PROMPTS = Path(__file__).with_name("store_prompts.json")

STORE_TASK = Task("Store", "Store", 4, 1, False, POCKET_MODEL, PROMPTS)


def main() -> None:
    """Find a circuit of the task."""
    train, test = STORE_TASK.read_prompts()
    print(f"{len(train)} prompts to find a circuit, {len(test)} to test it, such as")
    print(f"  {test[0].clean}{test[0].answers[0]}")
    print(f"  {test[0].corrupt}{test[0].wrong_answers[0]}")
    scores = ac.find_prune_algo("EAP").func(
        STORE_TASK.model, STORE_TASK.train_loader, None
    )
    print("The strongest edges:")
    for edge in sorted(STORE_TASK.model.edges, key=lambda e: -abs(e.prune_score(scores)))[
        :5
    ]:
        print(f"  {edge.name}: {edge.prune_score(scores):.2f}")


if __name__ == "__main__":
    main()
