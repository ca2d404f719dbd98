"""The prompt files and their generators: the same bytes again, pairs aligned."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch as t
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

from auto_circuit.data import PromptPairBatch, load_datasets_from_json

DATASETS = Path(__file__).resolve().parents[1] / "datasets"
GPT2_FILES = {
    "ioi/ioi_prompts": 1000,
    "ioi/ioi_vanilla_template_prompts": 1000,
    "greaterthan_gpt2-small_prompts": 1000,
    "docstring_prompts": 1000,
    "animal_diet_short_prompts": 500,
}
END = "<|endoftext|>"


@cache
def generator(name: str) -> ModuleType:
    """A generator as a module (`datasets` is no package; two have the same name)."""
    path = DATASETS / f"{name}_generator.py"
    unique = "datasets_" + name.replace("/", "_").replace("-", "_")
    spec = importlib.util.spec_from_file_location(unique, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    before = list(sys.path)
    sys.path.insert(0, str(DATASETS))
    sys.modules[unique] = module
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path[:] = before
    return module


def bpe_tokenizer(texts: list[str], vocab_size: int = 4000) -> PreTrainedTokenizerFast:
    """As GPT-2's: bytes, merged into the words of some texts."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevelDecoder()
    trainer = BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END],
        initial_alphabet=sorted(ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END, eos_token=END, pad_token=END
    )


@cache
def small_tokenizer() -> PreTrainedTokenizerFast:
    """Knows two of three words of every list, so the others are several tokens."""
    ioi, doc, greater, diet, cities, sports = (
        generator(name)
        for name in (
            *("ioi/ioi", "docstring", "greaterthan", "animal_diet", "capital_cities"),
            "sports-players/sports_players",
        )
    )
    lists = [ioi.NAMES, ioi.PLACES, ioi.OBJECTS, doc.ARGUMENTS, doc.FUNCTIONS]
    lists += [doc.DESCRIPTIONS, greater.NOUNS, list(diet.FOODS), diet.FOODS.values()]
    lists += [list(cities.CAPITALS), cities.CAPITALS.values()]
    words = [word for words in lists for i, word in enumerate(words) if i % 3]
    words += list(sports.PLAYERS)
    centuries = [f" {century}" for century in greater.CENTURIES]
    numbers = [f"{number:02}" for number in range(100)]
    modules = (doc, greater, diet, cities, sports)
    templates = [*ioi.TEMPLATES, ioi.VANILLA_TEMPLATE, *(m.TEMPLATE for m in modules)]
    texts = [*words, *(f" {word}" for word in words), *centuries, *numbers, *templates]
    return bpe_tokenizer(texts)


def read(name: str) -> dict[str, Any]:
    return json.loads((DATASETS / f"{name}.json").read_text())


def load(file: Any, folder: Path, tokenizer: Any, **options: Any) -> PromptPairBatch:
    """All prompts of a generator's PromptFile, as one batch, with BOS."""
    path = folder / "prompts.json"
    file.write(path, "small")
    assert json.loads(path.read_text())["tokenizer"] == "small"
    count = len(file.prompts)
    loader, _ = load_datasets_from_json(
        SimpleNamespace(tokenizer=tokenizer),
        path,
        batch_size=count,
        train_test_size=(count, 0),
        shuffle=False,
        **options,
    )
    (batch,) = loader
    assert loader.word_idxs == {word: i + 1 for word, i in file.word_idxs.items()}
    return batch


def years(tokenizer: Any, tokens: t.Tensor) -> list[int]:
    return [int(tokenizer.decode([idx])) for idx in tokens.tolist()]


def last_answers(batch: PromptPairBatch) -> t.Tensor:
    assert isinstance(batch.answers, t.Tensor)
    return batch.answers[:, 0]


# ------------------------------------------------------------------------ without a model


def test_generators_of_numbers_write_the_committed_files_again(tmp_path: Path) -> None:
    shutil.copytree(DATASETS, tmp_path, dirs_exist_ok=True)
    names = ["tracr/reverse", "tracr/xproportion", "micro_model_inputs", "mini_prompts"]
    patterns = ("tracr/*.json", "micro_model_inputs*.json", "mini_prompts.json")
    for path in (path for pattern in patterns for path in tmp_path.glob(pattern)):
        path.unlink()
    for name in names:
        environment = {**os.environ, "PYTHONHASHSEED": "7"}
        script = tmp_path / f"{name}_generator.py"
        subprocess.run([sys.executable, script], check=True, env=environment)
    written = [path for pattern in patterns for path in tmp_path.glob(pattern)]
    assert len(written) == 5
    for path in written:
        assert path.read_bytes() == (DATASETS / path.relative_to(tmp_path)).read_bytes()


