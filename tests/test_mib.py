"""The MIB benchmark as one command, on local stand-ins of its data sets and models."""

from __future__ import annotations

import json
import re
import shutil
import signal
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch as t
from pyarrow import parquet
from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from auto_circuit import experiments, mib, mib_cells
from auto_circuit.circuit_files import load_mib_circuit
from auto_circuit.errors import AutoCircuitError, ConfigError, DataError
from auto_circuit.mib import (
    LoadedMib,
    MibResult,
    load_mib,
    run_mib,
)
from auto_circuit.mib_cells import finite_scores
from auto_circuit.mib_config import MibConfig
from auto_circuit.mib_prompts import (
    MIB_TASKS,
    MibPair,
    Word,
    find_mib_task,
    mib_prompts,
    read_mib_pairs,
)
from auto_circuit.prune import set_masks
from auto_circuit.store import DamagedCellWarning
from auto_circuit.tasks import POCKET_MODEL
from auto_circuit.types import PruneScores
from auto_circuit.utils.ablation_activations import src_ablations
from auto_circuit.utils.graph_utils import patch_mode
from auto_circuit.utils.patchable_model import PatchableModel
from tests.models import randomize
from tests.stored_cells import computed as computed
from tests.stored_cells import killed_in_second_cell

REPO = Path(__file__).parents[1]
NAMES = "Mary John Paul Anna Alice Simon".split()
COLORS = "red blue green gray".split()
LETTERS = "A B C D E F G H".split()
WORDS = (
    "<bos> <pad> <unk> After and arrived at the store , handed a drink to . is What color "
    "Answer : The + - = car box ? Question"
)
SHARES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)


# ------------------------------------------------------------------ stand-ins: the models


def _tokenizer() -> PreTrainedTokenizerFast:
    numbers = [str(number) for number in range(60)]
    words = dict.fromkeys([*WORDS.split(), *NAMES, *COLORS, *LETTERS, *numbers])
    inner = Tokenizer(WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = Split(Regex(r"\w+|[^\w\s]"), "removed", invert=True)
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token="<bos>",
        eos_token="<bos>",
        pad_token="<pad>",
        unk_token="<unk>",
    )


def save_model(folder: Path, model_class: Any, config: Any) -> Path:
    """A random model with a tokenizer, as `load_tl_model` takes it."""
    tokenizer = _tokenizer()
    config.vocab_size = len(tokenizer)
    model: PreTrainedModel = model_class(config)
    randomize(model)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def gpt2_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = GPT2Config(n_layer=2, n_head=2, n_embd=16, n_positions=32)
    return save_model(tmp_path_factory.mktemp("m") / "tiny-gpt2", GPT2LMHeadModel, config)


@pytest.fixture(scope="module")
def llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = LlamaConfig(
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        hidden_size=16,
        intermediate_size=16,
        max_position_embeddings=32,
    )
    folder = tmp_path_factory.mktemp("m") / "tiny-llama"
    return save_model(folder, LlamaForCausalLM, config)


# -------------------------------------------------------------- stand-ins: the data sets


