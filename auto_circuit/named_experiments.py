"""The experiments that have a name: the first word of the command line."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from auto_circuit.metrics.prune_metrics.prune_metrics import LOGIT_DIFF_PERCENT_METRIC
from auto_circuit.mib_config import MibConfig
from auto_circuit.paper_config import PaperConfig
from auto_circuit.prune_algos.ACDC import ACDC_PRUNE_ALGO
from auto_circuit.prune_algos.edge_attribution_patching import EDGE_ATTR_PATCH_PRUNE_ALGO
from auto_circuit.prune_algos.prune_algos import PRUNE_ALGOS
from auto_circuit.report_config import CompareConfig, ReportConfig
from auto_circuit.sweep_config import ExperimentConfig, RunOptions
from auto_circuit.tasks import (
    POCKET_DOCSTRING_TASK,
    POCKET_GREATERTHAN_TASK,
    POCKET_IOI_TOKEN_TASK,
    TRACR_REVERSE_TOKEN_CIRCUIT_TASK,
    TRACR_XPROPORTION_TOKEN_CIRCUIT_TASK,
)

if TYPE_CHECKING:  # it takes long to import
    from rich.console import Console

    from auto_circuit.progress import Watch


@dataclass(frozen=True)
class Command:
    """What the command line says: an experiment, and how it runs."""

    config: ExperimentConfig
    options: RunOptions = RunOptions()


@dataclass(frozen=True)
class MibCommand:
    """The same of a run of the benchmark."""

    config: MibConfig
    options: RunOptions = RunOptions()


@dataclass(frozen=True)
class PaperCommand:
    """The same of the paper's tables and figures."""

    config: PaperConfig
    options: RunOptions = RunOptions()


NUMBERS = tuple(
    algo.short_name for algo in PRUNE_ALGOS if algo.short_name.endswith("(MSE)")
)
"""The algorithms that compare numbers, for models whose output is no word."""


ROBUSTNESS = ExperimentConfig(
    name="robustness",
    tasks=(
        POCKET_IOI_TOKEN_TASK.key,
        POCKET_GREATERTHAN_TASK.key,
        POCKET_DOCSTRING_TASK.key,
    ),
    algos=("EAP",),
    metrics=(LOGIT_DIFF_PERCENT_METRIC.key,),
    token_positions=True,
    circuit_shares=(0.001, 0.003, 0.01),
    n_seeds=1,
)
"""The pocket tasks whose prompts have one length, so that positions can be told apart."""

TRACR_REVERSE = ExperimentConfig(
    name="tracr-reverse",
    tasks=(TRACR_REVERSE_TOKEN_CIRCUIT_TASK.key,),
    algos=tuple(
        algo.short_name
        for algo in PRUNE_ALGOS
        if algo not in (ACDC_PRUNE_ALGO, EDGE_ATTR_PATCH_PRUNE_ALGO)
        and algo.short_name not in NUMBERS
    ),
    metrics=("Clean KL Div", LOGIT_DIFF_PERCENT_METRIC.key),
    n_seeds=1,
)
"""Every algorithm that compares words, against a circuit that is known exactly (of the ACDCs
the quick one, which here is ACDC with half of the thresholds; EAP by one of its names)."""

TRACR_XPROPORTION = ExperimentConfig(
    name="tracr-xproportion",
    tasks=(TRACR_XPROPORTION_TOKEN_CIRCUIT_TASK.key,),
    algos=("GT", "Act Mag", "Random", *NUMBERS),
    metrics=("Clean MSE",),
    n_seeds=1,
)
"""Every algorithm that compares numbers."""

EXPERIMENTS: dict[str, ExperimentConfig] = {
    "sweep": ExperimentConfig(),
    "robustness": ROBUSTNESS,
    "tracr-reverse": TRACR_REVERSE,
    "tracr-xproportion": TRACR_XPROPORTION,
}
"""The first word of the command line -> what its options change."""

DESCRIPTIONS: dict[str, str] = {
    "sweep": """Find and test circuits: sweep tasks x algorithms x metrics against circuit size.
For each task, every algorithm scores every edge; the best edges make circuits of growing size;
every metric measures each circuit. All of it is written to `results/<name>-<hash>/`, and a table
is printed. This is what is meant when no name is given. Without options: the tasks of the small
model that comes with the package.""",
    "robustness": """Test the same circuits in other ways: each of the six choices of Miller et
al. 2024 is changed, and a figure shows how the verdict changes.""",
    "tracr-reverse": """A sweep on a compiled model, whose circuit is known exactly: its table
says how well each algorithm finds it (AUROC). The published circuit of reverse leaves out the
two edges of the middle token, which stays where it is but is carried all the same: a right
ranking is at 0.998, not at 1.""",
    "tracr-xproportion": """A sweep on another compiled model, whose output is a number: with the
algorithms that compare numbers.""",
}
"""The same names -> what `--help` says of them."""


@dataclass(frozen=True)
class Program:
    """What a first word of the command line does that is no sweep.

    command: what its options change. description: what `--help` says. run: (config, options,
    console, watch) -> None; imports what only a run needs.
    """

    command: MibCommand | PaperCommand | ReportConfig | CompareConfig
    description: str
    run: Callable[[Any, RunOptions, Console, Watch], None]


def _run_mib(
    config: MibConfig, options: RunOptions, console: Console, watch: Watch
) -> None:
    from auto_circuit.mib_report import run_and_print

    run_and_print(config, options, console, watch)


def _run_paper(
    config: PaperConfig, options: RunOptions, console: Console, watch: Watch
) -> None:
    from auto_circuit.paper_report import run_and_print

    run_and_print(config, options, console, watch)


def _run_report(
    config: ReportConfig, options: RunOptions, console: Console, watch: Watch
) -> None:
    from auto_circuit.report_commands import report_and_print

    report_and_print(config, console)


def _run_compare(
    config: CompareConfig, options: RunOptions, console: Console, watch: Watch
) -> None:
    from auto_circuit.report_commands import compare_and_print

    compare_and_print(config, console)


PROGRAMS: dict[str, Program] = {
    "report": Program(
        ReportConfig(),
        """Write the report of a finished experiment again, from what is stored: one page, without
network. What is damaged is named, and the rest is shown. No model is loaded.""",
        _run_report,
    ),
    "compare": Program(
        CompareConfig(),
        """Two sweeps side by side: one page, and a short table here: what was asked otherwise,
which numbers differ, and which differences mean something. No model is loaded.""",
        _run_compare,
    ),
    "mib": Program(
        MibCommand(MibConfig()),
        """The circuit track of the benchmark MIB: CPR, CMD, accuracy area and weighted edge
counts of one model and task for each algorithm, and the folder to submit. Prompts come from the
Hugging Face hub, or with --data from a folder with the files of the task's data set.""",
        _run_mib,
    ),
    "paper": Program(
        PaperCommand(PaperConfig()),
        """The tables and figures of Miller et al. 2024 for the published tasks: how the verdict on
their published circuits changes with the six choices of a test, and with graph and ablation
together; how single prompts spread; how well algorithms find the circuit of a compiled model.""",
        _run_paper,
    ),
}
"""Name -> program."""
