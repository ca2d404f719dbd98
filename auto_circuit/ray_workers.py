"""Cells computed by Ray: on the cores or GPUs of one machine, or on a cluster.

Each worker is a process of Ray's that computes one work after the other, so that the model of
a task is loaded once by each. Works go there as pickles and results come back; only the driver
reads and writes the store. A worker computes in the state of torch that the driver is in, with
as many threads: results are those of `cells.InThisProcess`, bit for bit.
"""

from __future__ import annotations

import logging
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch as t

import auto_circuit
from auto_circuit.cells import Failure, Use, Work, Worker
from auto_circuit.checks import check_count, check_number, checked
from auto_circuit.errors import ConfigError, one_line
from auto_circuit.store import CellResult

MAX_RETRIES = 2
"""How often a cell is computed again whose worker has died."""

CONNECT_SECONDS = 20.0
"""How long a cluster may take to answer."""

START_SECONDS = 300.0
"""How long a cluster may take to start the first worker, when there is none."""


@checked
@dataclass(frozen=True)
class RayOptions:
    """Where cells are computed, and by how many.

    n: workers; None: one for each GPU, or without GPUs as many as the CPUs are enough for.
    address: of a cluster, such as "10.0.0.1:6379", or "auto" for the one that this machine
        belongs to; None: this machine alone.
    threads: of torch, in each worker; None: as many as here, so that results are the same
        bit for bit.
    gpus: how many a worker takes, such as 0.5 if two share one; 0 for none. None: one each
        if there are any, or an equal share if there are more workers than GPUs.

    Raises ConfigError for numbers and addresses that make no sense.
    """

    n: int | None = None
    address: str | None = None
    threads: int | None = None
    gpus: float | None = None

    def __post_init__(self) -> None:
        for name, count in (("n", self.n), ("threads", self.threads)):
            if count is not None:
                check_count(name, count)
        if self.gpus is not None:
            check_number("gpus", self.gpus, low=0)
        if self.address is not None and not _is_address(self.address):
            raise ConfigError(
                f"The Ray address is {self.address!r:.100}; expected host:port, such as "
                "10.0.0.1:6379, or auto."
            )


def _is_address(address: str) -> bool:
    host, _, port = address.rpartition(":")
    return address == "auto" or bool("://" not in address and host and port.isdecimal())


# ------------------------------------------------------------------------------ the driver


@dataclass
class _Parcel:
    """A work, as it is sent."""

    work: Work
    content: bytes
    uses: _Uses | None
    n_deaths: int = 0


@dataclass(frozen=True)
class _Uses:
    """What works use: equal ones have the same number, also after the way to a worker."""

    number: int
    pickled: Any = field(compare=False)


@dataclass(eq=False)
class _Remote:
    """A worker, and what it is at: a parcel, or (None) its own start."""

    handle: Any
    future: Any
    parcel: _Parcel | None = None
    uses: _Uses | None = None
    is_idle: bool = False


