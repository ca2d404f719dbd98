"""Cells on Ray: results as in one process, and no cell lost with a worker or a machine."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fsspec
import pandas
import pytest
import ray
import torch as t
from ray.cluster_utils import Cluster

from auto_circuit import ray_workers
from auto_circuit.cells import Outcome, Work, Workers, run_cells
from auto_circuit.errors import ConfigError
from auto_circuit.ray_workers import RayOptions, RayWorkers
from auto_circuit.store import Cell, CellResult, open_store

REPO = Path(__file__).parents[1]

# -------------------------------------------------------------------------------- the works


@dataclass(frozen=True)
class Lines:
    """A file to which processes add lines."""

    path: Path

    def add(self, line: str) -> None:
        with self.path.open("a") as file:
            file.write(f"{line}\n")

    def all(self) -> list[str]:
        return self.path.read_text().splitlines() if self.path.exists() else []


@dataclass(frozen=True)
class Opened:
    """Stands for a task: leaves a line, of its name and the process, when it is opened."""

    name: str
    lines: Lines

    @contextmanager
    def __call__(self) -> Iterator[str]:
        self.lines.add(f"{self.name} {os.getpid()}")
        yield self.name


@dataclass(frozen=True)
class Draw:
    """Products of random numbers, whose last digits depend on the threads."""

    seed: int

    def __call__(self, opened: str, *needed: CellResult) -> CellResult:
        a, b = t.randn((2, 200, 200), generator=t.Generator().manual_seed(self.seed))
        total = a @ b + sum(result.tensors["x"] for result in needed)
        row = {"seed": self.seed, "of": opened, "sum": total.sum().item()}
        return CellResult(
            {"x": total}, pandas.DataFrame([row]), {"mean": row["sum"] / 4e4}
        )


@dataclass(frozen=True)
class KillsItsWorker:
    """Leaves a line, and dies, the first `n` times."""

    n: int
    lines: Lines

    def __call__(self) -> CellResult:
        self.lines.add("killed")
        if len(self.lines.all()) <= self.n:
            os.kill(os.getpid(), signal.SIGKILL)
        return CellResult({"x": t.ones(3)})


@dataclass(frozen=True)
class Wait:
    """Says which process it is in, and waits; before, for others to be at work too."""

    seconds: float
    lines: Lines
    n_processes: int = 1

    def __call__(self) -> CellResult:
        self.lines.add(str(os.getpid()))
        wait_until(lambda: len(set(self.lines.all())) >= self.n_processes, 300)
        time.sleep(self.seconds)
        return CellResult({"x": t.ones(3)})


@dataclass(frozen=True)
class Raises:
    def __call__(self) -> CellResult:
        raise ZeroDivisionError("the loss is\n infinite")


@dataclass(frozen=True)
class CannotBeSent:
    what: Any

    def __call__(self) -> CellResult:
        return CellResult(numbers={"what": self.what})


@dataclass(frozen=True)
class CannotBeSentBack:
    def __call__(self) -> CellResult:
        return CellResult(numbers={"lock": threading.Lock()})


@dataclass(frozen=True)
class Ambient:
    """The state of torch, and where modules come from."""

    def __call__(self) -> CellResult:
        return CellResult(numbers=ambient())


def ambient() -> dict[str, Any]:
    return {
        "threads": t.get_num_threads(),
        "dtype": str(t.get_default_dtype()),
        "grad": t.is_grad_enabled(),
        "deterministic": t.get_deterministic_debug_mode(),
        "precision": t.get_float32_matmul_precision(),
        "package": ray_workers.__file__,
    }


def drawings(lines: Lines, n: int = 4) -> list[Work]:
    """Scores of two tasks, and something measured of each."""
    works = []
    for name in ("first", "second"):
        uses = Opened(name, lines)
        scores = [Cell("scores", {"of": name, "i": i}, f"{name} {i}") for i in range(n)]
        for seed, cell in enumerate(scores):
            found = Cell("rows", {"of": cell.key}, f"{cell.label}, measured")
            works.append(Work(cell, Draw(seed), uses=uses))
            works.append(Work(found, Draw(seed + 100), (cell,), Opened(name, lines)))
    return works


class Counted:
    """Workers, and how many works they had at once."""

    def __init__(self, workers: Workers) -> None:
        self._workers, self.n = workers, workers.n
        self.close = workers.close
        self.n_begun = self.most = 0

    def start(self, work: Work, needed: Sequence[CellResult]) -> None:
        self.n_begun += 1
        self.most = max(self.most, self.n_begun)
        self._workers.start(work, needed)

    def finished(self) -> Any:
        self.n_begun -= 1
        return self._workers.finished()


def by_label(outcomes: list[Outcome]) -> dict[str, Outcome]:
    return {outcome.cell.label: outcome for outcome in outcomes}


def data_files(folder: Path) -> dict[str, bytes]:
    paths = [
        path for path in folder.rglob("*") if path.suffix in (".safetensors", ".parquet")
    ]
    return {path.name: path.read_bytes() for path in paths}


def is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def wait_until(is_so: Callable[[], bool], seconds: float = 30.0) -> bool:
    """Is it so within a time?"""
    deadline = time.monotonic() + seconds
    while not is_so() and time.monotonic() < deadline:
        time.sleep(0.05)
    return is_so()


def two_workers() -> RayWorkers:
    return RayWorkers(RayOptions(n=2, threads=1))


# ----------------------------------------------------------------------------- before any work


@pytest.mark.parametrize(
    "options",
    [{"n": 0}, {"n": -1}, {"threads": 0}, {"gpus": -0.5}, {"gpus": float("nan")}],
)
def test_numbers_that_make_no_sense(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"`{next(iter(options))}` is"):
        RayOptions(**options)


@pytest.mark.parametrize(
    "address", ["", "gibberish", "host:", ":6379", "ray://a:1", "a:b"]
)
def test_an_address_that_cannot_be_one(address: str) -> None:
    with pytest.raises(ConfigError, match=r"expected host:port, .* or auto"):
        RayOptions(address=address)


def test_an_address_where_nothing_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    start = time.monotonic()
    with pytest.raises(
        ConfigError, match=f"Nothing answers at the Ray address {address}"
    ):
        RayWorkers(RayOptions(address=address))
    assert time.monotonic() - start < 5


def test_an_address_where_something_else_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray_workers, "CONNECT_SECONDS", 1.0)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(ConfigError, match=f"No Ray cluster answers at {address}"):
            RayWorkers(RayOptions(address=address))


def test_a_gpu_of_another_worker() -> None:
    from auto_circuit.cell_runs import _workers
    from auto_circuit.sweep_config import RunOptions

    with pytest.raises(ConfigError, match="`device` is 'cuda:1'; with workers,"):
        with _workers(RunOptions(workers=2), "cuda:1"):
            pass


def test_a_work_goes_where_its_task_is_open(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else where nothing is open."""
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    got: list[tuple[str, Any]] = []

    def remote(name: str, uses: Any) -> Any:
        call = SimpleNamespace(remote=lambda content, uses: got.append((name, content)))
        handle = SimpleNamespace(result=call)
        return ray_workers._Remote(handle, None, uses=uses, is_idle=True)

    first, second, third = (ray_workers._Uses(i, None) for i in range(3))
    workers = RayWorkers(RayOptions(n=3))
    workers._remotes = [remote("a", first), remote("b", None), remote("c", second)]
    work = Work(Cell("x", {}), Raises())
    for content, uses in ((b"2", second), (b"3", third), (b"1", first)):
        workers._waiting.append(ray_workers._Parcel(work, content, uses))
    workers._hand_out()
    assert got == [("c", b"2"), ("b", b"3"), ("a", b"1")]