def test_tracr_files_hold_every_input_once() -> None:
    for name, count in (("reverse", 243), ("xproportion", 1024)):
        prompts = read(f"tracr/tracr_{name}_len_5_prompts")["prompts"]
        assert len({tuple(prompt["clean"]) for prompt in prompts}) == count
        assert all(prompt["clean"] != prompt["corrupt"] for prompt in prompts)


def test_tracr_answers_by_hand() -> None:
    reverse = generator("tracr/reverse")
    assert reverse.answers((0, 0, 1, 2, 2)) == [[2], [2], [1], [0], [0]]
    proportion = generator("tracr/xproportion")
    assert proportion.answers((3, 2, 3, 5, 4)) == [[1.0], [0.5], [2 / 3], [0.5], [0.4]]


def test_micro_model_inputs_are_prompts_of_the_micro_model() -> None:
    from auto_circuit.model_utils.micro_model_utils import MicroModel

    loader, _ = load_datasets_from_json(
        None,
        DATASETS / "micro_model_inputs.json",
        prepend_bos=False,
        batch_size=64,
        train_test_size=(64, 0),
        shuffle=False,
    )
    (batch,) = loader
    assert batch.clean.shape == (64, 3, 2)
    assert batch.clean[-1].tolist() == [[3.0, 3.0], [2.0, 2.0], [1.0, 1.0]]
    t.testing.assert_close(batch.corrupt, -batch.clean, atol=0.0, rtol=0.0)
    outputs = MicroModel()(batch.clean)[:, -1]
    assert outputs[-1].tolist() == [25.0, 49.0]
    assert outputs.argmax(-1).tolist() == last_answers(batch).tolist()


# --------------------------------------------------------------------- committed for GPT-2


@pytest.mark.parametrize("name", GPT2_FILES)
def test_committed_files_state_their_tokenizer_and_repeat_no_prompt(name: str) -> None:
    file = read(name)
    assert file["tokenizer"] == "gpt2"
    pairs = {(prompt["clean"], prompt["corrupt"]) for prompt in file["prompts"]}
    assert len(pairs) == len(file["prompts"]) == GPT2_FILES[name]
    assert all(prompt["clean"] != prompt["corrupt"] for prompt in file["prompts"])
    for prompt in file["prompts"]:
        assert not set(prompt["answers"]) & set(prompt["wrong_answers"])


@pytest.mark.parametrize("name", ["ioi_prompts", "ioi_vanilla_template_prompts"])
def test_committed_names_are_where_they_should_be(name: str) -> None:
    for prompt in read(f"ioi/{name}")["prompts"]:
        (io,), (subject,) = prompt["answers"], prompt["wrong_answers"]
        words = prompt["clean"].replace(",", " ").replace(".", " ").split()
        assert words.count(io.strip()) == 1 and words.count(subject.strip()) == 2
        assert not {io.strip(), subject.strip()} & set(prompt["corrupt"].split())


def test_committed_vanilla_prompts_load_with_their_labels(tmp_path: Path) -> None:
    file = read("ioi/ioi_vanilla_template_prompts")
    texts = [prompt[side] for prompt in file["prompts"] for side in ("clean", "corrupt")]
    path = DATASETS / "ioi" / "ioi_vanilla_template_prompts.json"
    tokenizer = bpe_tokenizer(texts)
    loader, _ = load_datasets_from_json(
        SimpleNamespace(tokenizer=tokenizer), path, return_seq_length=True
    )
    assert loader.seq_len == 15 and loader.seq_labels is not None
    assert {"IO": 2, "S1": 4, "S1+1": 5, "S2": 10, "end": 14}.items() <= set(
        loader.word_idxs.items()
    )
    for batch in loader:
        assert t.equal(batch.clean[:, 2], last_answers(batch))


def test_committed_docstrings_ask_for_the_third_argument() -> None:
    for prompt in read("docstring_prompts")["prompts"]:
        args = prompt["clean"].split("(self, ")[1].split(")")[0].split(", ")
        documented = [
            part.split(":")[0].strip() for part in prompt["clean"].split(":param")[1:3]
        ]
        assert documented == args[2:4]
        assert prompt["answers"] == [f" {args[4]}"]
        assert (
            args[4] not in prompt["corrupt"].replace(",", " ").replace(":", " ").split()
        )


# ------------------------------------------------------------------- with any tokenizer


def test_the_small_tokenizer_splits_some_words() -> None:
    tokenizer, ioi = small_tokenizer(), generator("ioi/ioi")
    kept = ioi.Words.of(tokenizer)
    split = set(ioi.NAMES) - set(kept.names)
    assert 20 < len(split) < 60
    assert all(len(tokenizer.tokenize(f" {name}")) > 1 for name in split)


