"""Prompt files: JSON, JSON Lines or CSV, read and checked.

What is wrong with a file is said here, with file, prompt and field, before anything is
computed. What a prompt's texts and token ids mean to a model: see `prompt_encoding`.
"""

from __future__ import annotations

import csv
import difflib
import io
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import pairwise
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from auto_circuit.errors import ConfigError, DataError
from auto_circuit.files import parse_json

FIELDS = ("clean", "corrupt", "answers", "wrong_answers")
NEEDED = FIELDS[:3]
FILE_FIELDS = ("prompts", "seq_labels", "word_idxs", "span_names")
BOS_LABEL = "<|BOS|>"
MAX_DEPTH = 8
MAX_KEPT = 2**20
"""The most characters of a file whose prompts are kept in case it is read again."""


@dataclass(frozen=True)
class Prompt:
    """A prompt pair as its file has it. where: its file and place, for errors.

    clean, corrupt: texts, or lists of token ids or of other numbers. answers,
    wrong_answers: lists of texts and token ids, or of numbers; no wrong answers: [].
    spans: side ("clean", "corrupt") -> name -> [first token, first one after it], if the
        file names spans.
    """

    where: str
    clean: str | list[Any]
    corrupt: str | list[Any]
    answers: list[Any]
    wrong_answers: list[Any]
    spans: dict[str, dict[str, list[int]]] | None = None


@dataclass(frozen=True)
class PromptFile:
    """The prompts, a name for each position, and the positions of named words.

    span_names: of all spans, in order; None if the prompts have none.
    """

    prompts: list[Prompt]
    seq_labels: list[str] | None = None
    word_idxs: dict[str, int] = field(default_factory=dict)
    span_names: tuple[str, ...] | None = None

    def with_bos(self) -> PromptFile:
        """Labels and positions when each prompt has a BOS token in front."""
        labels = self.seq_labels and [BOS_LABEL, *self.seq_labels]
        idxs = {word: idx + 1 for word, idx in self.word_idxs.items()}
        return replace(self, seq_labels=labels, word_idxs=idxs)


# ------------------------------------------------------------------------------- reading


def read_prompt_files(paths: Any) -> PromptFile:
    """All prompts of one or more files; labels and word positions are the first one's.

    Raises ConfigError for what is no path or list of paths, DataError as
    `read_prompt_file`, and for files whose spans have other names.
    """
    if isinstance(paths, (str, os.PathLike)):
        paths = [paths]
    if not isinstance(paths, Sequence) or isinstance(paths, (bytes, bytearray)):
        raise ConfigError(
            f"`path` is {paths!r:.200}; expected the path of a prompt file, or a list of "
            "paths."
        )
    if not paths:
        raise ConfigError("`path` is an empty list; give at least one prompt file.")
    files = [read_prompt_file(path) for path in paths]
    for path, file in zip(paths, files, strict=True):
        if file.span_names != files[0].span_names:
            raise DataError(
                f"The spans of {path} are named {file.span_names}, and those of {paths[0]} "
                f"{files[0].span_names}; expected the same names in all files."
            )
    return replace(files[0], prompts=[p for file in files for p in file.prompts])


def read_prompt_file(path: Path | str) -> PromptFile:
    """The checked content of a prompt file, in the format that its suffix names.

    Raises DataError, which says what is wrong with which prompt and field.
    """
    path = _checked_path(path)
    if path.suffix.lower() not in READERS:
        raise DataError(
            f"The prompt file {path} has the suffix {path.suffix!r}; expected one of "
            f"{', '.join(READERS)}."
        )
    text = _read_text(path)
    found = (_kept if len(text) <= MAX_KEPT else _content)(text, path)
    labels = found.seq_labels and [*found.seq_labels]
    return replace(
        found, prompts=[*found.prompts], seq_labels=labels, word_idxs={**found.word_idxs}
    )


