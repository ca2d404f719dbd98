"""Find and test circuits: the command line.

python -m auto_circuit.experiments --help
python -m auto_circuit.experiments --tasks "Pocket IOI" --algos EAP IEG
python -m auto_circuit.experiments robustness --circuit-shares 0.01 0.1
"""

from __future__ import annotations

import contextlib
import gc
import io
import os
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from auto_circuit.errors import AutoCircuitError, near_matches
from auto_circuit.published_names import published_name as __getattr__  # noqa: F401

if TYPE_CHECKING:  # they take most of the time in which `--help` answers
    from auto_circuit.sweep_config import ExperimentConfig

DEFAULT = "sweep"
"""The experiment that is meant when the command line begins with an option."""
INTERRUPTED = 130
"""The exit code of a program that was interrupted from the keyboard (128 + SIGINT)."""


def main(args: Sequence[str] | None = None) -> None:
    """Run the experiment that the command line describes.

    Whatever is wrong is one line, and no traceback: exit code 2 for a command line that
    cannot be read, 1 for values and files that make no sense, 130 if it is interrupted.
    """
    if not sys.stderr.isatty():  # Hugging Face's progress bars; ours look for themselves
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        name, config = parse(sys.argv[1:] if args is None else args)
        run(name, config)
    except AutoCircuitError as error:
        sys.exit(_one_line(f"{type(error).__name__}: {error}"))
    except KeyboardInterrupt as error:
        print(_one_line(f"Interrupted. {error}"), file=sys.stderr)
        sys.exit(INTERRUPTED)


def run(name: str, config: ExperimentConfig) -> None:
    """Run an experiment, write its results and print its table."""
    from rich.console import Console

    from auto_circuit import reports

    if name == "robustness":
        reports.print_robustness(config, reports.run_robustness(config), Console())
    else:
        reports.print_summary(reports.run_experiment(config), Console())


def parse(args: Sequence[str]) -> tuple[str, ExperimentConfig]:
    """The experiment's name, and its configuration with the changes that `args` make.

    Exits with code 2 and one line for options and values that cannot be read, and with 0 for
    `--help`.
    """
    with _imports_without_collection():
        import tyro

        from auto_circuit.named_experiments import DESCRIPTIONS, EXPERIMENTS

    words = list(args)
    if not words or words[0].startswith("-"):
        words.insert(0, DEFAULT)
    errors = io.StringIO()
    try:
        if words[0] not in EXPERIMENTS:
            errors.write(
                f"There is no experiment {words[0]!r}.{near_matches(words[0], EXPERIMENTS)} "
                f"Known: {', '.join(EXPERIMENTS)}; without a name, it is {DEFAULT!r}."
            )
            raise SystemExit(2)
        with contextlib.redirect_stderr(errors):
            config = tyro.extras.overridable_config_cli(
                {name: (DESCRIPTIONS[name], EXPERIMENTS[name]) for name in EXPERIMENTS},
                args=words,
            )
    except SystemExit as stop:
        if stop.code:
            # Without the frame that tyro draws around its words.
            text = re.sub("[│╭╮╰╯]|[─-]{4,}", " ", errors.getvalue())
            print(_one_line(text), file=sys.stderr)
        else:
            print(known_names())
        raise
    return words[0], config


def known_names() -> str:
    """The names of experiments, tasks, algorithms and metrics, for the end of `--help`."""
    from auto_circuit.metrics.prune_metrics.prune_metrics import PRUNE_METRICS
    from auto_circuit.named_experiments import DESCRIPTIONS
    from auto_circuit.prune_algos.prune_algos import PRUNE_ALGOS
    from auto_circuit.tasks import TASKS

    lines = ["Experiments:"]
    for name, text in DESCRIPTIONS.items():
        lines += _wrapped([f"{name}:", *text.split()], " ")
    for title, names in {
        "Tasks": [task.key for task in TASKS],
        "Algorithms": [algo.short_name for algo in PRUNE_ALGOS],
        "Metrics": [metric.key for metric in PRUNE_METRICS],
    }.items():
        lines += ["", f"{title}:", *_wrapped([f"'{name}'" for name in names], ", ")]
    return "\n".join(lines)


def _wrapped(words: Sequence[str], separator: str) -> list[str]:
    """Lines of whole words, which may have spaces: names that can be searched for."""
    width, lines = shutil.get_terminal_size().columns, [f"  {words[0]}"]
    for word in words[1:]:
        if len(lines[-1] + separator + word) < width:
            lines[-1] += separator + word
        else:
            lines[-1] += separator.rstrip()
            lines.append(f"    {word}")
    return lines


@contextlib.contextmanager
def _imports_without_collection() -> Iterator[None]:
    """Imports make many objects, which all stay: to look for garbage among them, while they
    are made, after that and at the exit, takes a third of the time in which `--help` answers.
    """
    was_on, is_first = gc.isenabled(), "torch" not in sys.modules
    gc.disable()
    try:
        yield
    finally:
        if is_first:
            gc.freeze()
        if was_on:
            gc.enable()


def _one_line(text: str) -> str:
    return " ".join(text.split())


if __name__ == "__main__":
    main()
