"""Results that survive: cells, each written whole or not at all, found by what made them.

A cell's key is a hash over everything that changes its result, so the same cell of two
sweeps is computed once. On the disk a cell is

    <kind>/<key>-<checksum>.safetensors     tensors, if it has any
    <kind>/<key>-<checksum>.parquet         rows, if it has any
    <kind>/<key>.json                       the manifest, written last

A data file is named by what is in it, and the manifest names the data files: whoever reads
a manifest finds its very files, also when two processes write one cell at once. A cell
without a manifest is not there. Nothing is pickled, and nothing else in the folder is touched.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable
from warnings import warn

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from auto_circuit.checks import checked
from auto_circuit.errors import ConfigError, DataError, FileError
from auto_circuit.files import (
    checked_file_name,
    checksum,
    parse_json,
    read_bytes,
    write_bytes,
)
from auto_circuit.fingerprints import digest

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

if TYPE_CHECKING:
    import fsspec
    import pandas

STORE_VERSION = 1
"""Of the layout; a store of another version is refused."""

RESULTS_VERSION = 2
"""Part of every key: raise it when a function's numbers change, and all is computed anew."""

STORE_FILE = "store.json"
CLAIMS = ".claims"


class DamagedCellWarning(UserWarning):
    """A stored cell is damaged, or something else lies in its place."""


@dataclass(frozen=True)
class Cell:
    """One piece of work whose result is kept.

    kind: the first part of its place, such as "scores".
    what: all that changes the result, as plain data (JSON): weights, prompts, the
        algorithm's configuration, seed, precision, the keys of the cells that it uses.
    label: for people; it changes nothing.
    """

    kind: str
    what: Mapping[str, Any] = field(hash=False)
    label: str = field(default="", compare=False)

    @cached_property
    def key(self) -> str:
        """40 hexadecimal digits: the same for the same `what`, in every process."""
        content = {"kind": self.kind, "what": self.what, "results": RESULTS_VERSION}
        return checksum(content)[:40]

    @property
    def name(self) -> str:
        """Where its manifest is, without `.json`."""
        return f"{self.kind}/{self.key}"


@dataclass(frozen=True)
class CellResult:
    """What a cell's work gave.

    tensors: by name; empty if there are none. rows: a table, or None.
    numbers: plain data, which the same work gives again. cost: plain data that it does not:
        seconds, bytes, where it ran.
    """

    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    rows: pandas.DataFrame | None = None
    numbers: Mapping[str, Any] = field(default_factory=dict)
    cost: Mapping[str, Any] = field(default_factory=dict)


@runtime_checkable
class Folder(Protocol):
    """Where a store's objects are, each of which is written whole or not at all."""

    def read(self, name: str) -> bytes | None:
        """The content; None if there is none. Raises FileError."""
        ...

    def write(self, name: str, content: bytes) -> None:
        """Put content in the place of what was there. Raises FileError."""
        ...

    def names(self, folder: str) -> list[str]:
        """What lies in one of its folders, sorted."""
        ...

    def remove(self, name: str) -> None:
        """Take it away, if it is there."""
        ...

    def claimed(self, name: str) -> AbstractContextManager[bool]:
        """Inside, no other process has the name, if it gives True."""
        ...

    def at_work(self) -> AbstractContextManager[None]:
        """Inside, this process reads and writes."""
        ...