def _content(text: str, path: Path) -> PromptFile:
    content = READERS[path.suffix.lower()](text, str(path))
    _check_spelling(content, FILE_FIELDS, str(path))
    rows = content.get("prompts")
    if not isinstance(rows, list):
        raise DataError(f'{path} must hold an object with a list "prompts".')
    if not rows:
        raise DataError(f"{path} has no prompts.")
    prompts = [_prompt(row, f"{path}, prompt {i}") for i, row in enumerate(rows)]
    labels = content.get("seq_labels")
    if labels is not None and not (
        isinstance(labels, list) and all(map(is_text, labels))
    ):
        raise DataError(f'{path}: "seq_labels" must be a list of texts.')
    idxs = content.get("word_idxs")
    idxs = {} if idxs is None else idxs
    if not isinstance(idxs, dict) or not all(
        is_text(word) and is_whole(idx) for word, idx in idxs.items()
    ):
        raise DataError(f'{path}: "word_idxs" must map words to positions.')
    names = _span_names(prompts, content.get("span_names"), str(path))
    return PromptFile(prompts, labels, idxs, names)


_kept = lru_cache(maxsize=4)(_content)
"""A sweep reads the same text again for each seed, and to check it before the model loads."""


def _checked_path(path: Any) -> Path:
    if not isinstance(path, (str, os.PathLike)) or not isinstance(os.fspath(path), str):
        raise ConfigError(
            f"`path` has {path!r:.200}; expected the path of a prompt file."
        )
    return Path(path)


def _read_text(path: Path) -> str:
    """Raises DataError for what is no file: to read a pipe or a device may never end."""
    try:
        if not path.exists():
            raise DataError(f"There is no prompt file {path!s:.300}.")
        if not path.is_file():
            raise DataError(f"The prompt file {path} is a folder, a pipe or a device.")
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not a text in UTF-8: {error}.") from None
    except DataError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise DataError(f"Cannot read the prompt file {path!s:.300}: {error}.") from None


def _read_json(text: str, where: str) -> dict[str, Any]:
    content = parse_json(text, where)
    if not isinstance(content, dict):
        raise DataError(f'{where} must hold an object with a list "prompts".')
    return content


def _read_json_lines(text: str, where: str) -> dict[str, Any]:
    lines = enumerate(text.split("\n"), start=1)
    return _of_rows(
        [
            _as_object(parse_json(line, f"{where}, line {number}"), where, number)
            for number, line in lines
            if line.strip()
        ],
        where,
    )


def _as_object(row: Any, where: str, line: int) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise DataError(
            f"{where}, line {line} is a {type(row).__name__}; expected an object."
        )
    return row


def _read_csv(text: str, where: str) -> dict[str, Any]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        header = [name.strip() for name in next(reader, [])]
        doubled = {name for name in header if name and header.count(name) > 1}
        if doubled:
            raise DataError(
                f"{where} has several columns {sorted(doubled)}. Number them: answers_1, "
                "answers_2."
            )
        rows = []
        for cells in reader:
            at = f"{where}, line {reader.line_num}"
            if cells and len(cells) != len(header):
                raise DataError(
                    f"{at} has {len(cells)} cells, but the first line names "
                    f"{len(header)} columns. Put quotes around texts with commas."
                )
            if cells:
                rows.append(_csv_row(dict(zip(header, cells, strict=True)), at))
    except csv.Error as error:
        raise DataError(f"{where}, line {reader.line_num} is not CSV: {error}.") from None
    return _of_rows(rows, where)


def _csv_row(cells: dict[str, str], where: str) -> dict[str, Any]:
    """The prompt of a line: each cell is a text or a JSON list; answers are collected."""
    row: dict[str, Any] = {}
    for name, cell in cells.items():
        base = re.sub(r"_\d+$", "", name)
        if base in ("answers", "wrong_answers"):
            row.setdefault(base, []).extend(_csv_answers(cell, f"{where}, {name!r}"))
        elif name in ("clean", "corrupt"):
            row[name] = _list_or_text(cell)
        elif name in (*FILE_FIELDS, "spans"):
            row[name] = parse_json(cell, f"{where}, {name!r}") if cell else None
        else:
            row[name] = cell
    return row


def _csv_answers(cell: str, where: str) -> list[Any]:
    if len(cell) > 1 and cell[0] == "[" and cell[-1] == "]":
        return parse_json(cell, where)
    return [cell] if cell else []


