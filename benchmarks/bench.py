"""What patching costs, as ratios to the plain Hugging Face model in the same process.

GPT-2-small shape with random weights, 8 prompts of 15 tokens. Three columns side by side:

- *Settled*: a later pass in one `patch_mode`, as in a training.
- *First*: to enter a `patch_mode`, one pass, and to leave it, as in a notebook. What goes
  through batches (an algorithm, `run_circuits`) enters one anew for each, so all of its time
  stands there.
- *Plain*: the same forward and backward passes of the unwrapped model, which computes the
  same outputs: the logits of the last position, unless the row says otherwise.

All three take turns, so that a noisy machine slows them alike; a ratio is that of the
shortest times. Memory is the peak above the loaded model, each in a process of its own. A
row per algorithm compares it with the passes that its formula needs: `F` forward passes,
`Bk` backward passes. The main rows again for small models of other shapes, and what a
`memory_limit` of a quarter makes of their memory and time. `make bench` runs this; with
`--quick` every row but those of single algorithms, from fewer rounds, in 5 minutes.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import torch as t
import tyro
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformer_lens.model_bridge.sources._bridge_builder import (
    build_bridge_from_module,
)
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
)

from auto_circuit.data import PromptDataLoader, PromptDataset
from auto_circuit.memory import PeakMemory
from auto_circuit.prune import run_circuits, set_masks
from auto_circuit.prune_algos.ACDC import removed_edges
from auto_circuit.prune_algos.acdc_after_eap import acdc_after_eap_prune_scores
from auto_circuit.prune_algos.activation_magnitude import (
    activation_magnitude_prune_scores,
)
from auto_circuit.prune_algos.circuit_probing import circuit_probing_prune_scores
from auto_circuit.prune_algos.edge_attribution_patching import (
    edge_attribution_patching_prune_scores,
)
from auto_circuit.prune_algos.edge_pruning import edge_pruning_prune_scores
from auto_circuit.prune_algos.exact_edge_patching import edge_effects
from auto_circuit.prune_algos.head_importance import head_importance_prune_scores
from auto_circuit.prune_algos.integrated_gradients import (
    activation_integrated_gradients_prune_scores,
    clean_corrupt_prune_scores,
    input_integrated_gradients_prune_scores,
)
from auto_circuit.prune_algos.mask_gradient import mask_gradient_prune_scores
from auto_circuit.prune_algos.matryoshka import matryoshka_prune_scores
from auto_circuit.prune_algos.prompt_scores import mask_gradient_prompt_scores
from auto_circuit.prune_algos.random_edges import random_prune_scores
from auto_circuit.prune_algos.subnetwork_probing import subnetwork_probing_prune_scores
from auto_circuit.ranking import circuit_mask
from auto_circuit.types import Edge, PatchType
from auto_circuit.utils.ablation_activations import src_ablations
from auto_circuit.utils.backward_modifiers import gim_backward, relp_backward
from auto_circuit.utils.graph_utils import (
    patch_mode,
    patchable_model,
    set_all_masks,
    train_mask_mode,
)
from auto_circuit.utils.patchable_model import PatchableModel

Run = Callable[[], object]
ONE_PERCENT, N_SIZES, N_POINTS, N_STEPS, N_EDGES = 0.01, 5, 5, 5, 60
N_WARM_UPS, N_SETTLED = 2, 2
"""Passes in a context before it is settled, and those that are timed then."""
QUICK_ROUNDS = 2
"""So many rounds at most with `--quick`."""
Row = dict[str, str | float | None]
SMALL: dict[str, Any] = {
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "hidden_size": 512,
    "vocab_size": 50257,
    "max_position_embeddings": 512,
}


def _mixtral() -> PreTrainedModel:
    sizes: dict[str, Any] = SMALL | {"intermediate_size": 1024}
    config = MixtralConfig(**sizes, num_local_experts=4, sliding_window=None)
    config._experts_implementation = "eager"
    return MixtralForCausalLM(config)


MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "GPT-2 small": lambda: GPT2LMHeadModel(GPT2Config()),
    "Llama-shaped": lambda: LlamaForCausalLM(
        LlamaConfig(**SMALL, intermediate_size=1408)
    ),
    "Gemma-2-shaped": lambda: Gemma2ForCausalLM(
        Gemma2Config(**SMALL, intermediate_size=1408, head_dim=64)
    ),
    "MoE": _mixtral,
}
"""Shape -> a model of random weights."""
BUDGETS = {
    "dense patched forward": 1.6,
    "1 % circuit, forward": 1.35,
    "mask-training step": 1.9,
    "EAP scores": 1.35,
}
"""The rows of small models, and what the design allows them."""
COLUMNS = {
    "Settled": ("settled_seconds", ".3f"),
    "First": ("first_seconds", ".3f"),
    "Plain": ("plain_seconds", ".3f"),
    "Settled / plain": ("settled_ratio", ".2f"),
    "First / plain": ("first_ratio", ".2f"),
    "Aim": ("aim", ".2f"),
    "Peak MB": ("peak_mb", ".0f"),
}
"""Title -> what it shows of a row, and how."""


@dataclass(frozen=True)
class BenchConfig:
    """What is measured."""

    rounds: int = 10
    """How often everything is timed; the shortest times count."""
    batch_size: int = 8
    seq_len: int = 15
    n_threads: int = 2
    device: str = "cpu"
    """Where all models are: "cpu" or "cuda"."""
    clock: Literal["wall", "cpu"] = "wall"
    """`cpu`: the time of this process alone, on a machine that others use; then with one
    thread, since several that wait for each other take time as well."""
    quick: bool = False
    """Leave out the rows of single algorithms; fewer rounds, memory of fewer rows."""
    out: Path = Path("results/bench.json")
    """Where the figures are written."""
    memory_of: str | None = None
    """Print the peak memory of this case in MB, and nothing else (for `bench` itself)."""


@dataclass(frozen=True)
class Case:
    """A measurement, its plain counterpart, and the ratio that the design aims at.

    first, settled: see above; a calculation as a whole has no settled pass.
    """

    name: str
    first: Run
    plain: Run
    aim: float | None = None
    settled: Run | None = None
    one_in: int = 1
    """Slow cases are measured in one of so many rounds only."""


class Bench:
    """The model, the prompts, and the cases."""

    def __init__(self, config: BenchConfig, model: str = "GPT-2 small") -> None:
        t.set_num_threads(config.n_threads)
        t.manual_seed(0)
        self.config, self.device = config, t.device(config.device)
        # Two models: a bridge takes the one that it is built from to pieces.
        with self.device:
            self.hf_model, wrapped = MODELS[model](), MODELS[model]()
        self.hf_model.eval().requires_grad_(False)
        bridge = build_bridge_from_module(
            wrapped, type(wrapped).__name__, hf_config=wrapped.config
        )
        self.model: PatchableModel = patchable_model(
            bridge.eval().requires_grad_(False), True, "last_seq", separate_qkv=True
        )
        shape = (config.batch_size, config.seq_len)
        self.clean, self.corrupt = (
            t.randint(0, 50257, shape).to(self.device) for _ in range(2)
        )
        answers, wrong = (
            [t.tensor([i], device=self.device)] * config.batch_size for i in (1, 2)
        )
        dataset = PromptDataset(self.clean, self.corrupt, answers, wrong)
        self.loader = PromptDataLoader(dataset, None, 0, batch_size=config.batch_size)

    def clock(self) -> float:
        """Seconds, when all work is done that was begun."""
        if self.device.type == "cuda":
            t.cuda.synchronize()
        is_cpu = self.config.clock == "cpu"
        return time.process_time() if is_cpu else time.perf_counter()

    @cached_property
    def patch(self) -> Tensor:
        """What is patched in."""
        return src_ablations(self.model, self.corrupt)

    def seconds(self, run: Run) -> float:
        """The seconds that the run returns, or else the seconds that it takes."""
        start = self.clock()
        seconds = run()
        return seconds if isinstance(seconds, float) else self.clock() - start

    # --------------------------------------------------------------- the plain model

    def forward(self, logits_to_keep: int = 1) -> None:
        """With the logits of the last so many positions; 0 means all."""
        with t.no_grad():
            self.hf_model(self.clean, logits_to_keep=logits_to_keep)

    def forward_backward(self) -> None:
        """The gradient flows down to the embeddings, as it does to the first masks."""
        embedded = self.hf_model.get_input_embeddings()(self.clean).requires_grad_()
        output = self.hf_model(inputs_embeds=embedded, logits_to_keep=1)
        _logit_diff(output.logits[:, -1]).backward()

    def passes(self, n_forward: int, n_forward_backward: int = 0) -> Run:
        """So many forward passes, and so many with a backward pass."""

        def run() -> None:
            for _ in range(n_forward):
                self.forward()
            for _ in range(n_forward_backward):
                self.forward_backward()

        return run

    def many_passes(self, n_forward_backward: int, n_timed: int = 20) -> Run:
        """Seconds of so many passes, as many times those of a few."""
        few = self.passes(0, n_timed)
        return lambda: self.seconds(few) * n_forward_backward / n_timed

    # --------------------------------------------------------------------- the cases

    def in_context(
        self,
        name: str,
        context: Callable[[], AbstractContextManager[object]],
        one_pass: Callable[[], object],
        plain: Run,
        aim: float | None = None,
    ) -> Case:
        """A pass under patches, first and settled."""

        def first() -> None:
            with context():
                one_pass()

        def settled() -> float:
            with context():
                for _ in range(N_WARM_UPS):
                    one_pass()
                return min(
                    self.seconds(lambda: one_pass() and None) for _ in range(N_SETTLED)
                )

        return Case(name, first, plain, aim, settled)

    def sliced(self) -> None:
        with t.no_grad():
            self.model.sliced(self.clean)

    def all_logits(self) -> None:
        with t.no_grad():
            self.model(self.clean)

    def training_step(self) -> None:
        _logit_diff(self.model.sliced(self.clean)).backward()

    def open_sites(self) -> AbstractContextManager[None]:
        return self.model.adapter.open_sites(self.model.wrapped_model, True)

    def patched(self, masks: dict[str, Tensor]) -> AbstractContextManager[None]:
        set_masks(self.model, masks)
        return patch_mode(self.model, self.patch)

    @contextmanager
    def training(self) -> Iterator[None]:
        set_all_masks(self.model, 0.5)
        with train_mask_mode(self.model), patch_mode(self.model, self.patch):
            yield

    def eap(self) -> None:
        edge_attribution_patching_prune_scores(self.model, self.loader, None)

    def modified(self, modifier: Callable[[PatchableModel], Any]) -> Run:
        def run() -> None:
            with modifier(self.model):
                self.eap()

        return run

    def circuits(self) -> None:
        scores = random_prune_scores(self.model, None, None, seed=0)
        sizes = [round(self.model.n_edges * 0.01 * 3**i) for i in range(N_SIZES)]
        run_circuits(self.model, self.loader, sizes, scores, PatchType.TREE_PATCH)

    def cases(self) -> list[Case]:
        scores = random_prune_scores(self.model, None, None, seed=0)
        size = round(ONE_PERCENT * self.model.n_edges)
        circuit, _ = circuit_mask(scores, size)
        tree = {name: (~mask).float() for name, mask in circuit.items()}
        bridge = "TransformerBridge, ready to be patched"
        return [
            self.in_context(bridge, self.open_sites, self.sliced, self.forward),
            self.in_context(
                "the same, all logits",
                self.open_sites,
                self.all_logits,
                lambda: self.forward(0),
            ),
            self.in_context(
                "dense patched forward",
                lambda: self.patched(scores),
                self.sliced,
                self.forward,
                1.3,
            ),
            self.in_context(
                "1 % circuit, forward",
                lambda: self.patched(tree),
                self.sliced,
                self.forward,
                1.1,
            ),
            self.in_context(
                "mask-training step",
                self.training,
                self.training_step,
                self.forward_backward,
                1.45,
            ),
            Case("EAP scores", self.eap, self.passes(1, 1), 1.05),
            Case("run_circuits, 5 sizes", self.circuits, self.passes(1 + N_SIZES)),
        ]

    def budgeted(self, model: str) -> list[Case]:
        """The main rows of a small model."""
        return [
            replace(case, name=f"{model}: {case.name}", aim=BUDGETS[case.name])
            for case in self.cases()
            if case.name in BUDGETS
        ]

    def algorithms(self) -> list[Case]:
        """A row per algorithm: its time over that of the passes of its formula."""
        model, loader = self.model, self.loader
        n_sublayers, n_srcs = len(model.src_wrappers), len(model.srcs)
        probing = {"epochs": N_STEPS, "circuit_sizes": (100, 1000)}

        def scores(func: Callable[..., object], **settings: object) -> Run:
            return lambda: func(model, loader, None, **settings) and None

        return [
            Case(
                "activation magnitude: F",
                scores(activation_magnitude_prune_scores),
                self.passes(1),
            ),
            Case(
                "EAP of every prompt: 2 F + Bk",
                lambda: mask_gradient_prompt_scores(model, loader, "logit", "avg_diff")
                and None,
                self.passes(1, 1),
            ),
            Case(
                "EAP with GIM: 2 F + Bk", self.modified(gim_backward), self.passes(1, 1)
            ),
            Case(
                "EAP with RelP: 2 F + Bk", self.modified(relp_backward), self.passes(1, 1)
            ),
            Case(
                "head importance (HISP): 2 F + Bk",
                scores(head_importance_prune_scores),
                self.passes(1, 1),
                1.35,
            ),
            Case(
                f"IEG, {N_POINTS} points: F + {N_POINTS} (F + Bk)",
                scores(
                    mask_gradient_prune_scores,
                    grad_function="logit",
                    answer_function="avg_diff",
                    integrated_grad_samples=N_POINTS,
                ),
                self.passes(1, N_POINTS),
                1.9,
            ),
            Case(
                f"EAP-IG inputs: 2 F + {N_POINTS} (F + Bk)",
                scores(
                    input_integrated_gradients_prune_scores,
                    integrated_grad_samples=N_POINTS,
                ),
                self.passes(2, N_POINTS),
                1.35,
            ),
            Case(
                f"EAP-IG activations: F + {n_sublayers} (F + Bk)",
                scores(
                    activation_integrated_gradients_prune_scores,
                    integrated_grad_samples=1,
                ),
                self.passes(1, n_sublayers),
                1.9,
                one_in=4,
            ),
            Case(
                f"EAP-IG sources: {n_srcs} (F + Bk)",
                scores(
                    activation_integrated_gradients_prune_scores,
                    integrated_grad_samples=1,
                    share_passes=False,
                ),
                self.many_passes(n_srcs),
                1.9,
                one_in=20,
            ),
            Case(
                "clean-corrupt: 2 F + 2 (F + Bk)",
                scores(clean_corrupt_prune_scores),
                self.passes(2, 2),
                1.35,
            ),
            Case("exact patching, an edge: F", self.exact_edge, self.forward, 0.7),
            Case("ACDC, an edge: F", self.acdc_edge, self.forward, 0.7),
            Case(
                f"ACDC after EAP: 2 F + Bk + {N_EDGES} F",
                scores(
                    acdc_after_eap_prune_scores, n_candidates=N_EDGES, thresholds=(1e-4,)
                ),
                self.passes(1 + N_EDGES, 1),
                0.7,
                one_in=4,
            ),
            Case(
                f"subnetwork probing: 2 F + {N_STEPS} (F + Bk)",
                scores(
                    subnetwork_probing_prune_scores,
                    epochs=N_STEPS,
                    tree_optimisation=True,
                ),
                self.passes(2, N_STEPS),
                1.9,
            ),
            Case(
                f"circuit probing, 2 sizes: 4 F + {2 * N_STEPS} (F + Bk)",
                scores(circuit_probing_prune_scores, **probing, tree_optimisation=False),
                self.passes(4, 2 * N_STEPS),
                1.9,
            ),
            Case(
                f"tree probing, 2 sizes: 4 F + {2 * N_STEPS} (F + Bk)",
                scores(circuit_probing_prune_scores, **probing, tree_optimisation=True),
                self.passes(4, 2 * N_STEPS),
                1.9,
            ),
            Case(
                f"Edge Pruning: 2 F + {N_STEPS} (F + Bk)",
                scores(edge_pruning_prune_scores, n_steps=N_STEPS),
                self.passes(2, N_STEPS),
                1.9,
            ),
            Case(
                f"Matryoshka attribution: 2 F + {N_STEPS} (F + Bk)",
                scores(matryoshka_prune_scores, n_steps=N_STEPS),
                self.passes(2, N_STEPS),
                1.9,
            ),
        ]

    def some_edges(self) -> list[Edge]:
        """Edges from all over the graph, as many to each layer as it has."""
        edges = self.model.edges
        return list(edges[:: len(edges) // N_EDGES])

    def acdc_edge(self) -> float:
        edges = self.some_edges()
        run = partial(removed_edges, self.model, self.loader, 1e-4, edges=edges)
        return self.seconds(lambda: run() and None) / len(edges)

    def exact_edge(self) -> float:
        edges = self.some_edges()
        run = partial(edge_effects, self.model, self.loader, edges)
        return self.seconds(lambda: run() and None) / len(edges)


def _logit_diff(last_logits: Tensor) -> Tensor:
    return (last_logits[:, 1] - last_logits[:, 2]).mean()


def main(config: BenchConfig) -> None:  # noqa: D103
    bench = Bench(config)
    cases = {case.name: case for case in bench.cases()}
    algorithms = [] if config.quick else bench.algorithms()
    if config.memory_of is not None:
        print(_peak_memory(cases[config.memory_of].first))
        return
    rounds = min(config.rounds, QUICK_ROUNDS) if config.quick else config.rounds
    rows = [_measure(bench, case, rounds) for case in cases.values()]
    for row, case in zip(rows, cases.values(), strict=True):
        if case.aim is not None or not config.quick:
            row["peak_mb"] = _measure_memory(bench, case)
    rows += [_measure(bench, case, rounds) for case in algorithms]
    limited = [_limited(bench, "GPT-2 small")]
    for model in list(MODELS)[1:]:
        small = Bench(config, model)
        rows += [_measure(small, case, rounds) for case in small.budgeted(model)]
        limited.append(_limited(small, model))
    n_srcs = bench.model.plan.n_srcs
    buffer_mb = n_srcs * config.batch_size * config.seq_len * 768 * 4 / 1e6
    config.out.parent.mkdir(parents=True, exist_ok=True)
    config.out.write_text(
        json.dumps({"buffer_mb": buffer_mb, "cases": rows, "limited": limited}, indent=2)
        + "\n"
    )
    _print(rows, buffer_mb, config)
    _print_limited(limited)


def _measure(bench: Bench, case: Case, rounds: int) -> Row:
    runs = {"plain": case.plain, "first": case.first}
    if case.settled is not None:
        runs["settled"] = case.settled
    if case.one_in == 1:
        case.first()
    seconds: dict[str, float] = dict.fromkeys(runs, math.inf)
    for _ in range(1 + rounds // case.one_in):
        for which, run in runs.items():
            seconds[which] = min(seconds[which], bench.seconds(run))
    return {
        "name": case.name,
        "aim": case.aim,
        **{f"{which}_seconds": best for which, best in seconds.items()},
        **{
            f"{which}_ratio": best / seconds["plain"]
            for which, best in seconds.items()
            if which != "plain"
        },
    }


def _limited(bench: Bench, model: str) -> Row:
    """EAP in a quarter of the memory that it takes."""
    func, loader = edge_attribution_patching_prune_scores, bench.loader
    runs: dict[str, Run] = {"": lambda: func(bench.model, loader, None)}
    whole = _tensor_peak(bench.model, runs[""])
    runs["limited_"] = lambda: func(bench.model, loader, None, memory_limit=whole // 4)
    row: Row = {"name": model, "limit_mb": whole / 4e6}
    for which, run in runs.items():
        begin = bench.clock()
        row[f"{which}peak_mb"] = _tensor_peak(bench.model, run) / 1e6
        row[f"{which}seconds"] = bench.clock() - begin
        if not bench.config.quick:  # without what it takes to count memory
            row[f"{which}seconds"] = bench.seconds(lambda run=run: run() and None)
    return row


def _tensor_peak(model: PatchableModel, run: Run) -> int:
    model.free_buffers()
    with PeakMemory() as peak:
        run()
    model.free_buffers()
    return peak.n_bytes


def _print_limited(rows: list[Row]) -> None:
    table = Table(title="EAP in a quarter of its memory (MB of tensors beside the model)")
    table.add_column("Model")
    for title in ("Peak", "Limit", "Peak in it", "Seconds", "Seconds in it"):
        table.add_column(title, justify="right")
    for row in rows:
        keys = ("peak_mb", "limit_mb", "limited_peak_mb", "seconds", "limited_seconds")
        table.add_row(str(row["name"]), *(f"{row[key]:.3g}" for key in keys))
    Console(width=max(100, Console().width)).print(table)


def _measure_memory(bench: Bench, case: Case) -> int:
    if bench.device.type == "cuda":
        return round(_peak_gpu_memory(bench, case.first))
    command = [sys.executable, __file__, "--memory-of", case.name]
    # With an allocator that gives memory back, so that what is used can be seen.
    env = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")}
    printed = subprocess.check_output(
        command, env=env, stderr=subprocess.DEVNULL, text=True
    )
    return round(float(printed.split()[-1]))


def _peak_memory(run: Run) -> float:
    """MB above what is there before the run (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")  # forget the highest value so far
    before = _status_mb("VmRSS")
    run()
    return _status_mb("VmHWM") - before


def _peak_gpu_memory(bench: Bench, run: Run) -> float:
    """MB of tensors above what is there before the run."""
    bench.model.free_buffers()
    t.cuda.reset_peak_memory_stats()
    before = t.cuda.memory_allocated()
    run()
    return (t.cuda.max_memory_allocated() - before) / 1e6


def _status_mb(field: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024 / 1e6
    raise ValueError(field)


def _print(rows: list[Row], buffer_mb: float, config: BenchConfig) -> None:
    table = Table(
        title=f"GPT-2 small, batch {config.batch_size} x {config.seq_len} tokens"
    )
    table.add_column("Case")
    for title in COLUMNS:
        table.add_column(title, justify="right")
    for row in rows:
        cells = (
            f"{row[key]:{form}}" if row.get(key) is not None else "-"
            for key, form in COLUMNS.values()
        )
        table.add_row(str(row["name"]), *cells)
    console = Console(width=max(120, Console().width))
    console.print(table)
    console.print(
        f"One buffer of source activations is {buffer_mb:.0f} MB. JSON: {config.out}"
    )


if __name__ == "__main__":
    main(tyro.cli(BenchConfig, description=__doc__))