@dataclass(frozen=True)
class LocalFolder:
    """A folder of this machine, or one that machines share."""

    path: Path

    def read(self, name: str) -> bytes | None:
        """As `Folder.read`."""
        path = self.path / name
        try:
            is_there = path.exists()
        except OSError as error:  # no right to look, or too long a name
            raise FileError(f"Cannot read {path}: {error.strerror or error}.") from error
        return read_bytes(path) if is_there else None

    def write(self, name: str, content: bytes) -> None:
        """As `Folder.write`: temporary file, fsync, rename, fsync of the folder."""
        path = self.path / name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise FileError(f"Cannot write {path}: {error.strerror or error}.") from error
        write_bytes(path, content)

    def names(self, folder: str) -> list[str]:
        """As `Folder.names`."""
        path = self.path / folder
        return sorted(f.name for f in path.iterdir()) if path.is_dir() else []

    def remove(self, name: str) -> None:
        """As `Folder.remove`."""
        with suppress(OSError):
            (self.path / name).unlink(missing_ok=True)

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """As `Folder.at_work`: who is alone takes away what killed processes left."""
        with _locked(self.path / STORE_FILE) as lock:
            if lock.is_taken(alone=True):
                self._tidy()
            lock.is_taken(alone=False)
            try:
                yield
            finally:
                if lock.is_taken(alone=True):
                    self._tidy()

    def _tidy(self) -> None:
        left = [*self.path.glob("*/.partial-*"), *self.path.glob(f"{CLAIMS}/*")]
        for path in left:
            path.unlink(missing_ok=True)
        with suppress(OSError):
            (self.path / CLAIMS).rmdir()

    @contextmanager
    def claimed(self, name: str) -> Iterator[bool]:
        """As `Folder.claimed`: a lock that the system takes back when its owner dies."""
        path = self.path / CLAIMS / name.replace("/", "-")
        with _locked(path) as lock:
            # Whoever had it last has taken its name away, and the next one makes a new file.
            is_mine = lock.is_taken(alone=True) and lock.has_its_name()
            try:
                yield is_mine
            finally:
                if is_mine:
                    path.unlink(missing_ok=True)


@dataclass(frozen=True)
class _Lock:
    """A file that is open, to be locked."""

    path: Path
    descriptor: int

    def is_taken(self, alone: bool) -> bool:
        """Take it alone, or beside others who do not have it alone. False if others do."""
        if fcntl is None:  # there is no such lock: everybody has it
            return not alone or self.path.name != STORE_FILE
        how = fcntl.LOCK_EX | fcntl.LOCK_NB if alone else fcntl.LOCK_SH
        try:
            fcntl.flock(self.descriptor, how)
        except BlockingIOError:
            return False
        except OSError as error:
            raise FileError(
                f"The store cannot be locked ({self.path}: {error.strerror}), so that two "
                "processes would do the same work. Choose a folder on another drive."
            ) from error
        return True

    def has_its_name(self) -> bool:
        """Is the file that is open still the one at its path?"""
        with suppress(OSError):
            return os.fstat(self.descriptor).st_ino == self.path.stat().st_ino
        return False