def _list_or_text(cell: str) -> Any:
    """A text may begin with a bracket too."""
    if not cell.startswith("["):
        return cell
    try:
        return parse_json(cell, "")
    except DataError:
        return cell


def _of_rows(rows: list[dict[str, Any]], where: str) -> dict[str, Any]:
    """The content of a file of lines: labels and positions are those of the first row."""
    content: dict[str, Any] = {"prompts": rows}
    for name in FILE_FIELDS[1:]:
        values = [row[name] for row in rows if row.get(name) is not None]
        if any(one != other for one, other in pairwise(values)):
            raise DataError(
                f"{where}: {name!r} differs from line to line; it is one for the whole "
                "file, so give it in the first line alone."
            )
        content[name] = values[0] if values else None
    return content


READERS: dict[str, Callable[[str, str], dict[str, Any]]] = {
    ".json": _read_json,
    ".jsonl": _read_json_lines,
    ".csv": _read_csv,
}
"""The suffixes of prompt files -> (text, name for errors) -> content as in JSON."""


# ------------------------------------------------------------------------------ checking


def _prompt(row: Any, where: str) -> Prompt:
    if not isinstance(row, dict):
        raise DataError(f"{where} is a {type(row).__name__}; expected an object.")
    for name in NEEDED:
        if name not in row:
            raise DataError(f"{where} has no field {name!r}; it needs {list(NEEDED)}.")
    _check_spelling(row, (*FIELDS, "spans"), where)
    row = {**row, "wrong_answers": _or_empty(row.get("wrong_answers"))}
    is_text = isinstance(row["clean"], str)
    for name in ("clean", "corrupt"):
        _check_side(row[name], is_text, f"{where}, field {name!r}")
    for name in ("answers", "wrong_answers"):
        _check_answers(row[name], is_text, f"{where}, field {name!r}")
    if not row["answers"]:
        raise DataError(f"{where}, field 'answers': the list is empty.")
    spans = _prompt_spans(row.get("spans"), f"{where}, field 'spans'")
    return Prompt(where, **{name: row[name] for name in FIELDS}, spans=spans)


def _prompt_spans(value: Any, where: str) -> dict[str, dict[str, list[int]]] | None:
    """Those of both sides, which may have them together. Where they are is looked at later."""
    if value is None:
        return None
    sides: dict[str, Any] = dict.fromkeys(("clean", "corrupt"), value)
    if isinstance(value, dict) and any(isinstance(of, dict) for of in value.values()):
        sides = value
    if set(sides) != {"clean", "corrupt"}:
        raise DataError(
            f"{where} has spans of {list(sides)!s:.100}; expected those of 'clean' and "
            "'corrupt'."
        )
    for spans in sides.values():
        found = list(spans.values()) if isinstance(spans, dict) else []
        if (
            not found
            or not all(map(is_text, spans))
            or not all(
                isinstance(span, list) and len(span) == 2 and all(map(is_whole, span))
                for span in found
            )
        ):
            raise DataError(
                f"{where}: expected {{name: [its first token, the first token after it]}}; "
                f"got {spans!r:.100}."
            )
    return sides


def _span_names(prompts: list[Prompt], listed: Any, where: str) -> tuple[str, ...] | None:
    """The names of all spans, in order: those that the file lists, or that each prompt has."""
    if listed is None and not any(prompt.spans for prompt in prompts):
        return None
    for prompt in prompts:
        if prompt.spans is None:
            raise DataError(
                f"{prompt.where} has no field 'spans'; expected it in each prompt of a file "
                "that has spans."
            )
    if listed is not None:
        return _listed_names(prompts, listed, where)
    first = prompts[0]
    assert first.spans is not None
    names = tuple(first.spans["clean"])
    for place, found in _names_of_sides(prompts):
        for one, other in ((set(names) - found, "lacks"), (found - set(names), "has")):
            if one:
                raise DataError(
                    f"{place} {other} the span {min(one)!r:.100}, and the first prompt's are "
                    f'{list(names)!s:.200}. List all of them in the file\'s "span_names", in '
                    "order, if a prompt may lack some."
                )
    return names


