"""The prompts of the MIB circuit track: from the files of its data sets to prompt pairs.

What is read, and which rows count, is as the benchmark has it. A row has a `prompt`, the
`choices` of an answer, and for each kind of counterfactual a field `<kind>_counterfactual`
with the same fields again. The metric is the logit difference of an answer and a wrong one:

| task | data set `mib-bench/...` | counterfactual | answer | wrong answer |
|---|---|---|---|---|
| ioi | ioi | s2_io_flip | " " + metadata.indirect_object | " " + metadata.subject |
| mcqa | copycolors_mcqa (4_answer_choices) | symbol | choices.label[answerKey] | the same of the counterfactual |
| arithmetic_addition, arithmetic_subtraction | of the same name | random | label | label of the counterfactual |
| arc_easy, arc_challenge | of the same name | symbol | as mcqa | as mcqa |

The first token of an answer counts, and a row counts only if its answer and its wrong answer
(for ioi, also the name metadata.random_c) have equally many tokens; for arithmetic, one each,
a counterfactual, and the operator of the task. Circuits are found on the first rows of the
split train that count: 1000 for ioi, all for mcqa, 100 for the others; they are measured on
all rows of the split validation.

Source: Mueller et al. 2025, MIB (arXiv 2504.13151); the track's repository
(hannamw/MIB-circuit-track): `MIB_circuit_track/dataset.py` (fields, rows that count),
`MIB_circuit_track/utils.py` (data sets, names), `replicate.sh` (numbers of rows, splits).
"""  # noqa: E501

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from auto_circuit.checks import check_count, checked, shown
from auto_circuit.errors import ConfigError, DataError, near_matches, one_line
from auto_circuit.files import parse_json, read_bytes
from auto_circuit.prompt_files import Prompt, is_text, is_whole

HUB = "mib-bench"
"""Whose data sets they are on the Hugging Face hub."""

Split = Literal["train", "validation", "test"]


class Word(NamedTuple):
    """A text of a row, and the field that has it."""

    text: str
    field: str


@dataclass(frozen=True)
class MibPair:
    """A row of a data set, before it is known how a model's tokenizer splits it.

    where: file and row, for errors. fields: those of the two prompts. one_token: must an
    answer be one token? (Else the answers, and `alike`, must have equally many.)
    """

    where: str
    fields: str
    clean: str
    corrupt: str
    answer: Word
    wrong_answer: Word
    alike: tuple[Word, ...] = ()
    one_token: bool = False

    @property
    def words(self) -> tuple[Word, ...]:
        """The words whose numbers of tokens decide whether the row counts."""
        return (self.answer, self.wrong_answer, *self.alike)


@dataclass(frozen=True)
class MibTask:
    """A task of the benchmark. See the module for what is in its rows.

    name: with which it is asked for. dataset, subset: where its rows are. counterfactual:
    the field that the benchmark patches from. n_train: on how many prompts circuits are
    found; None: on all.
    """

    name: str
    dataset: str
    counterfactual: str
    n_train: int | None
    columns: tuple[str, ...]
    read_pair: Callable[[_Row, str], MibPair | None]
    subset: str | None = None

    @property
    def repository(self) -> str:
        """The data set's name on the Hugging Face hub."""
        return f"{HUB}/{self.dataset}"


# ----------------------------------------------------------------------- one row's pair