@contextmanager
def _locked(path: Path) -> Iterator[_Lock]:
    """Inside, a file can be locked; it is made if it is not there."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise FileError(
            f"The store cannot be locked: {path}: {error.strerror or error}."
        ) from error
    try:
        yield _Lock(path, descriptor)
    finally:
        if fcntl is not None:
            # To close is not enough: a process that was forked meanwhile has it open too.
            with suppress(OSError):
                fcntl.flock(descriptor, fcntl.LOCK_UN)
        os.close(descriptor)


@dataclass(frozen=True)
class RemoteFolder:
    """Any address that fsspec knows, such as s3://bucket/folder or memory://folder.

    Only whole objects are written. There are no claims: of two processes that compute the
    same cell both write it, and the objects are the same.
    """

    files: fsspec.AbstractFileSystem
    path: str

    def read(self, name: str) -> bytes | None:
        """As `Folder.read`."""
        with _as_file_error(self, name):
            try:
                return bytes(self.files.cat_file(f"{self.path}/{name}"))  # type: ignore[arg-type]
            except FileNotFoundError:
                return None

    def write(self, name: str, content: bytes) -> None:
        """As `Folder.write`."""
        with _as_file_error(self, name):
            self.files.pipe_file(f"{self.path}/{name}", content)

    def names(self, folder: str) -> list[str]:
        """As `Folder.names`."""
        with _as_file_error(self, folder):
            try:
                found = self.files.ls(f"{self.path}/{folder}", detail=False)
            except FileNotFoundError:
                return []
        return sorted(str(name).rstrip("/").rsplit("/", 1)[-1] for name in found)

    def remove(self, name: str) -> None:
        """As `Folder.remove`."""
        with suppress(Exception):
            self.files.rm_file(f"{self.path}/{name}")

    def claimed(self, name: str) -> AbstractContextManager[bool]:
        """As `Folder.claimed`: always True."""
        return nullcontext(True)

    def at_work(self) -> AbstractContextManager[None]:
        """As `Folder.at_work`: nothing is left, since only whole objects are written."""
        return nullcontext()


@contextmanager
def _as_file_error(folder: RemoteFolder, name: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # every file system of fsspec has errors of its own
        where = f"{folder.path}/{name}"
        raise FileError(f"The store cannot be reached at {where}: {error}.") from error


@dataclass(frozen=True)
class Store:
    """A folder of cells (see `open_store`)."""

    folder: Folder

    def read(self, cell: Cell) -> CellResult | None:
        """A cell's result; None if it is not there.

        What is damaged, or is not this cell's, is named in a DamagedCellWarning, and is as
        if it was not there. Raises FileError where the system refuses.
        """
        try:
            return self.stored(cell.kind, cell.key)
        except DataError as error:
            warn(
                f"{cell.label or cell.kind} is computed again: {error}",
                DamagedCellWarning,
                stacklevel=2,
            )
            return None

    def holds(self, cell: Cell) -> bool:
        """Is something stored for the cell? Whether it is sound, only `read` can tell."""
        return self.folder.read(f"{cell.name}.json") is not None

    def stored(self, kind: str, key: str) -> CellResult | None:
        """The result of the cell of a kind that has this key; None if it is not there.

        Raises DataError for what is damaged, or is not this cell's, and FileError.
        """
        content = self.folder.read(f"{kind}/{key}.json")
        if content is None:
            return None
        manifest = _manifest(content, f"{kind}/{key}.json", key)
        data = {}
        for name, expected in manifest["files"].items():
            part = self.folder.read(f"{kind}/{name}")
            if part is None:
                raise DataError(f"the file {name} of {kind}/{key}.json is missing.")
            if digest(part) != expected:
                raise DataError(f"the file {kind}/{name} is damaged.")
            data[Path(name).suffix] = part
        return CellResult(
            tensors=_tensors(data.get(".safetensors"), manifest["tensors"]),
            rows=_table(data[".parquet"]) if ".parquet" in data else None,
            numbers=manifest["numbers"],
            cost=manifest["cost"],
        )

    def write(self, cell: Cell, result: CellResult) -> None:
        """Write a cell: its data, and then, which makes it be there, its manifest."""
        files = {}
        for suffix, content in _contents(result).items():
            of_content = digest(content)
            name = f"{cell.key}-{of_content[:8]}{suffix}"
            self.folder.write(f"{cell.kind}/{name}", content)
            files[name] = of_content
        manifest = {
            "kind": cell.kind,
            "key": cell.key,
            "label": cell.label,
            "what": cell.what,
            "results_version": RESULTS_VERSION,
            "files": files,
            "tensors": list(result.tensors),
            "numbers": result.numbers,
            "cost": result.cost,
        }
        manifest = {"checksum": checksum(_as_read(manifest)), **manifest}
        self.folder.write(f"{cell.name}.json", _json(manifest))

    def cells(self, kind: str) -> list[str]:
        """The keys of all cells of a kind, sorted."""
        names = self.folder.names(kind)
        return [name.removesuffix(".json") for name in names if name.endswith(".json")]

    def claimed(self, cell: Cell) -> AbstractContextManager[bool]:
        """Inside, no other process computes the cell, if it gives True."""
        return self.folder.claimed(cell.name)

    def at_work(self) -> AbstractContextManager[None]:
        """Around all work: what killed processes have left goes when nobody else works."""
        return self.folder.at_work()


@checked
def open_store(address: str | Path) -> Store:
    """The store at an address; an empty one if nothing is there.

    address: a folder, or an address of fsspec ("s3://bucket/folder", "memory://x"); it may
        hold other files, which stay as they are.
    Raises ConfigError for an address that cannot be one, and for a store of another
    version; FileError where the system refuses.
    """
    store = Store(folder_at(str(address)))
    content = store.folder.read(STORE_FILE)
    if content is None:
        about = {"auto_circuit_store": STORE_VERSION}
        store.folder.write(STORE_FILE, _json(about))
        return store
    try:
        version = parse_json(content.decode(), STORE_FILE)["auto_circuit_store"]
    except (DataError, UnicodeDecodeError, KeyError, TypeError):
        version = "unreadable"
    if version != STORE_VERSION:
        raise ConfigError(
            f"{address} holds results of version {version!r:.40}; this version of AutoCircuit "
            f"reads and writes version {STORE_VERSION}. Write to another folder, or read it "
            "with the version that wrote it."
        )
    return store


def folder_at(address: str) -> Folder:
    """A folder of this machine, or what fsspec finds. Raises ConfigError for neither."""
    if "://" not in address:
        return LocalFolder(Path(address))
    import fsspec

    try:
        files, path = fsspec.core.url_to_fs(address)
    except (ImportError, ValueError, OSError) as error:
        raise ConfigError(f"There can be no results at {address!r}: {error}.") from error
    if address.startswith(("file://", "local://")):
        return LocalFolder(Path(path))
    return RemoteFolder(files, path.rstrip("/"))


# ------------------------------------------------------------------------------- contents


def _contents(result: CellResult) -> dict[str, bytes]:
    """Suffix -> the file's content."""
    contents = {}
    if result.tensors:
        tensors = {k: v.detach().contiguous().cpu() for k, v in result.tensors.items()}
        contents[".safetensors"] = save(tensors)
    if result.rows is not None:
        buffer = io.BytesIO()
        result.rows.to_parquet(buffer)
        contents[".parquet"] = buffer.getvalue()
    return contents