def test_without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"pip install 'ray>=2.60"):
        RayWorkers()


# ---------------------------------------------------------------------------------- on a cluster


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A machine of two CPUs, to which this process is connected by its address."""
    os.environ["RAY_worker_niceness"] = "0"  # else they wait for every other process here
    machines = Cluster(initialize_head=True, head_node_args={"num_cpus": 2})
    try:
        with closing(
            RayWorkers(RayOptions(address=machines.address, threads=1))
        ) as workers:
            assert workers.n == 2
            yield machines
        assert not ray.is_initialized()
    finally:
        machines.shutdown()
        del os.environ["RAY_worker_niceness"]


@pytest.mark.slow
def test_files_are_those_of_a_serial_run(cluster: Cluster, tmp_path: Path) -> None:
    """Byte for byte; each worker opens each task once, and has one work at a time."""
    lines = Lines(tmp_path / "opened.txt")
    threads = t.get_num_threads()
    t.set_num_threads(1)
    try:
        serial = list(run_cells(drawings(lines), open_store(tmp_path / "serial")))
    finally:
        t.set_num_threads(threads)
    lines.path.unlink()
    workers = Counted(two_workers())
    store = open_store(f"file://{tmp_path / 'ray'}")
    outcomes = list(run_cells(drawings(lines), store, workers=workers))
    assert len(outcomes) == 16 and all(outcome.is_new for outcome in outcomes)
    expected = data_files(tmp_path / "serial")
    assert len(expected) == 32 and data_files(tmp_path / "ray") == expected
    numbers = [
        {o.cell: o.result and o.result.numbers for o in run} for run in (serial, outcomes)
    ]
    assert numbers[0] == numbers[1]
    assert workers.most == 2
    opened = Counter(lines.all())
    assert len({line.split()[1] for line in opened}) == 2 and max(opened.values()) == 1


@pytest.mark.slow
def test_a_sweep_on_two_workers(cluster: Cluster, tmp_path: Path) -> None:
    """The same files as in one process."""
    # Here, since every worker imports this module.
    from auto_circuit.runner import run_experiment
    from auto_circuit.sweep_cells import sweep_cells
    from auto_circuit.sweep_config import ExperimentConfig, RunOptions, check_config

    config = ExperimentConfig(
        tasks=("Pocket IOI",),
        algos=("Random", "EAP"),
        metrics=("Logit Diff Percent",),
        circuit_sizes=(1, 100),
        n_seeds=1,
        out=tmp_path / "ray",
    )
    found = run_experiment(config, RunOptions(workers=2))
    assert not found.failed and len(found.cells) == 5
    cells = sweep_cells(check_config(config), config)
    works = [work for cell in cells for work in cell.works]
    list(run_cells(works, open_store(tmp_path / "serial")))
    expected = data_files(tmp_path / "serial")
    assert len(expected) == 4
    assert expected.items() <= data_files(tmp_path / "ray").items()


@pytest.mark.slow
def test_cells_that_fail_and_workers_that_die(cluster: Cluster, tmp_path: Path) -> None:
    """They are named, and all others are there."""
    once, always = Lines(tmp_path / "once.txt"), Lines(tmp_path / "always.txt")
    computes = {
        "once": KillsItsWorker(1, once),
        "always": KillsItsWorker(99, always),
        "raises": Raises(),
        "cannot go": CannotBeSent(threading.Lock()),
        "cannot come": CannotBeSentBack(),
        "ambient": Ambient(),
    }
    works = [Work(Cell("x", {"of": k}, k), compute) for k, compute in computes.items()]
    works += drawings(Lines(tmp_path / "opened.txt"), n=1)
    store = open_store(f"memory://{tmp_path.name}")
    t.set_default_dtype(t.float64)
    t.use_deterministic_algorithms(True)
    t.set_float32_matmul_precision("high")
    try:
        with t.no_grad():
            here = ambient() | {"threads": 1}
            outcomes = by_label(list(run_cells(works, store, workers=two_workers())))
    finally:
        t.set_default_dtype(t.float32)
        t.use_deterministic_algorithms(False)
        t.set_float32_matmul_precision("highest")
    errors = {label: o.error for label, o in outcomes.items() if o.error}
    assert errors.keys() == {"always", "raises", "cannot go", "cannot come"}
    assert errors["always"].startswith("Its worker has died, 3 times.")
    assert errors["raises"] == "ZeroDivisionError: the loss is infinite"
    assert errors["cannot go"].startswith("It cannot be sent to a worker (TypeError:")
    assert errors["cannot come"].startswith("Its result cannot be sent by a worker:")
    assert len(once.all()) == 2 and len(always.all()) == 3
    assert len(outcomes) == len(works)
    found = outcomes["ambient"].result
    assert found is not None and found.numbers == here
    assert all(store.read(o.cell) is not None for o in outcomes.values() if not o.error)
    fsspec.filesystem("memory").rm(f"/{tmp_path.name}", recursive=True)


@pytest.mark.slow
def test_more_workers_than_there_is_room_for(cluster: Cluster) -> None:
    with pytest.raises(ConfigError, match="no room for 50 workers: Ray has 2 CPUs"):
        RayWorkers(RayOptions(n=50))
    with pytest.raises(ConfigError, match="is connected to Ray at .*, not at other:1"):
        RayWorkers(RayOptions(address="other:1"))


@pytest.mark.slow
@pytest.mark.usefixtures("interruptible")
def test_an_interruption_ends_the_workers(cluster: Cluster, tmp_path: Path) -> None:
    lines = Lines(tmp_path / "begun.txt")
    works = [Work(Cell("x", {"i": i}, f"{i}"), Wait(60.0, lines)) for i in range(3)]

    def interrupt() -> None:
        wait_until(lambda: len(lines.all()) == 2, 300)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        list(run_cells(works, open_store(tmp_path / "store"), workers=two_workers()))
    pids = [int(pid) for pid in lines.all()]
    assert len(pids) == 2 and wait_until(lambda: not any(map(is_alive, pids)))


@pytest.mark.slow
def test_a_machine_that_goes_away(cluster: Cluster, tmp_path: Path) -> None:
    other = cluster.add_node(num_cpus=2)
    lines = Lines(tmp_path / "begun.txt")
    waits = [Wait(3.0, lines, 2), Wait(3.0, lines, 2), Wait(0.0, lines), Wait(0.0, lines)]
    works = [Work(Cell("x", {"i": i}, f"{i}"), wait) for i, wait in enumerate(waits)]
    was_at_work = []

    def remove() -> None:
        wait_until(lambda: len(lines.all()) == 2, 300)
        was_at_work.extend(lines.all())
        cluster.remove_node(other, allow_graceful=False)

    removal = threading.Thread(target=remove)
    removal.start()
    store = open_store(tmp_path / "store")
    outcomes = list(run_cells(works, store, workers=two_workers()))
    removal.join()
    assert [o.error for o in outcomes] == [""] * 4
    assert len(was_at_work) == 2 and len(set(was_at_work)) == 2
    assert len(lines.all()) == 5  # one of the two that were at work was begun anew


# ------------------------------------------------------------------------------- on this machine

NOTEBOOK = """
import signal, sys
sys.path.insert(0, {repo!r})
from contextlib import nullcontext
from dataclasses import dataclass
import torch as t
from auto_circuit.cells import Work, run_cells
from auto_circuit.ray_workers import RayOptions, RayWorkers
from auto_circuit.store import Cell, CellResult, open_store