class RayWorkers:
    """`cells.Workers` that are processes of Ray's.

    Raises ConfigError if Ray is not installed, or the cluster does not answer or has no room.
    """

    n: int

    def __init__(self, options: RayOptions | None = None) -> None:
        self._options = options or RayOptions()
        self._ray = _imported_ray()
        self._settings = _TorchSettings.of_here(self._options.threads)
        self._actor: Any = None
        self._owns_ray = False
        self._remotes: list[_Remote] = []
        self._waiting: deque[_Parcel] = deque()
        self._ended: deque[tuple[Work, CellResult | Failure]] = deque()
        self._uses: list[tuple[Use, _Uses]] = []
        self._n_bad_starts = 0
        if self._options.address is None and not self._ray.is_initialized():
            # Ray takes seconds to start here: only when there is something to compute.
            self.n = self._options.n or _n_here(self._options, self._settings.threads)
        else:
            self._connect()

    def _connect(self) -> None:
        ray, options, threads = self._ray, self._options, self._settings.threads
        self._owns_ray = _connected(ray, options, threads)
        try:
            self.n = _n_workers(ray, options, threads)
        except BaseException:
            self.close()
            raise
        n_gpus = ray.cluster_resources().get("GPU", 0)
        shared = min(1.0, 1 / -(-self.n // n_gpus)) if n_gpus else 0
        self._actor = ray.remote(
            num_cpus=1,
            num_gpus=shared if options.gpus is None else options.gpus,
            max_restarts=0,  # a new one is started where there is something to do
            runtime_env=_environment(threads),
            scheduling_strategy="SPREAD",
        )(_Host)

    def start(self, work: Work, needed: Sequence[CellResult]) -> None:
        """As `Workers.start`. Raises ConfigError if Ray cannot be started here."""
        if self._actor is None:
            self._connect()
        dumps = self._ray.cloudpickle.dumps
        try:
            uses = None if work.uses is None else self._sent(work.uses)
            content = dumps((replace(work, uses=None), tuple(needed)))
        except Exception as error:  # what is pickled may raise anything
            text = (
                f"It cannot be sent to a worker ({_short(error)}). It goes there as a pickle: "
                "models by their name or folder, not loaded, and functions without open files."
            )
            self._ended.append((work, Failure(text)))
            return
        self._waiting.append(_Parcel(work, content, uses))
        self._hand_out()

    def _sent(self, uses: Use) -> _Uses:
        for known, sent in self._uses:
            if known == uses:
                return sent
        pickled = self._ray.put(self._ray.cloudpickle.dumps(uses))
        self._uses.append((uses, _Uses(len(self._uses), pickled)))
        return self._uses[-1][1]

    def _hand_out(self) -> None:
        """Give what waits to those who have nothing to do, and start workers if they are few."""
        while self._waiting and (idle := [r for r in self._remotes if r.is_idle]):
            parcel = self._waiting.popleft()
            remote = min(idle, key=lambda r: _unfitness(r, parcel))
            remote.is_idle, remote.parcel = False, parcel
            remote.uses = parcel.uses or remote.uses
            remote.future = remote.handle.result.remote(parcel.content, parcel.uses)
        starting = sum(r.parcel is None and not r.is_idle for r in self._remotes)
        n_new = min(len(self._waiting) - starting, self.n - len(self._remotes))
        for _ in range(n_new):
            handle = self._actor.remote(self._settings)
            self._remotes.append(_Remote(handle, handle.version.remote()))

    def finished(self) -> tuple[Work, CellResult | Failure]:
        """As `Workers.finished`. Raises ConfigError if no worker can be started."""
        while not self._ended:
            self._hand_out()
            self._take(self._next())
        return self._ended.popleft()

    def _next(self) -> _Remote:
        """The next worker that has come to the end of something."""
        at_work = {r.future: r for r in self._remotes if not r.is_idle}
        is_any_up = any(r.parcel is not None for r in at_work.values())
        timeout = None if is_any_up else START_SECONDS
        done, _ = self._ray.wait(list(at_work), num_returns=1, timeout=timeout)
        if not done:
            free = self._ray.available_resources()
            raise ConfigError(
                f"No worker has started in {START_SECONDS:.0f} s. The cluster has "
                f"{free.get('CPU', 0):g} CPUs and {free.get('GPU', 0):g} GPUs free: ask for "
                "fewer workers, or wait until others have finished."
            )
        return at_work[done[0]]

    def _take(self, remote: _Remote) -> None:
        """What a worker has done, or how it has died."""
        parcel = remote.parcel
        try:
            answer = self._ray.get(remote.future)
        except self._ray.exceptions.RayError as error:
            self._bury(remote, str(error))
            return
        remote.is_idle, remote.parcel = True, None
        if parcel is None:
            self._n_bad_starts = 0
            _check_version(answer)
        else:
            self._ended.append((parcel.work, pickle.loads(answer)))

    def _bury(self, remote: _Remote, how: str) -> None:
        """Forget a worker that has died; its work is begun anew, unless that kills workers."""
        self._remotes.remove(remote)
        with suppress(Exception):
            self._ray.kill(remote.handle)
        parcel = remote.parcel
        if parcel is None:
            self._n_bad_starts += 1
            if self._n_bad_starts > MAX_RETRIES:
                last = how.strip().splitlines()[-1]
                raise ConfigError(f"A worker of Ray's cannot start: {last}")
            return
        parcel.n_deaths += 1
        if parcel.n_deaths <= MAX_RETRIES:
            self._waiting.appendleft(parcel)
        else:
            first = one_line(how.split(".")[0])
            text = (
                f"Its worker has died, {parcel.n_deaths} times. The last time: {first}."
            )
            self._ended.append((parcel.work, Failure(text)))

    def close(self) -> None:
        """As `Workers.close`: ends the workers, and Ray if it was started here."""
        for remote in self._remotes:
            with suppress(Exception):  # it may be dead, or its cluster gone
                self._ray.kill(remote.handle)
        self._remotes.clear()
        self._uses.clear()
        if self._owns_ray:
            self._owns_ray = False
            self._ray.shutdown()


def _unfitness(remote: _Remote, parcel: _Parcel) -> int:
    """The least for one that has what the parcel uses open, then for one that has nothing."""
    return 0 if remote.uses == parcel.uses else 1 if remote.uses is None else 2


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _check_version(version: str) -> None:
    if version != auto_circuit.__version__:
        raise ConfigError(
            f"A worker has version {version} of AutoCircuit; here it is "
            f"{auto_circuit.__version__}. Install the same on all machines."
        )


# ----------------------------------------------------------------------------- the cluster


def _imported_ray() -> Any:
    try:
        # Else it prints the cluster's own errors, such as every end of a worker, which the
        # cell that it was at will tell, if it does not get over it.
        with _environ("RAY_DEDUP_LOGS_SKIP_REGEX", "^"):
            import ray
    except ImportError:
        raise ConfigError(
            "Ray, which computes on several processes, is not installed: "
            "pip install 'ray>=2.60,<3'."
        ) from None
    return ray


def _connected(ray: Any, options: RayOptions, threads: int) -> bool:
    """Connect to Ray, or start it. False if this process was connected already."""
    if ray.is_initialized():
        here = ray.get_runtime_context().gcs_address
        if options.address not in (None, "auto", here):
            raise ConfigError(
                f"This process is connected to Ray at {here}, not at {options.address}: leave "
                "the address out, or call ray.shutdown() before."
            )
        return False
    if options.address is not None:
        _check_address(options.address)
        where: dict[str, Any] = {"address": options.address}
    else:
        n = options.n or _n_here(options, threads)
        where = {"address": "local", "num_cpus": n, "include_dashboard": False}
    try:
        with _sigterm_kept(), _environ("RAY_worker_niceness", "0"):
            ray.init(
                **where,
                log_to_driver=False,
                logging_level=logging.CRITICAL,
                runtime_env=_environment(threads),
            )
    except Exception as error:  # it has errors of many kinds
        ray.shutdown()
        name = options.address or "this machine"
        raise ConfigError(f"Ray cannot be used on {name}: {_short(error)}") from error
    return True


def _check_address(address: str) -> None:
    """Raise ConfigError unless a cluster answers; Ray's own attempt would end the process."""
    host, _, port = address.rpartition(":")
    if address != "auto" and not _listens(host, int(port)):
        raise ConfigError(
            f"Nothing answers at the Ray address {address}. Is the cluster running "
            "(`ray start --head`)?"
        )
    said = _said_by_health_check(address)
    if "AuthenticationError" in said:
        raise ConfigError(
            f"The Ray cluster at {address} wants a token: set RAY_AUTH_MODE=token, and have "
            "the same ~/.ray/auth_token on all machines. On a machine of the cluster, the "
            "address `auto` does."
        )
    if said:
        raise ConfigError(f"No Ray cluster answers at {address} ({said:.200}).")


def _said_by_health_check(address: str) -> str:
    """The error of Ray's command line, in a line; empty if the cluster is well."""
    command = [sys.executable, "-m", "ray.scripts.scripts", "health-check"]
    environment = dict(os.environ)
    if address != "auto":
        command += ["--address", address]
    elif Path.home().joinpath(".ray", "auth_token").exists():
        environment.setdefault("RAY_AUTH_MODE", "token")  # as Ray does itself for `auto`
    try:
        done = subprocess.run(
            command,
            env=environment,
            capture_output=True,
            text=True,
            timeout=CONNECT_SECONDS,
        )
    except subprocess.TimeoutExpired:
        return f"no answer in {CONNECT_SECONDS:.0f} s"
    lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
    return lines[-1] if done.returncode else ""


def _listens(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=CONNECT_SECONDS / 4).close()
    except (OSError, UnicodeError, OverflowError):
        return False
    return True


@contextmanager
def _sigterm_kept() -> Iterator[None]:
    """Ray takes the signal for itself, and prints stack traces when it comes."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


@contextmanager
def _environ(name: str, value: str) -> Iterator[None]:
    """Inside, an environment variable has a value, unless it has one already."""
    is_set = name in os.environ
    os.environ.setdefault(name, value)
    try:
        yield
    finally:
        if not is_set:
            del os.environ[name]


def _environment(threads: int) -> dict[str, Any]:
    """What workers see: modules where the driver has them, and as many threads.

    Without OMP_NUM_THREADS Ray would set it to the number of CPUs that a worker takes.
    """
    root = str(Path(auto_circuit.__file__).parents[1])
    own = [str(Path(path).resolve()) for path in sys.path if not _is_of_python(path)]
    return {
        "env_vars": {
            "PYTHONPATH": os.pathsep.join(dict.fromkeys([root, *own])),
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads)),
        }
    }


def _is_of_python(path: str) -> bool:
    """Every installation has those itself."""
    return any(Path(path).is_relative_to(p) for p in (sys.prefix, sys.base_prefix))


def _n_here(options: RayOptions, threads: int) -> int:
    n_gpus = 0 if options.gpus == 0 else t.cuda.device_count()
    if n_gpus:
        return int(n_gpus / (options.gpus or 1))
    return max(1, (os.cpu_count() or 1) // threads)


def _n_workers(ray: Any, options: RayOptions, threads: int) -> int:
    """How many there are. Raises ConfigError if there is no room for them."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    n_cpus = sum(int(node.get("CPU", 0)) for node in nodes)
    n_gpus = 0 if options.gpus == 0 else sum(node.get("GPU", 0) for node in nodes)
    room = n_cpus
    if options.gpus:
        room = min(room, int(n_gpus / options.gpus))
    n = options.n
    if n is None and n_gpus:
        n = max(1, min(room, int(n_gpus / (options.gpus or 1))))
    elif n is None:
        n = sum(max(1, int(node.get("CPU", 0)) // threads) for node in nodes)
    if n > room:
        raise ConfigError(
            f"There is no room for {n} workers: Ray has {n_cpus} CPUs and {n_gpus:g} GPUs, "
            f"which is enough for {room}."
        )
    return n


# ------------------------------------------------------------------------------ the worker


@dataclass(frozen=True)
class _TorchSettings:
    """What numbers depend on beside the code."""

    threads: int
    dtype: t.dtype
    has_grad: bool
    determinism: int
    matmul_precision: str
    cudnn: tuple[bool, bool, bool]

    @classmethod
    def of_here(cls, threads: int | None) -> _TorchSettings:
        cudnn = t.backends.cudnn
        return cls(
            threads=threads or t.get_num_threads(),
            dtype=t.get_default_dtype(),
            has_grad=t.is_grad_enabled(),
            determinism=t.get_deterministic_debug_mode(),
            matmul_precision=t.get_float32_matmul_precision(),
            cudnn=(cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32),
        )

    def set(self) -> None:
        cudnn = t.backends.cudnn
        t.set_num_threads(self.threads)
        t.set_default_dtype(self.dtype)
        t.set_grad_enabled(self.has_grad)
        t.set_deterministic_debug_mode(self.determinism)
        t.set_float32_matmul_precision(self.matmul_precision)
        cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32 = self.cudnn


class _Host:
    """A worker, in a process of Ray's."""

    def __init__(self, settings: _TorchSettings) -> None:
        settings.set()
        self._ray = _imported_ray()
        self._worker = Worker()
        self._number = -1
        self._uses: Use | None = None

    def version(self) -> str:
        return auto_circuit.__version__

    def result(self, content: bytes, uses: _Uses | None) -> bytes:
        try:
            work, needed = pickle.loads(content)
            work = replace(work, uses=self._received(uses))
        except Exception as error:  # such as a module that this machine does not have
            return pickle.dumps(Failure(f"A worker cannot open it: {_short(error)}"))
        result = self._worker.result(work, needed)
        try:
            return self._ray.cloudpickle.dumps(_on_cpu(result))
        except Exception as error:
            failure = Failure(f"Its result cannot be sent by a worker: {_short(error)}")
            return pickle.dumps(failure)

    def _received(self, uses: _Uses | None) -> Use | None:
        """The very object of the last time, if it is the same: functions sent by value differ."""
        if uses is None:
            return None
        if uses.number != self._number:
            self._worker.close()
            self._uses = pickle.loads(self._ray.get(uses.pickled))
            self._number = uses.number
        return self._uses


def _on_cpu(result: CellResult | Failure) -> CellResult | Failure:
    """The driver may have no GPU."""
    if isinstance(result, Failure):
        return result
    tensors = {name: x.detach().cpu() for name, x in result.tensors.items()}
    return replace(result, tensors=tensors)