def _json(content: Any) -> bytes:
    return (json.dumps(content, indent=1, allow_nan=False) + "\n").encode()


def _as_read(content: Any) -> Any:
    """What JSON makes of it: tuples are lists afterwards."""
    return json.loads(json.dumps(content))


def _manifest(content: bytes, where: str, key: str) -> dict[str, Any]:
    try:
        manifest = parse_json(content.decode(), where)
    except UnicodeDecodeError:
        raise DataError(f"{where} is damaged (it is no text).") from None
    if not isinstance(manifest, dict) or "checksum" not in manifest:
        raise DataError(f"{where} is not a cell's manifest.")
    expected = manifest.pop("checksum")
    if expected != checksum(manifest):
        raise DataError(f"{where} is damaged (its checksum is another).")
    if manifest.get("key") != key:
        raise DataError(f"{where} is another cell's manifest.")
    for name in manifest["files"]:
        checked_file_name("files", name)
    return manifest


def _tensors(content: bytes | None, names: list[str]) -> dict[str, Tensor]:
    """In the order in which they were given; safetensors keeps none."""
    try:
        tensors = {} if content is None else load(content)
        return {name: tensors[name] for name in names}
    except (SafetensorError, KeyError) as error:
        raise DataError(f"its tensors cannot be read ({error}).") from None


def _table(content: bytes) -> pandas.DataFrame:
    import pandas

    return pandas.read_parquet(io.BytesIO(content))


# ------------------------------------------------------------------------- whole folders


def put_folder(folder: Path, address: str) -> None:
    """Copy the files of a folder to an address that fsspec knows. Raises FileError."""
    place = folder_at(address)
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            place.write(path.relative_to(folder).as_posix(), path.read_bytes())