@dataclass(frozen=True)
class _Row:
    """A row of a file, whose fields are looked up by their path."""

    where: str
    content: Mapping[str, Any]

    def value(self, *path: str) -> Any:
        """Raises DataError, with file, row and field, if there is no such field."""
        value: Any = self.content
        for depth, name in enumerate(path):
            field = ".".join(path[: depth + 1])
            if not isinstance(value, Mapping):
                raise DataError(
                    f"{self.where}, field {'.'.join(path[:depth])!r}: expected an object "
                    f"with a field {name!r}; got {shown(value)}."
                )
            if name not in value:
                raise DataError(
                    f"{self.where} has no field {field!r}.{near_matches(name, value)}"
                )
            value = value[name]
        return value

    def text(self, *path: str) -> str:
        """Raises DataError for anything but a text that is not empty."""
        value = self.value(*path)
        if not is_text(value) or not value:
            raise self.error(path, f"expected a text; got {shown(value)}")
        return value

    def label(self, *path: str) -> Word:
        """A text or a number, as a text."""
        value = self.value(*path)
        if not is_whole(value):
            value = self.text(*path)
        return Word(str(value), ".".join(path))

    def choice(self, *path: str) -> Word:
        """The label that the row's `answerKey` means."""
        labels = self.value(*path, "choices", "label")
        key = self.value(*path, "answerKey")
        if not isinstance(labels, list) or not labels:
            field = (*path, "choices", "label")
            raise self.error(field, f"expected a list of texts; got {shown(labels)}")
        if not is_whole(key) or not 0 <= key < len(labels):
            raise self.error(
                (*path, "answerKey"),
                f"expected the place of an answer among {len(labels)} choices, from 0; "
                f"got {shown(key)}",
            )
        if not is_text(labels[key]) or not labels[key]:
            raise self.error(
                (*path, "choices", "label"),
                f"expected a list of texts; got {shown(labels)}",
            )
        return Word(labels[key], ".".join((*path, "choices", "label")))

    def error(self, path: Iterable[str], problem: str) -> DataError:
        """What is wrong with a field."""
        return DataError(f"{self.where}, field {'.'.join(path)!r}: {problem}.")

    def pair(self, counterfactual: str, answer: Word, wrong_answer: Word) -> MibPair:
        """The row's two prompts with their answers."""
        return MibPair(
            self.where,
            f"fields 'prompt' and '{counterfactual}.prompt'",
            self.text("prompt"),
            self.text(counterfactual, "prompt"),
            answer,
            wrong_answer,
        )


def _ioi_pair(row: _Row, counterfactual: str) -> MibPair:
    name, subject, other = (
        Word(f" {row.text('metadata', field)}", f"metadata.{field}")
        for field in ("indirect_object", "subject", "random_c")
    )
    return replace(row.pair(counterfactual, name, subject), alike=(other,))


def _choice_pair(row: _Row, counterfactual: str) -> MibPair:
    return row.pair(counterfactual, row.choice(), row.choice(counterfactual))


def _arithmetic_pair(row: _Row, counterfactual: str, operator: str) -> MibPair | None:
    """None for another operator, and for a row without a counterfactual."""
    other = row.value(counterfactual)
    has_prompt = other is not None and row.value(counterfactual, "prompt") is not None
    if row.text("operator") != operator or not has_prompt:
        return None
    answer, wrong_answer = row.label("label"), row.label(counterfactual, "label")
    return replace(row.pair(counterfactual, answer, wrong_answer), one_token=True)


MIB_TASKS: dict[str, MibTask] = {
    task.name: task
    for task in (
        MibTask(
            "ioi",
            "ioi",
            "s2_io_flip_counterfactual",
            1000,
            ("prompt", "metadata"),
            _ioi_pair,
        ),
        MibTask(
            "mcqa",
            "copycolors_mcqa",
            "symbol_counterfactual",
            None,
            ("prompt", "choices", "answerKey"),
            _choice_pair,
            subset="4_answer_choices",
        ),
        *(
            MibTask(
                name,
                name,
                "random_counterfactual",
                100,
                ("prompt", "label", "operator"),
                partial(_arithmetic_pair, operator=operator),
            )
            for name, operator in (
                ("arithmetic_addition", "+"),
                ("arithmetic_subtraction", "-"),
            )
        ),
        *(
            MibTask(
                name,
                name,
                "symbol_counterfactual",
                100,
                ("prompt", "choices", "answerKey"),
                _choice_pair,
            )
            for name in ("arc_easy", "arc_challenge")
        ),
    )
}
"""Name -> task."""

SHORT_NAMES = {"arithmetic": "arithmetic_addition", "arc": "arc_easy"}
"""Shorter names of tasks."""


@checked
def find_mib_task(name: str) -> MibTask:
    """The task with a name ("ioi", "mcqa", "arithmetic", "arc" ...).

    Raises ConfigError, with the nearest names, for others.
    """
    key = name.replace("-", "_")
    known = [*MIB_TASKS, *SHORT_NAMES]
    key = SHORT_NAMES.get(key, key)
    if key not in MIB_TASKS:
        raise ConfigError(
            f"The benchmark has no task {name!r:.100}.{near_matches(name, known)} Known: "
            f"{', '.join(known)}."
        )
    return MIB_TASKS[key]


# --------------------------------------------------------------------------- the files