def _listed_names(prompts: list[Prompt], listed: Any, where: str) -> tuple[str, ...]:
    is_list = isinstance(listed, list) and len(listed) > 0 and all(map(is_text, listed))
    if not is_list or len(set(listed)) < len(listed):
        raise DataError(
            f'{where}: "span_names" is {listed!r:.200}; expected a list of different texts.'
        )
    for place, found in _names_of_sides(prompts):
        unknown = found - set(listed)
        if unknown:
            raise DataError(
                f'{place} has the span {min(unknown)!r:.100}; the file\'s "span_names" are '
                f"{listed!s:.200}."
            )
    return tuple(listed)


def _names_of_sides(prompts: list[Prompt]) -> Iterator[tuple[str, set[str]]]:
    """(Which prompt and side, for errors; the names of its spans)"""
    for prompt in prompts:
        for side, spans in (prompt.spans or {}).items():
            yield f"{prompt.where}, field 'spans' ({side})", set(spans)


def _or_empty(values: Any) -> Any:
    return [] if values is None else values


def _check_spelling(found: dict[str, Any], known: Sequence[str], where: str) -> None:
    """Fields that may be missing must not be missed because they are misspelt."""
    for name in found:
        missing = [one for one in known if one not in found]
        like = difflib.get_close_matches(name, missing, n=1, cutoff=0.7)
        if like and name not in known:
            raise DataError(
                f"{where} has the unknown field {name!r:.100}. Did you mean {like[0]!r}?"
            )


def _check_side(value: Any, is_text: bool, where: str) -> None:
    """is_text: is the clean prompt a text?"""
    if isinstance(value, str):
        _check_text(value, where)
    elif not isinstance(value, list) or not value or not numbers_shape(value, where):
        kind = (
            "a text, as the clean prompt is, or a list of token ids"
            if is_text
            else "a list of numbers"
        )
        raise DataError(f"{where}: expected {kind}; got {value!r:.100}.")


def _check_answers(values: Any, is_text: bool, where: str) -> None:
    if not isinstance(values, list):
        kind = "texts and token ids" if is_text else "numbers"
        raise DataError(f"{where}: expected a list of {kind}; got {values!r:.100}.")
    if is_text or any(isinstance(value, str) for value in values):
        _check_texts([value for value in values if isinstance(value, str)], where)
        for value in values:
            if not isinstance(value, str) and not is_whole(value):
                raise DataError(
                    f"{where}: expected a list of texts and token ids; {value!r:.100} is "
                    "neither."
                )
    elif values:
        numbers_shape(values, where)


def _check_texts(values: list[str], where: str) -> None:
    if not is_text("".join(values)):  # one look at all: there may be many answers
        for value in values:
            _check_text(value, where)


def _check_text(value: str, where: str) -> None:
    if not is_text(value):
        raise DataError(
            f"{where}: the text {value!r:.100} has a lone surrogate, half of a character."
        )


def is_text(value: Any) -> bool:
    """Is it a text that can be encoded? JSON can also say half of a character."""
    if not isinstance(value, str):
        return False
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def is_whole(value: Any) -> bool:
    """Is it a whole number? True and 2.0 are none."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def numbers_shape(values: list[Any], where: str, depth: int = 1) -> tuple[int, ...]:
    """The shape of nested lists of numbers. Raises DataError for others and ragged ones."""
    if depth > MAX_DEPTH:
        raise DataError(f"{where}: lists are nested more than {MAX_DEPTH} deep.")
    shapes = set()
    for value in values:
        if isinstance(value, list):
            shapes.add(numbers_shape(value, where, depth + 1))
        elif isinstance(value, Real) and not isinstance(value, bool):
            shapes.add(())
        else:
            raise DataError(
                f"{where}: expected a list of numbers, all texts or none; {value!r:.100} "
                "is no number."
            )
    if len(shapes) > 1:
        raise DataError(
            f"{where}: the lists of numbers are ragged, with parts of shapes "
            f"{sorted(shapes)[:4]}; expected one shape."
        )
    return (len(values), *(shapes.pop() if shapes else ()))