def twice(x):
    return 2 * x

@dataclass(frozen=True)
class Mine:
    "Is nowhere but here: workers cannot import it."
    function: object
    i: int
    def __call__(self, opened):
        import os
        if self.i == 3 and len(opened) == 3:
            os.kill(os.getpid(), 9)
        opened.append(self.i)
        x = self.function(t.arange(3.0) + self.i)
        return CellResult({{"x": x}}, numbers={{"n": len(opened)}})

@dataclass(frozen=True)
class Uses:
    function: object
    def __call__(self):
        return nullcontext([])

before = signal.getsignal(signal.SIGTERM)
works = [Work(Cell("x", {{"i": i}}), Mine(twice, i), uses=Uses(twice)) for i in range(4)]
workers = RayWorkers(RayOptions(n=1))
outcomes = list(run_cells(works, open_store("memory://x"), workers=workers))
assert signal.getsignal(signal.SIGTERM) == before
for o in outcomes:
    print(o.error or o.result.tensors["x"].tolist(), o.result.numbers)
"""


@pytest.mark.slow
def test_what_a_notebook_defines(tmp_path: Path) -> None:
    """It is sent by value, and opened once by each worker; Ray prints nothing."""
    program = tmp_path / "notebook.py"
    program.write_text(NOTEBOOK.format(repo=str(REPO)))
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, program],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment | {"RAY_worker_niceness": "0"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert done.stdout == "".join(
        f"[{2 * i}.0, {2 * i + 2}.0, {2 * i + 4}.0] {{'n': {n}}}\n"
        for i, n in enumerate((1, 2, 3, 1))
    )