@checked
def read_mib_pairs(
    task: MibTask,
    split: Split,
    folder: Path | str | None = None,
    counterfactual: str | None = None,
) -> list[MibPair]:
    """The rows of one split, in the order of its files; no model is needed.

    folder: holds the data set's files as the hub has them (.parquet, or .jsonl and .json
        with the same rows), or a folder of its name that does. None: the hub, or what
        was downloaded from there before.
    counterfactual: another field than the benchmark's, for example "abc_counterfactual".

    Raises DataError if the data set cannot be had, and for rows that are not as they must
    be, with file, row and field.
    """
    home = _hub_folder(task, split) if folder is None else _local_folder(task, folder)
    field = counterfactual or task.counterfactual
    pairs: list[MibPair] = []
    n_rows = 0
    for path in _split_files(task, split, home):
        for idx, row in enumerate(_rows(path, (*task.columns, field))):
            n_rows += 1
            pair = task.read_pair(_Row(f"{path}, row {idx}", row), field)
            pairs += [] if pair is None else [pair]
    if not pairs:
        raise DataError(
            f"The split {split!r} of {task.name!r} in {home} has {n_rows} rows, and none "
            "of them is one of this task with a counterfactual."
        )
    return pairs


def _hub_folder(task: MibTask, split: Split) -> Path:
    from huggingface_hub import snapshot_download

    try:
        found = snapshot_download(
            task.repository, repo_type="dataset", allow_patterns=[f"*{split}*"]
        )
    except Exception as error:  # hub, network and disk have errors of their own
        text = one_line(error) or type(error).__name__
        cause = text if len(text) < 120 else f"{text[:120]} ..."
        raise DataError(
            f"The prompts of {task.name!r} are the data set {task.repository} of the "
            f"Hugging Face hub, which cannot be had now ({cause}). Where there is a "
            f"network, type `hf download {task.repository} --repo-type dataset "
            "--local-dir FOLDER`, and give the folder here with `--data FOLDER`."
        ) from error
    return Path(found)


def _local_folder(task: MibTask, folder: Path | str) -> Path:
    folder = Path(folder).expanduser()
    try:
        if not folder.is_dir():
            found = "a file" if folder.exists() else "nothing"
            raise DataError(
                f"`data` is {str(folder)!r:.300}, where there is {found}; expected the "
                f"folder of the data set {task.repository}."
            )
        homes = (folder / HUB / task.dataset, folder / task.dataset)
        return next((home for home in homes if home.is_dir()), folder)
    except OSError as error:
        raise DataError(f"`data` is {str(folder)!r:.300}: {error}.") from None


def _split_files(task: MibTask, split: Split, home: Path) -> list[Path]:
    """Its files: "train-00000-of-00001.parquet", "train.jsonl"; of the subset, if any."""
    of_split = re.compile(rf"(?<![A-Za-z0-9]){split}(?![A-Za-z0-9])")
    paths = [path for path in sorted(home.rglob("*")) if path.suffix in _READERS]
    visible = [p for p in paths if not str(p.relative_to(home)).startswith(".")]
    files = [path for path in visible if of_split.search(path.name)]
    if task.subset is not None:
        others = [p for p in files if "_answer_choices" in str(p.relative_to(home))]
        of_subset = [p for p in others if task.subset in str(p.relative_to(home))]
        files = of_subset or [path for path in files if path not in others]
    if not files:
        subset = "" if task.subset is None else f", subset {task.subset!r}"
        names = [str(path.relative_to(home)) for path in visible][:8]
        raise DataError(
            f"There is no file of the split {split!r}{subset} of {task.repository} in "
            f"{home}; expected, for example, {split}-00000-of-00001.parquet or "
            f"{split}.jsonl. There are: {', '.join(names) or 'no such files at all'}. The "
            f"splits are {', '.join(get_args(Split))}."
        )
    return files


def _rows(path: Path, columns: Sequence[str]) -> list[dict[str, Any]]:
    """The rows of a file, which has the columns; others may be left out."""
    rows = _READERS[path.suffix](path, columns)
    for idx, row in enumerate(rows):
        if not isinstance(row, dict):
            raise DataError(f"{path}, row {idx} is {shown(row)}; expected an object.")
        for name in columns:
            if name not in row:
                raise _no_column(f"{path}, row {idx}", name, row)
    return rows


