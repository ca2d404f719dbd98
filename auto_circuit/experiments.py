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
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from auto_circuit.errors import AutoCircuitError, near_matches, one_line
from auto_circuit.published_names import published_name as __getattr__  # noqa: F401

if TYPE_CHECKING:  # they take most of the time in which `--help` answers
    from auto_circuit.sweep_config import RunOptions

DEFAULT = "sweep"
"""The experiment that is meant when the command line begins with an option."""
INTERRUPTED, TERMINATED = 130, 143
"""The exit codes of a program that was interrupted from the keyboard (128 + SIGINT), or
terminated (128 + SIGTERM)."""


def main(args: Sequence[str] | None = None) -> None:
    """Run the experiment that the command line describes.

    Whatever is wrong is one line, and no traceback: exit code 2 for a command line that
    cannot be read, 1 for values and files that make no sense and for cells that failed,
    130 if it is interrupted, 143 if it is terminated.
    """
    if not sys.stderr.isatty():  # Hugging Face's progress bars; ours look for themselves
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        with _terminated_like_interrupted():
            is_complete = run(*parse(sys.argv[1:] if args is None else args))
    except AutoCircuitError as error:
        sys.exit(one_line(f"{type(error).__name__}: {error}"))
    except _Terminated as error:
        print(one_line(f"Terminated. {error}"), file=sys.stderr)
        sys.exit(TERMINATED)
    except KeyboardInterrupt as error:
        print(one_line(f"Interrupted. {error}"), file=sys.stderr)
        sys.exit(INTERRUPTED)
    if not is_complete:
        sys.exit(1)


class _Terminated(KeyboardInterrupt):
    """What the signal SIGTERM becomes."""


@contextlib.contextmanager
def _terminated_like_interrupted() -> Iterator[None]:
    """Inside, the system's polite request to end is as good as Ctrl-C."""

    def stop(*_: object) -> None:
        raise _Terminated

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def run(name: str, config: Any, options: RunOptions) -> bool:
    """Run an experiment, write its results and print its table. True if nothing failed.

    config: an ExperimentConfig, or that of one of the PROGRAMS.
    """
    from rich.console import Console

    from auto_circuit import progress, reports, runner
    from auto_circuit.named_experiments import PROGRAMS

    console = Console()
    is_reversed = getattr(config, "reverse_clean_corrupt", False)
    is_seen = console.is_terminal
    watch = progress.Live(console) if is_seen else progress.Lines(console, is_reversed)
    if name in PROGRAMS:
        PROGRAMS[name].run(config, options, console, watch)
        return True
    if name == "robustness":
        rows = runner.run_robustness(config, options, watch)
        reports.print_robustness(config, rows, console)
        return True
    results = runner.run_experiment(config, options, watch)
    reports.print_summary(results, console)
    return not results.failed


def parse(args: Sequence[str]) -> tuple[str, Any, RunOptions]:
    """The experiment's name, its configuration with the changes that `args` make, and how
    it runs.

    Exits with code 2 and one line for options and values that cannot be read, and with 0 for
    `--help`.
    """
    with _imports_without_collection():
        import tyro

        from auto_circuit.named_experiments import (
            DESCRIPTIONS,
            EXPERIMENTS,
            PROGRAMS,
            Command,
        )
        from auto_circuit.report_config import CompareConfig, ReportConfig
        from auto_circuit.sweep_config import RunOptions

    known: dict[str, tuple[str, Any]] = {
        name: (DESCRIPTIONS[name], Command(EXPERIMENTS[name])) for name in EXPERIMENTS
    } | {
        name: (program.description, program.command) for name, program in PROGRAMS.items()
    }
    words = list(args)
    if not words or words[0].startswith("-"):
        words.insert(0, DEFAULT)
    errors = io.StringIO()
    try:
        if words[0] not in known:
            errors.write(
                f"There is no experiment {words[0]!r}.{near_matches(words[0], known)} "
                f"Known: {', '.join(known)}; without a name, it is {DEFAULT!r}."
            )
            raise SystemExit(2)
        with contextlib.redirect_stderr(errors):
            command = tyro.extras.overridable_config_cli(
                known, args=words, config=(tyro.conf.OmitArgPrefixes,)
            )
    except SystemExit as stop:
        if stop.code:
            # Without the frame that tyro draws around its words.
            text = re.sub("[│╭╮╰╯]|[─-]{4,}", " ", errors.getvalue())
            print(one_line(text), file=sys.stderr)
        else:
            print(known_names())
        raise
    if isinstance(command, (ReportConfig, CompareConfig)):
        return words[0], command, RunOptions()
    return words[0], command.config, command.options


def known_names() -> str:
    """The names of experiments, tasks, algorithms and metrics, for the end of `--help`."""
    from auto_circuit.metrics.prune_metrics.prune_metrics import PRUNE_METRICS
    from auto_circuit.named_experiments import DESCRIPTIONS, PROGRAMS
    from auto_circuit.prune_algos.prune_algos import PRUNE_ALGOS
    from auto_circuit.tasks import TASKS

    lines = ["Experiments:"]
    texts = {name: program.description for name, program in PROGRAMS.items()}
    for name, text in {**DESCRIPTIONS, **texts}.items():
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


if __name__ == "__main__":
    main()