@pytest.mark.parametrize("order", ["ABBA", "BABA"])
def test_ioi_words_are_where_the_file_says(order: str, tmp_path: Path) -> None:
    ioi, tokenizer = generator("ioi/ioi"), small_tokenizer()
    for i, template in enumerate([ioi.VANILLA_TEMPLATE, *ioi.TEMPLATES]):
        file = ioi.ioi_template_prompts(tokenizer, template, order, n_prompts=20, seed=i)
        batch = load(file, tmp_path, tokenizer, return_seq_length=True)
        at = {word: batch.clean[:, idx + 1] for word, idx in file.word_idxs.items()}
        assert t.equal(at["IO"], last_answers(batch))
        assert isinstance(batch.wrong_answers, t.Tensor)
        assert t.equal(at["S1"], batch.wrong_answers[:, 0])
        assert t.equal(at["S1"], at["S2"])
        assert (file.word_idxs["IO"] < file.word_idxs["S1"]) == (order == "ABBA")
        assert t.equal(at["end"], batch.clean[:, -1])
        and_token = tokenizer.encode(" and")[0]
        first = "IO" if order == "ABBA" else "S1"
        assert (at[f"{first}+1"] == and_token).all()
        names = [1 + file.word_idxs[word] for word in ("IO", "S1", "S2")]
        same = batch.clean == batch.corrupt
        assert not same[:, names].any()
        rest = [i for i in range(same.shape[1]) if i not in names]
        assert same[:, rest].all()


def test_ioi_prompts_of_all_templates_are_padded(tmp_path: Path) -> None:
    ioi, tokenizer = generator("ioi/ioi"), small_tokenizer()
    file = ioi.ioi_prompts(tokenizer, n_prompts=200)
    batch = load(file, tmp_path, tokenizer)
    assert len(ioi.TEMPLATES) == len(set(ioi.TEMPLATES)) == 15
    starts = {prompt["clean"].split()[0] for prompt in file.prompts}
    assert starts == {template.split()[0] for template in ioi.TEMPLATES}
    assert batch.clean_attention_mask is not None
    assert len(batch.clean_attention_mask.sum(1).unique()) > 2


def test_docstring_words_are_where_the_file_says(tmp_path: Path) -> None:
    doc, tokenizer = generator("docstring"), small_tokenizer()
    file = doc.docstring_prompts(tokenizer, n_prompts=50)
    batch = load(file, tmp_path, tokenizer, return_seq_length=True)
    at = {word: batch.clean[:, idx + 1] for word, idx in file.word_idxs.items()}
    assert t.equal(at["A_def"], at["A_doc"]) and t.equal(at["B_def"], at["B_doc"])
    assert t.equal(at["C_def"], last_answers(batch))
    assert (at[",_B"] == tokenizer.encode(",")[0]).all()
    assert file.word_idxs[",_B"] == file.word_idxs["B_def"] + 1
    assert (at["param_2"] == tokenizer.encode("param")[-1]).all()
    assert file.word_idxs["param_3"] == file.word_idxs["end"] == batch.clean.shape[1] - 2
    differs = (batch.clean != batch.corrupt).any(0).nonzero()[:, 0].tolist()
    changed = ("A_def", "B_def", "C_def", "A_doc", "B_doc")
    assert differs == sorted(file.word_idxs[word] + 1 for word in changed)
    assert isinstance(batch.wrong_answers, t.Tensor)
    assert batch.wrong_answers.shape == (50, 10)


def test_greaterthan_answers_are_the_later_years(tmp_path: Path) -> None:
    greater, tokenizer = generator("greaterthan"), small_tokenizer()
    file = greater.greaterthan_prompts(tokenizer, n_prompts=50)
    batch = load(file, tmp_path, tokenizer, return_seq_length=True)
    year = batch.clean[:, file.word_idxs["YEAR"] + 1]
    for clean, answers, wrong in zip(
        years(tokenizer, year), batch.answers, batch.wrong_answers, strict=True
    ):
        assert years(tokenizer, answers) == list(range(clean + 1, 100))
        assert years(tokenizer, wrong) == list(range(clean + 1))
    differs = (batch.clean != batch.corrupt).any(0).nonzero()[:, 0].tolist()
    assert differs == [file.word_idxs["YEAR"] + 1]
    corrupt_year = batch.corrupt[:, file.word_idxs["YEAR"] + 1]
    assert (corrupt_year == tokenizer.encode("01")[0]).all()


