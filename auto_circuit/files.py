"""Files that are written whole or not at all, inside the folder that was named.

JSON is read strictly: what the standard does not know is an error.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from stat import S_ISDIR, S_ISREG
from typing import Any

from auto_circuit.errors import (
    AutoCircuitError,
    ConfigError,
    DataError,
    FileError,
    near_matches,
)

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

MAX_NAME_BYTES = 200


def path_in_folder(path: Path | str) -> Path:
    """A path to write to. Raises ConfigError if there is no such folder."""
    path = Path(path)
    if not path.parent.is_dir():
        raise ConfigError(f"Cannot write {path}: there is no folder {path.parent}.")
    return path


def checked_file_name(field: str, name: str) -> str:
    """A name that can stand in a folder. Raises ConfigError if it would leave the folder.

    field: what the error calls it.
    """
    is_one_part = name.isprintable() and name == name.strip() and not set(name) & {*"/\\"}
    n_bytes = len(name.encode("utf-8", "surrogatepass"))
    if not is_one_part or name in ("", ".", "..") or n_bytes > MAX_NAME_BYTES:
        raise ConfigError(
            f"`{field}` is {name[:80]!r}, which cannot be part of a file's name: expected 1 "
            f"to {MAX_NAME_BYTES} bytes, without slashes, control characters and spaces at "
            "the ends."
        )
    return name


@contextmanager
def written_whole(path: Path | str) -> Iterator[Path]:
    """Yields a path to write to; what was written then takes the place of `path`, at once.

    If the body raises, the disk is full or the process dies, a file that was at `path` is
    still there, undamaged. Permissions are those of any new file. Raises ConfigError if
    there is no such folder, and FileError where the system refuses.
    """
    final = path_in_folder(path)
    if final.is_symlink():
        final = final.resolve()
    if _is_there_and_not(S_ISREG, final):
        raise FileError(f"Cannot write {path}: there is something that is no file.")
    partial = _hidden_beside(final)
    try:
        partial.touch(exist_ok=False)
        permissions = partial.stat().st_mode & 0o777
        yield partial
        # Some writers make a file of their own, with other permissions.
        partial.chmod(permissions)
        _sync(partial)
        os.replace(partial, final)
        _sync(final.parent)
    except OSError as error:
        raise FileError(f"Cannot write {path}: {error.strerror or error}.") from error
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def write_bytes(path: Path | str, content: bytes) -> None:
    """Write a file as `written_whole` does."""
    with written_whole(path) as partial:
        partial.write_bytes(content)


@contextmanager
def folder_written_whole(path: Path | str) -> Iterator[Path]:
    """Yields a new folder to fill, which then takes the place of `path` with all it holds.

    A folder that was at `path` is there, undamaged, until the new one is complete, and stays
    if the body raises or the disk is full. Of processes that write the same folder at once, the
    last one's stays. Raises ConfigError if there is no folder to put it in, and FileError
    where the system refuses.
    """
    final = path_in_folder(path)
    if final.is_symlink():
        final = final.resolve()
    if _is_there_and_not(S_ISDIR, final):
        raise FileError(f"Cannot write {path}: there is something that is no folder.")
    partial = _hidden_beside(final)
    try:
        partial.mkdir()
        yield partial
        for written in (*partial.rglob("*"), partial):
            _sync(written)
        _put_in_place(partial, final)
        _sync(final.parent)
    except FileError:
        raise
    except OSError as error:
        raise FileError(f"Cannot write {path}: {error.strerror or error}.") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _is_there_and_not(is_kind: Callable[[int], bool], path: Path) -> bool:
    # One look: between two, another process may take it away.
    try:
        return not is_kind(path.stat().st_mode)
    except FileNotFoundError:
        return False


def _put_in_place(new: Path, final: Path) -> None:
    """Rename a folder; one that has the name already goes only when the new one has it."""
    old = _hidden_beside(final)
    with _locked(final.parent):
        if final.exists():
            final.rename(old)
        try:
            new.rename(final)
        except BaseException as error:
            if old.exists() and not final.exists():
                _put_back(old, final, error)
            raise
    # Only now: if the old one could not be put back, it must not go.
    shutil.rmtree(old, ignore_errors=True)


def _put_back(old: Path, final: Path, cause: BaseException) -> None:
    try:
        old.rename(final)
    except OSError:
        raise FileError(
            f"Cannot write {final}: {cause}. What was there before could not be put back; "
            f"it is {old}, undamaged: rename it yourself."
        ) from cause


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Inside, no other process or thread of ours renames in the folder.

    Between two renames there is a moment without the old and without the new one. Where the
    system has no such lock (Windows, some network drives) the renames go on without.
    """
    descriptor = os.open(folder, os.O_RDONLY) if fcntl else None
    try:
        if fcntl and descriptor is not None:
            with suppress(OSError):
                fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        if fcntl and descriptor is not None:
            # To close is not enough: a process that was forked meanwhile has it open too.
            with suppress(OSError):
                fcntl.flock(descriptor, fcntl.LOCK_UN)
            os.close(descriptor)