def _no_column(where: str, name: str, names: Collection[str]) -> DataError:
    return DataError(
        f"{where} has no field {name!r}.{near_matches(name, names)} It has: "
        f"{', '.join(names)}."
    )


def _parquet_rows(path: Path, columns: Sequence[str]) -> list[Any]:
    from pyarrow import ArrowException, parquet

    try:
        with parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            for name in columns:
                if name not in names:
                    raise _no_column(str(path), name, names)
            return file.read(columns=list(columns)).to_pylist()
    except (OSError, ArrowException) as error:
        raise DataError(f"{path} is damaged, or no parquet file: {error}.") from None


def _json_line_rows(path: Path, columns: Sequence[str]) -> list[Any]:
    lines = enumerate(_text(path).split("\n"), start=1)
    return [parse_json(line, f"{path}, line {n}") for n, line in lines if line.strip()]


def _json_rows(path: Path, columns: Sequence[str]) -> list[Any]:
    rows = parse_json(_text(path), str(path))
    if not isinstance(rows, list):
        raise DataError(f"{path} holds {shown(rows)}; expected a list of rows.")
    return rows


def _text(path: Path) -> str:
    try:
        return read_bytes(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not a text in UTF-8: {error}.") from None


_READERS: dict[str, Callable[[Path, Sequence[str]], list[Any]]] = {
    ".parquet": _parquet_rows,
    ".jsonl": _json_line_rows,
    ".json": _json_rows,
}


# ---------------------------------------------------------------- a tokenizer's prompts


@dataclass(frozen=True)
class MibPrompts:
    """The prompts that count for a tokenizer.

    n_left_out: the rows before the last of them that do not, and why the first one does not.
    """

    prompts: tuple[Prompt, ...]
    n_left_out: int = 0
    why: str | None = None


@checked
def mib_prompts(
    pairs: Sequence[MibPair], tokenizer: Any, n_prompts: int | None = None
) -> MibPrompts:
    """The first rows that count, as prompts whose answers are token ids.

    n_prompts: how many; None: all.

    Raises DataError if there are fewer, if there is none, and for an answer that the
    tokenizer does not know.
    """
    if n_prompts is not None:
        n_prompts = check_count("n_prompts", n_prompts)
    texts = list(dict.fromkeys(word.text for pair in pairs for word in pair.words))
    ids = tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []
    tokens: dict[str, list[int]] = dict(zip(texts, ids, strict=True))
    prompts: list[Prompt] = []
    reasons: list[str] = []
    for pair in pairs:
        if len(prompts) == n_prompts:
            break
        reason = _why_left_out(pair, tokens)
        if reason is None:
            prompts.append(_prompt(pair, tokens, tokenizer))
        else:
            reasons.append(reason)
    if not prompts or len(prompts) < (n_prompts or 0):
        raise DataError(
            f"{len(pairs)} rows, of which {len(prompts)} count for this model's tokenizer; "
            f"expected {n_prompts or 'at least 1'}."
            + (f" The first that does not: {reasons[0]}" if reasons else "")
        )
    return MibPrompts(tuple(prompts), len(reasons), reasons[0] if reasons else None)


def _why_left_out(pair: MibPair, tokens: Mapping[str, list[int]]) -> str | None:
    counts = [len(tokens[word.text]) for word in pair.words]
    right = 1 if pair.one_token else counts[0]
    if 0 not in counts and all(count == right for count in counts):
        return None
    found = ", ".join(
        f"{word.text!r} ({word.field}) has {count}"
        for word, count in zip(pair.words, counts, strict=True)
    )
    expected = "one" if pair.one_token else "equally many"
    return f"{pair.where}: answers must have {expected} tokens, but {found}."


def _prompt(pair: MibPair, tokens: Mapping[str, list[int]], tokenizer: Any) -> Prompt:
    for word in (pair.answer, pair.wrong_answer):
        first, unknown = tokens[word.text][0], tokenizer.unk_token_id
        if first == unknown and unknown != tokenizer.bos_token_id:
            raise DataError(
                f"{pair.where}, field {word.field!r}: the tokenizer does not know "
                f"{word.text!r:.100}."
            )
    return Prompt(
        f"{pair.where}, {pair.fields}",
        pair.clean,
        pair.corrupt,
        [tokens[pair.answer.text][0]],
        [tokens[pair.wrong_answer.text][0]],
    )