@pytest.mark.parametrize(
    "name, word",
    [("animal_diet", "animal"), ("capital_cities", "country")],
)
def test_only_the_animal_or_country_differs(name: str, word: str, tmp_path: Path) -> None:
    module, tokenizer = generator(name), small_tokenizer()
    file = getattr(module, f"{name}_prompts")(tokenizer, n_prompts=40)
    batch = load(file, tmp_path, tokenizer, return_seq_length=True)
    known = getattr(module, "FOODS" if name == "animal_diet" else "CAPITALS")
    for prompt in file.prompts:
        (subject,) = (key for key in known if f" {key} " in prompt["clean"])
        (other,) = (key for key in known if f" {key} " in prompt["corrupt"])
        assert prompt["answers"] == [f" {known[subject]}"]
        assert prompt["wrong_answers"] == [f" {known[other]}"]
    assert isinstance(batch.wrong_answers, t.Tensor)
    assert (last_answers(batch) != batch.wrong_answers[:, 0]).all()
    differs = (batch.clean != batch.corrupt).any(0).nonzero()[:, 0].tolist()
    assert max(differs) == file.word_idxs[word] + 1


def test_sports_players_have_names_of_one_length(tmp_path: Path) -> None:
    sports, tokenizer = generator("sports-players/sports_players"), small_tokenizer()
    file = sports.sports_players_prompts(tokenizer, n_prompts=60, name_tokens=None)
    batch = load(file, tmp_path, tokenizer, return_seq_length=True)
    idxs = file.word_idxs
    n_tokens = idxs["final_name_tok"] - idxs["first_name_tok"] + 1
    sport_of = {p: s for s, players in sports.PLAYERS.items() for p in players}
    for i, prompt in enumerate(file.prompts):
        name = prompt["clean"].split("\nFact:")[1].split(" plays")[0].strip()
        other = prompt["corrupt"].split("\nFact:")[1].split(" plays")[0].strip()
        assert prompt["answers"] == [f" {sport_of[name]}"]
        assert sport_of[other] != sport_of[name]
        assert len(prompt["wrong_answers"]) == 2
        tokens = batch.clean[i, idxs["first_name_tok"] + 1 :][:n_tokens]
        assert tokenizer.decode(tokens).strip() == name
    differs = (batch.clean != batch.corrupt).any(0).nonzero()[:, 0].tolist()
    assert {i - 1 for i in differs} <= set(
        range(idxs["first_name_tok"], idxs["final_name_tok"] + 1)
    )
    assert {prompt["answers"][0] for prompt in file.prompts} == {
        f" {sport}" for sport in sports.PLAYERS
    }


@pytest.mark.parametrize(
    "name, function",
    [
        ("ioi/ioi", "ioi_prompts"),
        ("ioi/ioi", "ioi_template_prompts"),
        ("docstring", "docstring_prompts"),
        ("greaterthan", "greaterthan_prompts"),
        ("animal_diet", "animal_diet_prompts"),
        ("capital_cities", "capital_cities_prompts"),
        ("sports-players/sports_players", "sports_players_prompts"),
    ],
)
def test_a_seed_gives_the_same_prompts_and_another_seed_others(
    name: str, function: str
) -> None:
    make = getattr(generator(name), function)
    first, again, other = (
        make(small_tokenizer(), n_prompts=10, seed=seed).prompts for seed in (1, 1, 2)
    )
    assert first == again
    assert first != other


def test_the_command_line_writes_the_same_bytes_in_another_process(
    tmp_path: Path,
) -> None:
    ioi, tokenizer = generator("ioi/ioi"), small_tokenizer()
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    script = DATASETS / "ioi" / "ioi_generator.py"
    options = ["--tokenizer", tmp_path / "tokenizer", "--tokenizer-name", "small"]
    options += ["--out", tmp_path / "written", "--n-prompts", "30", "--seed", "3"]
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    subprocess.run([sys.executable, script, *options], check=True, env=environment)
    ioi.ioi_template_prompts(tokenizer, n_prompts=30, seed=3).write(
        tmp_path / "here.json", "small"
    )
    written = tmp_path / "written" / "ioi_vanilla_template_prompts.json"
    assert written.read_bytes() == (tmp_path / "here.json").read_bytes()
    assert len(list((tmp_path / "written").iterdir())) == 2


def test_a_tokenizer_without_enough_words_is_refused() -> None:
    tokenizer = bpe_tokenizer([" Mary", " John"])
    with pytest.raises(ValueError, match=r"Only 2 of 119 words .* 5 are needed"):
        generator("ioi/ioi").ioi_prompts(tokenizer)
    with pytest.raises(ValueError, match="splits no year into century and year"):
        generator("greaterthan").greaterthan_prompts(tokenizer)


def test_too_many_prompts_are_refused() -> None:
    writer = sys.modules["prompt_writer"]
    with pytest.raises(ValueError, match=r"make only 1 different prompts; 2 were asked"):
        writer.different_prompts(lambda: {"clean": "the same"}, 2)
    pair = {"clean": "a a", "corrupt": "a", "answers": [" a"], "wrong_answers": [" a"]}
    with pytest.raises(ValueError, match="'clean': 2, 'corrupt': 1"):
        writer.check_aligned(bpe_tokenizer(["a a"]), [pair])