def _hidden_beside(path: Path) -> Path:
    # In the same folder: to rename from one file system to another is not one step.
    return path.parent / f".partial-{secrets.token_hex(8)}{path.suffix[-16:]}"


def write_text(path: Path | str, text: str) -> None:
    """Write a text file (UTF-8) as `written_whole` does."""
    with written_whole(path) as partial:
        partial.write_text(text, encoding="utf-8", newline="\n")


MAX_BYTES = 2**31
"""No file of ours is larger: one that is would fill the memory before it is refused."""


def read_bytes(path: Path | str) -> bytes:
    """The content of a file. Raises DataError if there is none at `path`.

    Raises FileError for what is no regular file (to read a pipe or a device may never
    end), for one of more than MAX_BYTES, and where the system refuses.
    """
    path = Path(path)
    try:
        if not path.exists():
            names = (
                [f.name for f in path.parent.iterdir()] if path.parent.is_dir() else []
            )
            raise DataError(f"There is no file {path}.{near_matches(path.name, names)}")
        if not path.is_file():
            raise FileError(f"{path} is no file that can be read (a folder, a pipe ...).")
        n_bytes = path.stat().st_size
        if n_bytes > MAX_BYTES:
            raise FileError(f"{path} has {n_bytes} bytes; expected at most {MAX_BYTES}.")
        return path.read_bytes()
    except ValueError as error:
        if isinstance(error, AutoCircuitError):
            raise
        raise FileError(f"{str(path)[:80]!r} is no path: {error}.") from error
    except OSError as error:
        if isinstance(error, AutoCircuitError):
            raise
        raise FileError(f"Cannot read {path}: {error.strerror or error}.") from error


def read_json(path: Path | str) -> Any:
    """The content of a JSON file (UTF-8).

    Raises as `read_bytes` and `parse_json` do.
    """
    try:
        return parse_json(read_bytes(path).decode("utf-8"), str(path))
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not JSON, or it is damaged: {error}.") from error


def checksum(content: Any) -> str:
    """What a change of a JSON value changes: SHA-256, in hexadecimal."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _sync(path: Path) -> None:
    """Have the system put on the disk what was written to a file or folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def parse_json(text: str, where: str) -> Any:
    """What a JSON text holds. Raises DataError where Python would take what JSON has not.

    Those are NaN and infinite numbers; also keys that are there twice, of which Python
    keeps the last, and lists that are nested too deeply. where: the file, for the error.
    """

    def refused(constant: str) -> Any:
        raise DataError(f"{where} is not JSON: it has the number {constant}.")

    def finite(digits: str) -> float:
        return float(digits) if math.isfinite(float(digits)) else refused(digits[:40])

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        content = dict(pairs)
        if len(content) < len(pairs):
            keys = [key for key, _ in pairs]
            doubled = next(key for key in keys if keys.count(key) > 1)
            raise DataError(f"{where} has the key {doubled!r:.100} twice in one object.")
        return content

    try:
        return json.loads(
            text, object_pairs_hook=once, parse_constant=refused, parse_float=finite
        )
    except DataError:
        raise
    except RecursionError:
        raise DataError(f"{where}: lists or objects are nested too deeply.") from None
    except ValueError as error:  # also a number of more than 4300 digits
        raise DataError(f"{where} is not JSON: {error}.") from None


PACKAGE_DIR = Path(__file__).resolve().parent


def repo_path_to_abs_path(path: Path | str) -> Path:
    """Where a path that is relative to the repository is on this machine.

    What exists in the checkout is meant first, then what exists in the installed
    package (which ships `datasets/`). A path that exists in neither is a new one: in
    the checkout, or in the working directory if the package is installed. An absolute
    path stays as it is.
    """
    root = _checkout_root()
    homes = [PACKAGE_DIR] if root is None else [root, PACKAGE_DIR]
    for home in homes:
        if (home / path).exists():
            return home / path
    return (root or Path.cwd()) / path


def _checkout_root() -> Path | None:
    """The repository that this code is in, or None if the package is installed."""
    root = PACKAGE_DIR.parent
    return root if (root / "pyproject.toml").is_file() else None