def ioi_row(idx: int) -> dict[str, Any]:
    io, subject, other = (
        NAMES[(idx + step) % len(NAMES)] for step in (0, 1 + idx // 6, 4)
    )

    def text(second: str) -> str:
        return (
            f"After {io} and {subject} arrived at the store, {second} handed a drink to"
        )

    return {
        "template": "After {name_A} and {name_B} arrived at the {place}, ...",
        "metadata": {"indirect_object": io, "subject": subject, "random_c": other},
        "prompt": text(subject),
        "choices": [io, subject],
        "answerKey": 0,
        "abc_counterfactual": {
            "prompt": text(other),
            "choices": [io, subject],
            "answerKey": 0,
        },
        "s2_io_flip_counterfactual": {
            "prompt": text(io),
            "choices": [subject, io],
            "answerKey": 0,
        },
    }


def choice_row(idx: int) -> dict[str, Any]:
    color, key = COLORS[idx % 4], idx % 3

    def question(labels: Sequence[str]) -> dict[str, Any]:
        texts = [COLORS[(idx + step) % 4] for step in (1, 2, 3)]
        texts[key] = color
        listed = " ".join(". ".join(choice) for choice in zip(labels, texts, strict=True))
        return {
            "prompt": f"The car is {color}. What color is the car? {listed} Answer:",
            "choices": {"label": list(labels), "text": texts},
            "answerKey": key,
        }

    return {
        **question(LETTERS[:3]),
        "symbol_counterfactual": question(LETTERS[3:6]),
        "color_counterfactual": question(LETTERS[:3]),
    }


def arithmetic_row(idx: int) -> dict[str, Any]:
    one, two, three, four = 10 + idx, 12, 30 - idx % 7, 9
    operator = "+" if idx % 4 else "-"

    def sum_of(a: int, b: int) -> dict[str, Any]:
        label = a + b if operator == "+" else a - b
        return {"prompt": f"What is {a} {operator} {b}? Answer:", "label": str(label)}

    row: dict[str, Any] = {**sum_of(one, two), "operator": operator}
    row["random_counterfactual"] = sum_of(three, four) if idx % 5 else None
    return row


ROWS = {
    "ioi": ioi_row,
    "copycolors_mcqa": choice_row,
    "arithmetic_addition": arithmetic_row,
    "arithmetic_subtraction": arithmetic_row,
    "arc_easy": choice_row,
    "arc_challenge": choice_row,
}


def write_data(
    home: Path, dataset: str, n_rows: int = 24, suffix: str = ".parquet"
) -> Path:
    """The files of a data set, laid out as on the hub."""
    subset = "4_answer_choices" if dataset == "copycolors_mcqa" else "data"
    folder = home / dataset / subset
    folder.mkdir(parents=True)
    for split, start in (("train", 0), ("validation", 3), ("test", 5)):
        rows = [ROWS[dataset](idx) for idx in range(start, start + n_rows)]
        if suffix == ".parquet":
            path = folder / f"{split}-00000-of-00001.parquet"
            parquet.write_table(pa.Table.from_pylist(rows), path)
        else:
            text = "".join(json.dumps(row) + "\n" for row in rows)
            (folder / f"{split}.jsonl").write_text(text)
    return home


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("data")
    for dataset in ROWS:
        write_data(home, dataset)
    return home


# ----------------------------------------------------------------------- the prompts


def test_the_benchmark_names_its_tasks() -> None:
    """As in its repository: data set, counterfactual, rows on which circuits are found."""
    found = {
        name: (task.repository, task.subset, task.counterfactual, task.n_train)
        for name, task in MIB_TASKS.items()
    }
    symbol, random = "symbol_counterfactual", "random_counterfactual"
    assert found == {
        "ioi": ("mib-bench/ioi", None, "s2_io_flip_counterfactual", 1000),
        "mcqa": ("mib-bench/copycolors_mcqa", "4_answer_choices", symbol, None),
        "arithmetic_addition": ("mib-bench/arithmetic_addition", None, random, 100),
        "arithmetic_subtraction": ("mib-bench/arithmetic_subtraction", None, random, 100),
        "arc_easy": ("mib-bench/arc_easy", None, symbol, 100),
        "arc_challenge": ("mib-bench/arc_challenge", None, symbol, 100),
    }
    for name, full_name in (
        ("arithmetic", "arithmetic_addition"),
        ("arc", "arc_easy"),
        ("arc-challenge", "arc_challenge"),
    ):
        assert find_mib_task(name) is MIB_TASKS[full_name]


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl"])
@pytest.mark.parametrize(
    ("name", "clean", "corrupt", "answer", "wrong"),
    [
        (
            "ioi",
            "After Mary and John arrived at the store, John handed a drink to",
            "After Mary and John arrived at the store, Mary handed a drink to",
            Word(" Mary", "metadata.indirect_object"),
            Word(" John", "metadata.subject"),
        ),
        (
            "mcqa",
            "The car is red. What color is the car? A. red B. green C. gray Answer:",
            "The car is red. What color is the car? D. red E. green F. gray Answer:",
            Word("A", "choices.label"),
            Word("D", "symbol_counterfactual.choices.label"),
        ),
        (
            "arithmetic",
            "What is 11 + 12? Answer:",
            "What is 29 + 9? Answer:",
            Word("23", "label"),
            Word("38", "random_counterfactual.label"),
        ),
        (
            "arithmetic_subtraction",
            "What is 14 - 12? Answer:",
            "What is 26 - 9? Answer:",
            Word("2", "label"),
            Word("17", "random_counterfactual.label"),
        ),
        (
            "arc",
            "The car is red. What color is the car? A. red B. green C. gray Answer:",
            "The car is red. What color is the car? D. red E. green F. gray Answer:",
            Word("A", "choices.label"),
            Word("D", "symbol_counterfactual.choices.label"),
        ),
    ],
)
def test_the_first_pair_of_each_task(
    tmp_path: Path,
    suffix: str,
    name: str,
    clean: str,
    corrupt: str,
    answer: Word,
    wrong: Word,
) -> None:
    task = find_mib_task(name)
    write_data(tmp_path, task.dataset, n_rows=6, suffix=suffix)
    # A folder of all data sets, one data set's, and one with other files beside it.
    (tmp_path / task.dataset / "README.md").write_text("train")
    for folder in (tmp_path, tmp_path / task.dataset):
        pairs = read_mib_pairs(task, "train", folder)
        found = pairs[0]
        assert (found.clean, found.corrupt) == (clean, corrupt)
        assert (found.answer, found.wrong_answer) == (answer, wrong)
    # Of 6 rows, 0 and 4 subtract, and 0 and 5 have no counterfactual.
    n_pairs = {"arithmetic": 3, "arithmetic_subtraction": 1}
    assert len(pairs) == n_pairs.get(name, 6)


def test_another_counterfactual(data: Path) -> None:
    pair, *_ = read_mib_pairs(find_mib_task("ioi"), "test", data, "abc_counterfactual")
    assert pair.corrupt != pair.clean and pair.fields.endswith(
        "'abc_counterfactual.prompt'"
    )


class LetterTokenizer:
    """A token for each letter; it does not know "Z"."""

    unk_token_id = 0
    bos_token_id = 1

    def __call__(self, texts: list[str], add_special_tokens: bool) -> dict[str, Any]:
        assert not add_special_tokens
        return {
            "input_ids": [
                [0 if c == "Z" else 2 + ord(c) for c in text.strip()] for text in texts
            ]
        }


def _pair(answer: str, wrong: str, *alike: str, one_token: bool = False) -> MibPair:
    words = [Word(text, f"field {i}") for i, text in enumerate((answer, wrong, *alike))]
    return MibPair(
        f"row of {answer}", "fields 'a' and 'b'", "x", "y", words[0], words[1],
        tuple(words[2:]), one_token,
    )  # fmt: skip


def test_rows_that_count_are_those_of_the_benchmark() -> None:
    pairs = [
        _pair(" Ann", " Bo", " Cem"),
        _pair(" Ann", " Bob", " Cemal"),
        _pair(" Ann", " Bob", " Cem"),
        _pair(" Di", " Ed", " Fa"),
    ]
    found = mib_prompts(pairs, LetterTokenizer())
    # Of answers of several tokens the first one counts.
    assert [(p.answers, p.wrong_answers) for p in found.prompts] == [
        ([2 + ord("A")], [2 + ord("B")]),
        ([2 + ord("D")], [2 + ord("E")]),
    ]
    assert found.n_left_out == 2
    assert found.why == (
        "row of  Ann: answers must have equally many tokens, but ' Ann' (field 0) has 3, "
        "' Bo' (field 1) has 2, ' Cem' (field 2) has 3."
    )
    first = mib_prompts(pairs, LetterTokenizer(), 1)
    assert first.prompts == found.prompts[:1] and first.n_left_out == 2
    assert (
        len(mib_prompts([_pair("5", "6", one_token=True)], LetterTokenizer()).prompts)
        == 1
    )
    with pytest.raises(DataError, match="2 rows, of which 1 count .* expected 2. .*'16'"):
        pairs = [_pair("5", "16", one_token=True), _pair("5", "6", one_token=True)]
        mib_prompts(pairs, LetterTokenizer(), 2)
    with pytest.raises(
        DataError, match=r"row of 55: answers must have one tokens?, but '55' \(field 0\)"
    ):
        mib_prompts([_pair("55", "66", one_token=True)], LetterTokenizer())
    with pytest.raises(DataError, match="row of A, field 'field 1': .* not know 'Z'"):
        mib_prompts([_pair("A", "Z")], LetterTokenizer())


# ------------------------------------------------------------------------- bad prompts


def _broken(tmp_path: Path, dataset: str, change: Any, suffix: str = ".jsonl") -> Path:
    """A data set whose train row 1 was changed."""
    write_data(tmp_path, dataset, n_rows=8, suffix=suffix)
    (path,) = tmp_path.rglob("train*")
    if suffix == ".jsonl":
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        change(rows[1])
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        rows = parquet.read_table(path).to_pylist()
        for row in rows:
            change(row)
        parquet.write_table(pa.Table.from_pylist(rows), path)
    return tmp_path


def _rename(row: dict[str, Any], old: str, new: str) -> None:
    row[new] = row.pop(old)


@pytest.mark.parametrize(
    ("dataset", "change", "text"),
    [
        (
            "ioi",
            lambda row: _rename(row, "s2_io_flip_counterfactual", "s2_io_counterfactual"),
            r"train.jsonl, row 1 has no field 's2_io_flip_counterfactual'. Did you mean "
            "'s2_io_counterfactual'",
        ),
        (
            "ioi",
            lambda row: _rename(row["metadata"], "subject", "subjects"),
            "train.jsonl, row 1 has no field 'metadata.subject'. Did you mean 'subjects'",
        ),
        (
            "ioi",
            lambda row: row.update(s2_io_flip_counterfactual=None),
            "row 1, field 's2_io_flip_counterfactual': expected an object",
        ),
        (
            "ioi",
            lambda row: row["metadata"].update(random_c=7),
            "row 1, field 'metadata.random_c': expected a text; got 7",
        ),
        (
            "copycolors_mcqa",
            lambda row: row.update(answerKey="A"),
            "row 1, field 'answerKey': expected the place of an answer among 3 .* got 'A'",
        ),
        (
            "copycolors_mcqa",
            lambda row: row["symbol_counterfactual"].update(answerKey=3),
            "row 1, field 'symbol_counterfactual.answerKey': expected the place .* got 3",
        ),
        (
            "arc_easy",
            lambda row: row["choices"].update(label=[]),
            "row 1, field 'choices.label': expected a list of texts",
        ),
        (
            "arithmetic_addition",
            lambda row: row.update(label=2.5),
            "row 1, field 'label': expected a text; got 2.5",
        ),
    ],
)
def test_rows_that_are_not_as_they_must_be(
    tmp_path: Path, dataset: str, change: Any, text: str
) -> None:
    (task,) = (task for task in MIB_TASKS.values() if task.dataset == dataset)
    with pytest.raises(DataError, match=text):
        read_mib_pairs(task, "train", _broken(tmp_path, dataset, change))


def test_a_column_that_no_row_has(tmp_path: Path) -> None:
    def change(row: dict[str, Any]) -> None:
        _rename(row, "s2_io_flip_counterfactual", "s2_flip_counterfactual")

    home = _broken(tmp_path, "ioi", change, ".parquet")
    with pytest.raises(
        DataError,
        match="train-00000-of-00001.parquet has no field 's2_io_flip_counterfactual'. Did "
        "you mean 's2_flip_counterfactual'",
    ):
        read_mib_pairs(find_mib_task("ioi"), "train", home)


def test_files_that_are_not_there_or_damaged(tmp_path: Path) -> None:
    ioi, mcqa = find_mib_task("ioi"), find_mib_task("mcqa")
    with pytest.raises(DataError, match="there is nothing; expected the folder of"):
        read_mib_pairs(ioi, "train", tmp_path / "no")
    with pytest.raises(DataError, match="no file of the split 'train' .* no such files"):
        read_mib_pairs(ioi, "train", tmp_path)
    write_data(tmp_path, "ioi")
    # As `hf download --local-dir` leaves them.
    (tmp_path / "ioi" / ".cache").mkdir()
    (tmp_path / "ioi" / ".cache" / "train.json").write_text("damaged")
    assert len(read_mib_pairs(ioi, "train", tmp_path)) == 24
    (path,) = tmp_path.rglob("train-*.parquet")
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(DataError, match="train-00000-of-00001.parquet is damaged, or no"):
        read_mib_pairs(ioi, "train", tmp_path)
    path.unlink()
    with pytest.raises(
        DataError, match="split 'train' of mib-bench/ioi .*There are: .*test"
    ):
        read_mib_pairs(ioi, "train", tmp_path)
    folder = write_data(tmp_path, "copycolors_mcqa") / "copycolors_mcqa"
    (folder / "4_answer_choices").rename(folder / "5_answer_choices")
    with pytest.raises(DataError, match="split 'train', subset '4_answer_choices'"):
        read_mib_pairs(mcqa, "train", tmp_path)


def test_without_a_network_it_says_what_to_type(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(SystemExit) as stop:
        experiments.main(["mib", "--model", "nowhere", "--task", "arc"])
    text = str(stop.value.code)
    assert "\n" not in text and text.startswith("DataError: The prompts of 'arc_easy'")
    command = "hf download mib-bench/arc_easy --repo-type dataset --local-dir FOLDER"
    assert command in text and "--data FOLDER" in text


def test_the_hub_gives_the_files_of_a_split(
    monkeypatch: pytest.MonkeyPatch, data: Path
) -> None:
    import huggingface_hub

    asked = []

    def snapshot_download(repo_id: str, **options: Any) -> str:
        asked.append((repo_id, options))
        return str(data / "ioi")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    pairs = read_mib_pairs(find_mib_task("ioi"), "validation")
    assert pairs == read_mib_pairs(find_mib_task("ioi"), "validation", data)
    options = {"repo_type": "dataset", "allow_patterns": ["*validation*"]}
    assert asked == [("mib-bench/ioi", options)]


# ------------------------------------------------------------------------ the whole run


def pocket_row(prompt: dict[str, Any]) -> dict[str, Any]:
    """A prompt of the pocket model as a row of the benchmark."""
    (name,), (subject,) = prompt["answers"], prompt["wrong_answers"]
    before, _, after = prompt["clean"].rpartition(subject)
    return {
        "metadata": {
            "indirect_object": name.strip(),
            "subject": subject.strip(),
            "random_c": "Mary",
        },
        "prompt": prompt["clean"],
        "s2_io_flip_counterfactual": {"prompt": before + name + after},
    }


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("ioi")
    prompts = json.loads((REPO / "datasets/pocket/ioi_prompts.json").read_text())
    rows = [json.dumps(pocket_row(prompt)) + "\n" for prompt in prompts["prompts"][:60]]
    (folder / "train.jsonl").write_text("".join(rows[:20]))
    (folder / "validation.jsonl").write_text("".join(rows[20:]))
    config = MibConfig(
        model=str(POCKET_MODEL),
        task="ioi",
        algos=("EAP",),
        data=folder,
        n_test=20,
        out=folder / "out",
    )
    return config, load_mib(config)


def _edges_of_mib(n_layers: int, n_heads: int) -> int:
    """Every source before a destination, which has q, k and v for each head."""
    return sum(
        (1 + layer * (n_heads + 1)) * 3 * n_heads + (1 + layer * (n_heads + 1) + n_heads)
        for layer in range(n_layers)
    ) + (1 + n_layers * (n_heads + 1))


def test_the_loaded_task(loaded: tuple[MibConfig, LoadedMib]) -> None:
    config, one = loaded
    assert one.task.model.n_edges == _edges_of_mib(4, 8) == 1519
    assert _edges_of_mib(12, 12) == 32491  # as the benchmark's paper says of GPT-2
    assert one.task.train_loader.n_prompts == 20 and one.train.n_left_out == 0
    batch = next(iter(one.task.test_loader))
    assert config.data is not None
    row = json.loads((config.data / "validation.jsonl").read_text().split("\n")[0])
    first = one.task.model.to_string(batch.clean[0]).replace("<pad>", "").split()
    assert first[0] == "<bos>" and first[1:] == re.findall(r"\w+|[^\w\s]", row["prompt"])
    names = row["metadata"]
    assert one.task.model.to_string(batch.answers[0]) == names["indirect_object"]
    assert one.task.model.to_string(batch.wrong_answers[0]) == names["subject"]
    few = load_mib(replace(config, n_train=5, n_test=3))
    assert (few.task.train_loader.n_prompts, few.task.test_loader.n_prompts) == (5, 3)


def _connected(edges: set[tuple[str, str]]) -> set[tuple[str, str]]:
    """Take out edges whose source nothing reaches, or whose destination leads nowhere."""

    def node(name: str) -> str:
        return re.sub(r"\.[QKV]$", "", name)

    while True:
        written = {node(dest) for _, dest in edges} | {"Resid Start"}
        read = {src for src, _ in edges} | {"Resid End"}
        kept = {(s, d) for s, d in edges if s in written and node(d) in read}
        if kept == edges:
            return edges
        edges = kept


def _by_hand(
    model: PatchableModel, loader: Any, scores: PruneScores, is_signed: bool
) -> tuple[list[int], list[float], list[float]]:
    """Weighted edge counts, faithfulness and accuracy at the benchmark's sizes."""
    places = {
        (edge.src.name, edge.dest.name): (edge.dest.module_name, edge.patch_idx)
        for edge in model.edges
    }
    value = {name: float(scores[at][idx]) for name, (at, idx) in places.items()}
    order = sorted(value, key=lambda e: value[e] if is_signed else abs(value[e]))[::-1]
    sizes = [0, *(int(share * len(order)) for share in SHARES)]
    circuits = [_connected(set(order[:size])) for size in sizes]
    diffs: list[list[float]] = [[] for _ in circuits]
    for batch in loader:
        inputs, kwargs = batch.model_input("clean")
        patch = src_ablations(model, batch.corrupt)
        with t.no_grad(), patch_mode(model, patch):
            for kept, of_circuit in zip(circuits, diffs, strict=True):
                masks = model.new_prune_scores(1.0)
                for at, idx in map(places.__getitem__, kept):
                    masks[at][idx] = 0.0
                set_masks(model, masks)
                logits = model(inputs, **kwargs)[:, -1].double()
                both = [logits.gather(1, a) for a in (batch.answers, batch.wrong_answers)]
                of_circuit += (both[0] - both[1]).flatten().tolist()
    nothing, *others = (float(np.mean(of_circuit)) for of_circuit in diffs)
    return (
        [len(kept) for kept in circuits[1:]],
        [(mean - nothing) / (others[-1] - nothing) for mean in others],
        [100 * float(np.mean(np.array(of_circuit) > 0)) for of_circuit in diffs[1:]],
    )


def test_numbers_by_hand(loaded: tuple[MibConfig, LoadedMib]) -> None:
    """CPR, CMD, accuracy area and weighted edge counts, from single patched edges."""
    _, one = loaded
    model, loader = one.task.model, one.task.test_loader
    (eap,) = mib.iter_mib(one)
    assert isinstance(eap, MibResult)
    counts, f, accuracies = _by_hand(model, loader, eap.found.scores, True)
    assert [p.share for p in eap.signed] == list(SHARES)
    assert [p.weighted_edge_count for p in eap.signed] == counts
    assert counts[3] < int(SHARES[3] * 1519)  # there are dead ends
    assert [p.faithfulness for p in eap.signed] == pytest.approx(f, abs=1e-4)
    cpr = sum(np.diff(SHARES) * (np.array(f[1:]) + f[:-1]) / 2)
    assert eap.cpr == pytest.approx(cpr, abs=1e-4) and cpr > 0.5
    logs = np.log10([int(share * 1519) for share in SHARES])
    heights = np.array(accuracies[1:]) + accuracies[:-1]
    area = sum(np.diff(logs) * heights / 2) / (logs[-1] - logs[0])
    assert eap.accuracy_area == pytest.approx(area)
    assert len(set(accuracies)) > 1 and 50 < area < 100
    counts, f, _ = _by_hand(model, loader, eap.found.scores, False)
    assert [p.weighted_edge_count for p in eap.absolute] == counts
    off = np.abs(1 - np.array(f))
    cmd = sum(np.diff(SHARES) * (off[1:] + off[:-1]) / 2)
    assert eap.cmd == pytest.approx(cmd, abs=1e-5) and cmd > 0.002


def test_one_command(
    gpt2_folder: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What it prints and writes; the model is a local folder."""
    args = ["mib", "--model", str(gpt2_folder), "--task", "ioi", "--data", str(data)]
    args += ["--algos", "EAP", "Random", "--out", str(tmp_path), "--n-test", "12"]
    experiments.main(args)
    printed = capsys.readouterr().out
    for word in ("CPR", "CMD", "Accuracy area", "Weighted edge counts", "EAP", "Random"):
        assert word in printed
    (folder,) = tmp_path.glob("mib-*")
    assert re.fullmatch("mib-ioi_tiny-gpt2-[0-9a-f]{8}", folder.name)
    files = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    assert files == {
        "config.json",
        "measurements.parquet",
        "submission/EAP_patching_edge/ioi_tiny-gpt2/importances.json",
        "submission/Random_patching_edge/ioi_tiny-gpt2/importances.json",
        "summary.csv",
    }
    config = MibConfig(
        model=str(gpt2_folder),
        data=data,
        algos=("EAP", "Random"),
        n_test=12,
        out=tmp_path,
    )
    assert config.folder == folder
    loaded = load_mib(config)
    results = [result for result in mib.iter_mib(loaded) if isinstance(result, MibResult)]
    summary = pd.read_csv(folder / "summary.csv")
    assert list(summary["algorithm"]) == ["EAP", "Random"]
    assert set(summary["task"]) == {"ioi"} and set(summary["model"]) == {"tiny-gpt2"}
    for column in ("cpr", "cmd", "accuracy_area"):
        expected = [getattr(result, column) for result in results]
        assert list(summary[column]) == expected  # what is stored is what is computed
        assert f"{expected[0]:.3f}"[:5] in printed or column == "accuracy_area"
    rows = pd.read_parquet(folder / "measurements.parquet")
    assert len(rows) == 2 * 2 * len(SHARES)
    signed = rows[(rows.algorithm == "EAP") & (rows.ranking == "signed")]
    counts = [point.weighted_edge_count for point in results[0].signed]
    assert list(signed["weighted_edge_count"]) == counts
    # What is submitted says the same scores, of the same edges.
    for result in results:
        path = folder / "submission" / f"{result.found.name}_patching_edge"
        (file,) = path.rglob("importances.json")
        read = load_mib_circuit(file, loaded.task.model)
        for name, scores in result.found.scores.items():
            assert t.equal(read[name], scores) and bool((scores != 0).any())


def test_grouped_queries_have_the_benchmarks_graph(
    llama_folder: Path, data: Path, tmp_path: Path
) -> None:
    config = MibConfig(
        model=str(llama_folder), task="mcqa", data=data, algos=("EAP",), out=tmp_path
    )
    loaded = load_mib(config)
    assert loaded.task.model.n_edges == _edges_of_mib(2, 4)
    (result,) = mib.iter_mib(loaded)
    assert isinstance(result, MibResult)
    assert result.signed[-1].weighted_edge_count == _edges_of_mib(2, 4)
    assert result.signed[-1].faithfulness == pytest.approx(1)
    assert config.cell == "mcqa_tiny-llama"


@pytest.mark.slow
@pytest.mark.parametrize(
    "task", ["arithmetic", "arithmetic_subtraction", "arc_challenge"]
)
def test_the_other_tasks(
    gpt2_folder: Path, data: Path, tmp_path: Path, task: str
) -> None:
    config = MibConfig(
        model=str(gpt2_folder), task=task, data=data, algos=("EAP",), out=tmp_path
    )
    (result,) = run_mib(config)
    assert isinstance(result, MibResult) and 0 < result.accuracy_area < 100
    assert config.cell.startswith(find_mib_task(task).name.replace("_", "-") + "_")


def test_an_algorithm_that_fails_does_not_stop_the_others(
    gpt2_folder: Path,
    data: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    found = mib.find_scores

    def failing(task: Any, algo: Any) -> Any:
        if algo.key == "Random":
            raise RuntimeError("CUDA out of memory.\nTried to allocate 7 GiB")
        return found(task, algo)

    monkeypatch.setattr(mib, "find_scores", failing)
    args = ["mib", "--model", str(gpt2_folder), "--data", str(data), "--n-test", "4"]
    with pytest.raises(
        SystemExit, match="1 of 2 algorithms failed: Random: RuntimeError"
    ):
        experiments.main([*args, "--algos", "Random", "EAP", "--out", str(tmp_path)])
    assert "EAP" in capsys.readouterr().out
    (summary,) = tmp_path.rglob("summary.csv")
    assert list(pd.read_csv(summary)["algorithm"]) == ["EAP"]


# ------------------------------------------------------------------- what has been computed


@pytest.fixture
def command(gpt2_folder: Path, data: Path, tmp_path: Path) -> list[str]:
    """A run of two algorithms, with results in `tmp_path`."""
    return run_command(gpt2_folder, data, tmp_path)


def run_command(model: Path, data: Path, out: Path) -> list[str]:
    args = ["mib", "--model", str(model), "--data", str(data), "--n-train", "6"]
    return [*args, *"--n-test 4 --algos EAP Random --out".split(), str(out)]


def result_files(out: Path) -> dict[str, bytes]:
    """What the run has written for people, and the leaderboard."""
    (folder,) = out.glob("mib-*")
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(out)): path.read_bytes() for path in paths}


@pytest.fixture(scope="module")
def finished(
    gpt2_folder: Path, data: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """What a run has left in its `out`."""
    out = tmp_path_factory.mktemp("finished")
    experiments.main(run_command(gpt2_folder, data, out))
    return out


KINDS = ("scores", "measurements", "submission")


def label(algo: str, kind: str) -> str:
    return f"ioi_tiny-gpt2, {algo}: {kind}"


def test_nothing_is_computed_twice(
    command: list[str],
    finished: Path,
    computed: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    gpt2_folder: Path,
    tmp_path: Path,
) -> None:
    """And the model does not even load; the place of prompts and model is nothing."""
    shutil.copytree(finished / "cells", tmp_path / "cells")
    with monkeypatch.context() as context:
        context.setattr(mib_cells, "load_mib", None)
        experiments.main(command)
    assert computed == [] and result_files(tmp_path) == result_files(finished)
    assert "6 of 6 cells were stored" in capsys.readouterr().out
    moved = tmp_path / "elsewhere" / "tiny-gpt2"
    shutil.copytree(gpt2_folder, moved)
    other = [str(moved) if word == str(gpt2_folder) else word for word in command]
    experiments.main([*other, "--force", "--only", "EAP"])
    assert computed == [label("EAP", kind) for kind in KINDS]


@pytest.mark.parametrize(
    ("change", "n_same"),
    [
        ({"file_format": "pt"}, 4),
        ({"n_test": 5}, 4),
        ({"split": "test"}, 4),
        ({"n_train": 7}, 0),
        ({"batch_size": 3}, 0),
        ({"seed": 7}, 0),
        ({"dtype": "float64"}, 0),
        ({"counterfactual": "abc_counterfactual"}, 0),
        ({"task": "mcqa"}, 0),
        ({"model": "llama"}, 0),
        ({"algos": ("EAP", "Act Mag")}, 3),
        ({"device": "cpu"}, 6),
    ],
    ids=str,
)
def test_what_changes_a_cell(
    command: list[str], llama_folder: Path, change: dict[str, Any], n_same: int
) -> None:
    _, config, _ = experiments.parse(command)
    if "model" in change:
        change = {"model": str(llama_folder)}
    keys, other = (
        {work.cell.key for one in mib_cells.mib_cells(config) for work in one.works}
        for config in (config, replace(config, **change))
    )
    assert len(keys) == 6 and len(keys & other) == n_same


@pytest.mark.slow
def test_a_killed_run_goes_on(
    command: list[str], computed: list[str], tmp_path: Path
) -> None:
    """After each of its cells; the files are those of a run that is left alone."""
    whole = [*command[:-1], str(tmp_path / "whole")]
    experiments.main(whole)
    del computed[:]
    for n_cells in range(1, 6):
        assert killed_in_second_cell(command) == -signal.SIGKILL
        assert len(list((tmp_path / "cells").glob("mib-*/*.json"))) == n_cells
    assert computed == []  # these were other processes
    experiments.main(command)
    assert computed == ["ioi_tiny-gpt2, Random: submission"]

    def without_seconds(files: dict[str, bytes]) -> dict[str, bytes]:
        return {n: c for n, c in files.items() if not n.endswith("summary.csv")}

    assert without_seconds(result_files(tmp_path)) == without_seconds(
        result_files(tmp_path / "whole")
    )


def test_an_interruption_says_what_is_kept(
    command: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    measure = mib_cells.mib_curves

    def interrupted(loaded: Any, found: Any) -> Any:
        if found.name == "Random":
            raise KeyboardInterrupt
        return measure(loaded, found)

    monkeypatch.setattr(mib_cells, "mib_curves", interrupted)
    with pytest.raises(SystemExit) as stop:
        experiments.main(command)
    assert stop.value.code == experiments.INTERRUPTED
    *_, line = capsys.readouterr().err.splitlines()
    assert f"4 of 6 cells are finished, and kept in {tmp_path / 'cells'}" in line
    assert list(pd.read_csv(next(tmp_path.rglob("summary.csv"))).algorithm) == ["EAP"]


def test_damage_is_found(
    command: list[str], finished: Path, computed: list[str], tmp_path: Path
) -> None:
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    for path in next(tmp_path.glob("mib-*")).rglob("*.*"):
        path.write_bytes(b"damaged")
    for kind, suffix in zip(
        KINDS, ("safetensors", "parquet", "safetensors"), strict=True
    ):
        path = next((tmp_path / "cells" / f"mib-{kind}").glob(f"*.{suffix}"))
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    with pytest.warns(DamagedCellWarning) as caught:
        experiments.main(command)
    assert sorted(one.split(": ")[1] for one in computed) == sorted(KINDS)
    said = {str(w.message) for w in caught if w.category is DamagedCellWarning}
    for kind in KINDS:
        assert any(f": {kind} is computed again: the file" in text for text in said)
    after, before = result_files(tmp_path), result_files(finished)
    assert after.keys() == before.keys()
    for name in after:  # but for the seconds that scores took
        assert after[name] == before[name] or name.endswith("summary.csv")


def test_options_that_make_no_sense(command: list[str]) -> None:
    for options, text in (
        (["--only", "EPA"], "`only` names 'EPA'.* Did you mean 'EAP'"),
        (["--workers", "-1"], "`workers` is -1"),
    ):
        with pytest.raises(SystemExit, match=text):
            experiments.main([*command, *options])


def test_infinite_scores_can_be_submitted() -> None:
    scores = {"a": t.tensor([1.0, t.inf, -3.0]), "b": t.tensor([-t.inf, 0.0])}
    found = finite_scores(scores)
    assert found["a"].tolist() == [1, 7, -3] and found["b"].tolist() == [-7, 0]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"task": "mqca"}, "The benchmark has no task 'mqca'. Did you mean 'mcqa'"),
        ({"algos": ("EPA",)}, "There is no .*'EPA'.* Did you mean .*'EAP'"),
        ({"algos": ()}, "expected at least one algorithm"),
        ({"algos": ("EAP", "EAP")}, "each once"),
        ({"algos": ("GT",)}, "'GT' needs true edges"),
        ({"n_test": 0}, "`n_test` is 0"),
        ({"batch_size": 0}, "`batch_size` is 0"),
        ({"device": "abacus"}, "`device` is 'abacus'"),
        ({"out": Path(__file__)}, "Results cannot be written"),
        ({"model": ""}, "`model` is empty"),
    ],
)
def test_configurations_that_make_no_sense(
    tmp_path: Path, change: dict[str, Any], text: str
) -> None:
    config = replace(MibConfig(model="m", data=tmp_path, out=tmp_path), **change)
    with pytest.raises(ConfigError, match=text):
        load_mib(config)


def test_models_and_prompts_that_do_not_fit(
    gpt2_folder: Path, data: Path, tmp_path: Path
) -> None:
    config = MibConfig(
        model=str(gpt2_folder), data=data, algos=("EAP",), out=tmp_path / "out"
    )
    with pytest.raises(AutoCircuitError, match="there is nothing"):
        load_mib(replace(config, model=str(tmp_path / "no-model")))
    with pytest.raises(
        DataError, match="Split 'validation' of 'ioi': 24 rows, of which 24"
    ):
        load_mib(replace(config, n_test=25))

    def longer(row: dict[str, Any]) -> None:
        row["s2_io_flip_counterfactual"]["prompt"] += " the store"

    home = _broken(tmp_path, "ioi", longer)
    with pytest.raises(
        DataError,
        match="train.jsonl, row 1, fields 'prompt' and 's2_io_flip_counterfactual.prompt': "
        "clean and corrupt must have the same number of tokens: .* has 15 .* has 17",
    ):
        load_mib(replace(config, data=home))


def test_names_on_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    for args, text in (
        (["mbi"], "There is no experiment 'mbi'. Did you mean 'mib'"),
        (["mib", "--taks", "ioi"], "--taks"),
        (["mib", "--split", "valid"], "validation"),
    ):
        with pytest.raises(SystemExit) as stop:
            experiments.main(args)
        printed = capsys.readouterr()
        assert stop.value.code == 2 and printed.out == ""
        assert text in printed.err and printed.err.count("\n") == 1
    with pytest.raises(SystemExit, match="^ConfigError: .* no task 'ari'. Did you mean"):
        experiments.main(["mib", "--task", "ari"])
