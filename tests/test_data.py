"""Prompts: from a JSON file to batches, and the model's outputs on them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as t

from auto_circuit.data import (
    PromptDataLoader,
    PromptDataset,
    PromptPair,
    PromptPairBatch,
    collate_fn,
    load_datasets_from_json,
)
from auto_circuit.errors import ConfigError, DataError
from auto_circuit.prompt_encoding import DegeneratePromptsWarning
from auto_circuit.prompt_files import read_prompt_file
from auto_circuit.types import AblationType
from auto_circuit.utils.ablation_activations import batch_src_ablations, src_ablations
from auto_circuit.utils.graph_utils import patchable_model
from auto_circuit.utils.patchable_model import PatchableModel
from tests.fuzzing import no_hang
from tests.texts import (
    bpe_tokenizer,
    name_prompts,
    prompt,
    text_model,
    word_tokenizer,
    write_prompts,
)

EXACT: dict[str, Any] = {"atol": 1e-5, "rtol": 0.0}
RAGGED = [
    prompt("Ann met Bob", "Dan met Eve"),
    prompt("the big Ann met Bob at the store", "the big Eve met Dan at the store"),
    prompt("big Ann met Bob", "big Dan met Eve"),
]


def load(path: Path, model: Any, train_test: tuple[int, int], **options: Any) -> Any:
    return load_datasets_from_json(
        model, path, batch_size=2, train_test_size=train_test, **options
    )


def patchable(model: Any, *loaders: PromptDataLoader) -> PatchableModel:
    return patchable_model(
        model,
        factorized=True,
        slice_output="last_seq",
        separate_qkv=True,
        kv_caches=[loader.kv_cache for loader in loaders],
    )


def outputs(model: PatchableModel, loader: PromptDataLoader) -> t.Tensor:
    """The last logits of every prompt, clean and corrupt."""
    outs = []
    for batch in loader:
        for side in ("clean", "corrupt"):
            tokens, kwargs = batch.model_input(side)
            outs.append(model(tokens, **kwargs)[model.out_slice])
    return t.cat(outs)


# -------------------------------------------------------------------------- the prompts


def test_tokens_answers_and_split(tmp_path: Path) -> None:
    tokenizer = word_tokenizer()
    path = write_prompts(tmp_path, name_prompts(8))
    train, test = load(path, text_model(tokenizer), (5, 3), shuffle=False)
    assert [len(batch.clean) for batch in train] == [2, 2, 1]
    assert [len(batch.clean) for batch in test] == [2, 1]
    assert (train.n_prompts, test.n_prompts) == (5, 3)
    batch = next(iter(train))
    assert tokenizer.decode(batch.clean[0]) == "<bos> Ann met Bob at the store"
    assert tokenizer.decode(batch.corrupt[0]) == "<bos> Bob met Ann at the store"
    assert tokenizer.decode(batch.answers[0]) == "Bob"
    assert tokenizer.decode(batch.wrong_answers[0]) == "Ann"
    assert batch.batch_diverge_idx == 1
    assert batch.clean_attention_mask is None
    assert train.seq_len is None and train.kv_cache is None and train.diverge_idx == 0
    seen, held_out = (
        {tuple(row.tolist()) for batch in loader for row in batch.clean}
        for loader in (train, test)
    )
    assert (len(seen), len(held_out)) == (5, 3) and not seen & held_out


def test_a_str_path_and_several_files(tmp_path: Path) -> None:
    model = text_model(word_tokenizer())
    one = write_prompts(tmp_path, name_prompts(3), "one")
    two = write_prompts(tmp_path, name_prompts(6)[3:], "two")
    both = write_prompts(tmp_path, name_prompts(6), "both")
    train, _ = load_datasets_from_json(model, [str(one), two], train_test_size=(4, 2))
    expected, _ = load_datasets_from_json(model, str(both), train_test_size=(4, 2))
    assert t.equal(next(iter(train)).clean, next(iter(expected)).clean)


def test_ragged_answers_are_lists(tmp_path: Path) -> None:
    prompts = [prompt(), prompt(answers=(" Bob", " Dan"))]
    path = write_prompts(tmp_path, prompts)
    train, _ = load(path, text_model(word_tokenizer()), (2, 0), shuffle=False)
    (batch,) = train
    assert [len(row) for row in batch.answers] == [1, 2]
    assert batch.wrong_answers.shape == (2, 1)


def test_shuffling_depends_on_the_seed_alone(tmp_path: Path) -> None:
    path = write_prompts(tmp_path, name_prompts(20))
    model = text_model(word_tokenizer())

    def order(**options: Any) -> list[list[int]]:
        train, _ = load(path, model, (20, 0), **options)
        return t.cat([batch.clean for batch in train]).tolist()

    assert order() == order(random_seed=42) != order(random_seed=43)
    assert order(shuffle=False) != order()


def test_no_global_state_is_touched(tmp_path: Path) -> None:
    tokenizer = word_tokenizer()
    model = text_model(tokenizer)
    path = write_prompts(tmp_path, RAGGED)

    def state() -> tuple[Any, ...]:
        # Not Python's `random`: beartype draws from it to check signatures.
        numpy_state = str(np.random.get_state())
        return t.get_rng_state().tolist(), numpy_state, tokenizer.padding_side

    before = state()
    load(path, model, (2, 1), tail_divergence=True)
    assert state() == before


def test_the_default_device_and_dtype_do_not_count(tmp_path: Path) -> None:
    path = write_prompts(tmp_path, [prompt([1.5, 2], [3, 4], [1], [0])])

    def loaded() -> t.Tensor:
        (batch,), _ = load(path, None, (1, 0))
        return batch.clean

    expected = loaded()
    t.set_default_dtype(t.float64)
    try:
        with t.device("meta"):
            found = loaded()
    finally:
        t.set_default_dtype(t.float32)
    assert t.equal(found, expected) and found.dtype == expected.dtype == t.float32


def test_numbers_need_no_model(tmp_path: Path) -> None:
    prompts = [prompt([[i, 1.0]] * 3, [[-i, 1.0]] * 3, [1], [0]) for i in range(1, 5)]
    path = write_prompts(tmp_path, prompts, seq_labels=["a", "b", "c"])
    train, _ = load(path, None, (4, 0), prepend_bos=False)
    assert next(iter(train)).clean.shape == (2, 3, 2)
    assert train.seq_len is None  # upstream mistake 15: it was always set
    train, _ = load(path, None, (4, 0), prepend_bos=False, return_seq_length=True)
    assert (train.seq_len, train.seq_labels) == (3, ["a", "b", "c"])


def test_labels_and_word_positions_count_the_bos(tmp_path: Path) -> None:
    labels = "A met B at the store".split()
    path = write_prompts(
        tmp_path, name_prompts(4), seq_labels=labels, word_idxs={"A": 0, "end": 5}
    )
    model = text_model(word_tokenizer())
    train, _ = load(path, model, (4, 0), return_seq_length=True)
    assert (train.seq_len, train.word_idxs) == (7, {"A": 1, "end": 6})
    assert train.seq_labels == ["<|BOS|>", *labels]
    train, _ = load(path, model, (4, 0), return_seq_length=True, prepend_bos=False)
    assert (train.seq_len, train.word_idxs) == (6, {"A": 0, "end": 5})


# --------------------------------------------------------------------------- batch keys


def test_batches_of_the_same_prompts_have_different_keys(tmp_path: Path) -> None:
    path = write_prompts(tmp_path, [prompt()] * 8)
    train, test = load(path, text_model(word_tokenizer()), (6, 2))
    keys = [batch.key for loader in (train, test) for batch in loader]
    assert len({batch.key for batch in train}) == 3
    assert all(isinstance(key, int) for key in keys)


def test_keys_differ_by_answers() -> None:
    tokens = t.tensor([1, 2])
    one = collate_fn([PromptPair(tokens, tokens, t.tensor([1]), t.tensor([2]))])
    other = collate_fn([PromptPair(tokens, tokens, t.tensor([2]), t.tensor([1]))])
    assert one.key != other.key


def test_keys_are_the_same_in_every_process(tmp_path: Path) -> None:
    path = write_prompts(tmp_path, [prompt([1, 2], [2, 1], [1], [0])] * 3)
    script = (
        "from auto_circuit.data import load_datasets_from_json\n"
        f"train, _ = load_datasets_from_json(None, {str(path)!r}, prepend_bos=False, "
        "batch_size=2, train_test_size=(3, 0))\n"
        "print([batch.key for batch in train])"
    )
    printed = {
        subprocess.run(
            [sys.executable, "-c", script],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(printed) == 1 and json.loads(printed.pop())


@pytest.mark.parametrize("default", [True, False])
def test_bos_follows_the_model_by_default(tmp_path: Path, default: bool) -> None:
    """Models trained without BOS, such as Qwen, were given one."""
    model = text_model(word_tokenizer())
    model.cfg.default_prepend_bos = default
    path = write_prompts(tmp_path, name_prompts(2))
    first_tokens = {}
    for prepend_bos in (None, True, False):
        train, _ = load(path, model, (2, 0), prepend_bos=prepend_bos)
        first_tokens[prepend_bos] = int(next(iter(train)).clean[0, 0])
    bos = model.tokenizer.bos_token_id
    assert (first_tokens[None] == bos) is default
    assert first_tokens[True] == bos and first_tokens[False] != bos


def test_a_bos_that_the_tokenizer_does_not_have(tmp_path: Path) -> None:
    tokenizer = word_tokenizer()
    tokenizer.bos_token = None
    path = write_prompts(tmp_path, name_prompts(2))
    with pytest.raises(ConfigError, match="this tokenizer has no BOS token"):
        load(path, text_model(tokenizer), (2, 0), prepend_bos=True)


# ---------------------------------------------------------------------- prefix, padding


@pytest.mark.parametrize(
    "prompts,tokenizer",
    [
        (name_prompts(7, "the big {} met {}"), word_tokenizer),
        (RAGGED, word_tokenizer),
        (RAGGED, bpe_tokenizer),  # pads with BOS, so that all rows begin alike
    ],
)
def test_prefix_cache_is_exact_for_every_prompt(
    tmp_path: Path, prompts: list[dict[str, Any]], tokenizer: Any
) -> None:
    model = text_model(tokenizer())
    path = write_prompts(tmp_path, prompts)
    n_train = len(prompts) - 2
    whole = load(path, model, (n_train, 2))
    cut = load(path, model, (n_train, 2), tail_divergence=True)
    bare = patchable(model, *whole)
    with_prefix = patchable(model, *cut)
    is_ragged = prompts is RAGGED
    assert cut[0].diverge_idx == (0 if is_ragged else 3)
    for whole_loader, cut_loader in zip(whole, cut, strict=True):
        t.testing.assert_close(
            outputs(with_prefix, cut_loader), outputs(bare, whole_loader), **EXACT
        )


def test_padding_is_no_prefix_though_a_prompt_begins_with_that_token(
    tmp_path: Path,
) -> None:
    """Without BOS, "<pad> the big" is what a short prompt looks like, padded."""
    model = text_model(word_tokenizer())
    prompts = [
        prompt("<pad> the big Ann met", "<pad> the big Bob met"),
        *[
            prompt(f"the big {a} met", f"the big {b} met")
            for a, b in ("Ann Cat".split(), "Dan Eve".split())
        ],
    ]
    path = write_prompts(tmp_path, prompts)
    whole, _ = load(path, model, (3, 0), prepend_bos=False)
    cut, _ = load(path, model, (3, 0), prepend_bos=False, tail_divergence=True)
    assert cut.diverge_idx == 0
    t.testing.assert_close(
        outputs(patchable(model, cut), cut), outputs(patchable(model), whole), **EXACT
    )


def test_the_prefix_is_common_to_all_prompts_not_only_to_a_pair(tmp_path: Path) -> None:
    # Upstream mistake 1: each pair shares "<bos> Ann met", but only <bos> is common.
    prompts = [
        prompt(f"{name} met Bob", f"{name} met Eve")
        for name in ("Ann", "Cat", "Dan", "Eve")
    ]
    model = text_model(word_tokenizer())
    path = write_prompts(tmp_path, prompts)
    whole, _ = load(path, model, (3, 1))
    cut = load(path, model, (3, 1), tail_divergence=True)
    assert cut[0].diverge_idx == 1
    t.testing.assert_close(
        outputs(patchable(model, *cut), cut[0]), outputs(patchable(model), whole), **EXACT
    )


def test_the_last_token_is_no_prefix(tmp_path: Path) -> None:
    model = text_model(word_tokenizer())
    path = write_prompts(tmp_path, [prompt("Ann met Bob", "Ann met Eve")] * 3)
    train, test = load(path, model, (2, 1), tail_divergence=True)
    assert train.diverge_idx == 3
    assert next(iter(train)).clean.shape == (2, 1)
    whole, _ = load(path, model, (2, 1))
    t.testing.assert_close(
        outputs(patchable(model, train, test), train),
        outputs(patchable(model), whole),
        **EXACT,
    )


def test_positions_are_those_after_the_prefix(tmp_path: Path) -> None:
    path = write_prompts(
        tmp_path,
        name_prompts(4, "the big {} met {}"),
        seq_labels="the big A met B".split(),
        word_idxs={"A": 2},
    )
    model = text_model(word_tokenizer())
    train, _ = load(path, model, (3, 1), tail_divergence=True, return_seq_length=True)
    assert (train.diverge_idx, train.seq_len) == (3, 3)
    assert train.seq_labels == ["A", "met", "B"]
    assert train.word_idxs == {"A": 3}  # in the uncut prompt


@pytest.mark.parametrize("tokenizer", [word_tokenizer, bpe_tokenizer])
@pytest.mark.parametrize("prepend_bos", [True, False])
def test_padding_changes_nothing(
    tmp_path: Path, tokenizer: Any, prepend_bos: bool
) -> None:
    model = text_model(tokenizer())
    patched = patchable(model)
    path = write_prompts(tmp_path, RAGGED)
    options = {"shuffle": False, "prepend_bos": prepend_bos}
    padded, _ = load(path, model, (3, 0), **options)
    assert any(batch.clean_attention_mask is not None for batch in padded)
    alone = []
    for i, one in enumerate(RAGGED):
        one_path = write_prompts(tmp_path, [one], f"one{i}")
        loader, _ = load(one_path, model, (1, 0), **options)
        alone.append(outputs(patched, loader))
    clean, corrupt = t.stack(alone, dim=1)
    expected = t.cat([clean[:2], corrupt[:2], clean[2:], corrupt[2:]])
    t.testing.assert_close(outputs(patched, padded), expected, **EXACT)


def test_padding_does_not_count_in_means(tmp_path: Path) -> None:
    model = text_model(word_tokenizer())
    path = write_prompts(tmp_path, RAGGED)
    train, _ = load_datasets_from_json(
        model, path, batch_size=3, train_test_size=(3, 0), shuffle=False
    )
    (batch,) = train
    patched = patchable(model)
    outs = src_ablations(patched, batch.clean, attention_mask=batch.clean_attention_mask)
    lengths = batch.clean_attention_mask.sum(1)
    mean = src_ablations(patched, train, AblationType.TOKENWISE_MEAN_CLEAN)
    for position in range(outs.shape[2]):
        is_text = position >= outs.shape[2] - lengths
        t.testing.assert_close(
            mean[:, 0, position], outs[:, is_text, position].mean(1), **EXACT
        )


def test_a_prompt_that_begins_with_bos_gets_no_second_one(tmp_path: Path) -> None:
    tokenizer = word_tokenizer()
    path = write_prompts(tmp_path, [prompt("<bos> Ann met Bob", "<bos> Ann met Eve")])
    (batch,), _ = load(path, text_model(tokenizer), (1, 0))
    assert tokenizer.decode(batch.clean[0]) == "<bos> Ann met Bob"


def test_a_tokenizer_that_adds_bos_by_itself_gets_one(tmp_path: Path) -> None:
    tokenizer = word_tokenizer(adds_bos=True)
    path = write_prompts(tmp_path, [prompt()])
    train, _ = load(path, text_model(tokenizer), (1, 0))
    (batch,) = train
    assert tokenizer.decode(batch.clean[0]) == "<bos> Ann met Bob at the store"
    assert tokenizer.decode(batch.answers[0]) == "Bob"
    train, _ = load(path, text_model(tokenizer), (1, 0), prepend_bos=False)
    (batch,) = train
    assert tokenizer.decode(batch.clean[0]) == "Ann met Bob at the store"


# ------------------------------------------------------------- token ids, and formats


def test_token_ids_say_what_no_text_can(tmp_path: Path) -> None:
    """As in Llama's vocabulary, where '4' is two tokens: a space, and the one meant."""
    tokenizer = bpe_tokenizer()
    letter: Any = tokenizer.convert_tokens_to_ids("b")
    model = text_model(tokenizer)
    ids = tokenizer("Ann met Bob", add_special_tokens=False)["input_ids"]
    prompts = [
        prompt("Ann met Bob", "Ann met Eve", [" zebra"]),
        prompt(ids, "Ann met Eve", [" Bob", letter], [letter + 1]),
    ]
    with pytest.raises(DataError, match="one token.* give its token id"):
        load(write_prompts(tmp_path, prompts[:1]), model, (1, 0))
    path = write_prompts(tmp_path, [prompts[1], {**prompts[1], "clean": "Ann met Bob"}])
    (batch,), _ = load(path, model, (2, 0), shuffle=False)
    assert t.equal(batch.clean[0], batch.clean[1])
    assert batch.clean[0].tolist() == [tokenizer.bos_token_id, *ids]
    (bob,) = tokenizer(" Bob", add_special_tokens=False)["input_ids"]
    assert batch.answers[0].tolist() == [bob, letter]
    assert batch.wrong_answers[0].tolist() == [letter + 1]


CSV = """clean,corrupt,answers,wrong_answers_1,wrong_answers_2,seq_labels,word_idxs
Ann met Bob,Dan met Eve, Bob, Ann,,"[""A"", ""met"", ""B""]","{""A"": 0}"
"[3, 8, 4]",Dan met Eve,"["" Bob"", 5]", Ann,"[6, 7]",,
"""


def test_csv_and_json_lines_say_the_same_as_json(tmp_path: Path) -> None:
    prompts = [
        prompt("Ann met Bob", "Dan met Eve"),
        prompt([3, 8, 4], "Dan met Eve", [" Bob", 5], [" Ann", 6, 7]),
    ]
    fields: dict[str, Any] = {"seq_labels": ["A", "met", "B"], "word_idxs": {"A": 0}}
    as_json = write_prompts(tmp_path, prompts, **fields)
    lines = [json.dumps({**prompts[0], **fields}), "", json.dumps(prompts[1])]
    as_lines, as_csv = tmp_path / "prompts.jsonl", tmp_path / "prompts.CSV"
    as_lines.write_text("\n".join(lines))
    as_csv.write_text("\ufeff" + CSV, encoding="utf-8")

    def loaded(path: Path) -> Any:
        model = text_model(word_tokenizer())
        train, _ = load(path, model, (2, 0), return_seq_length=True)
        (batch,) = train
        return batch.key, train.seq_labels, train.word_idxs

    assert loaded(as_json) == loaded(as_lines) == loaded(as_csv)


@pytest.mark.parametrize(
    "name,content,message",
    [
        ("x.csv", "clean,clean\na,b", "several columns .'clean'.*answers_1"),
        ("x.csv", "clean,corrupt,answers\na,b", "line 2 has 2 cells, but .* 3 columns"),
        ("x.csv", "clean,corrupt,answers\na,b,c,d", "line 2 has 4 cells, but .* 3 col"),
        ("x.csv", 'clean,corrupt,answers\na,b,"c', "line 2 is not CSV"),
        ("x.csv", "clean,corrupt,answers\na,b,[1;2]", "line 2, 'answers' is not JSON"),
        ("x.csv", "clean;corrupt;answers\na;b;c", "prompt 0 has no field 'clean'"),
        ("x.csv", "clean,corrupt,answers\n", "has no prompts"),
        ("x.csv", "", "has no prompts"),
        ("x.jsonl", "[]", "line 1 is a list; expected an object"),
        ("x.jsonl", '{"clean": 1}\n{', "line 2 is not JSON"),
        ("x.jsonl", '{"seq_labels": ["a"]}\n{"seq_labels": ["b"]}', "differs from line"),
    ],
)
def test_malformed_lines(tmp_path: Path, name: str, content: str, message: str) -> None:
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(DataError, match=message):
        file = read_prompt_file(path)
        load(path, text_model(word_tokenizer()), (len(file.prompts), 0))


# ------------------------------------------------------------------- degenerate pairs


def test_pairs_that_show_nothing(tmp_path: Path) -> None:
    model = text_model(word_tokenizer())
    same = prompt(corrupt=prompt()["clean"])
    same_answers = prompt(answers=[" Bob", " Ann"], wrong_answers=[" Ann", " Bob"])
    shared = prompt(answers=[" Bob", " Dan"], wrong_answers=[" Dan"])
    for all_bad in ([same] * 2, [same_answers], [same, same_answers]):
        with pytest.raises(DataError, match=f"All {len(all_bad)} prompt pairs are degen"):
            load(write_prompts(tmp_path, all_bad), model, (len(all_bad), 0))
    path = write_prompts(tmp_path, [same, same, same_answers, shared, prompt()])
    text = "clean equals corrupt in 2 of 5, and an answer is also a wrong .* in 2 of 5"
    with pytest.warns(DegeneratePromptsWarning, match=text) as warned:
        load(path, model, (3, 2))
    assert len(warned) == 1


def test_targets_may_be_equal(tmp_path: Path) -> None:
    """Numbers are compared with, and wrong ones are not."""
    prompts = [prompt([1, 2], [3, 4], [[0.5], [1]], [[0.5], [1]])] * 2
    path = write_prompts(tmp_path, prompts)
    (batch,), _ = load(path, None, (2, 0), prepend_bos=False)
    assert batch.answers.dtype == t.float32


# ------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    "content,message",
    [
        ("{", "prompts.json is not JSON"),
        ("[]", 'must hold an object with a list "prompts"'),
        ('{"prompts": 3}', 'must hold an object with a list "prompts"'),
        ('{"prompts": []}', "has no prompts"),
        ('{"prompts": [3]}', "prompt 0 is a int; expected an object"),
        ('{"prompts": [{"clean": "Ann"}]}', "prompt 0 has no field 'corrupt'"),
        ('{"prompts": [], "prompts": []}', "has the key 'prompts' twice"),
        ('{"prompts": [NaN]}', "it has the number NaN"),
        ('{"prompts": [-Infinity]}', "it has the number -Infinity"),
        ('{"prompts": [1e999]}', "it has the number 1e999"),
        ('{"prompts": [' + "1" * 5000 + "]}", "is not JSON: Exceeds the limit"),
        ("[" * 100000, "nested too deeply"),
        ('{"prompts": [1], "seq_label": []}', "unknown field 'seq_label'"),
        (b"\xff\xfe{", "is not a text in UTF-8"),
        ("", "prompts.json is not JSON"),
    ],
)
def test_malformed_files(tmp_path: Path, content: str | bytes, message: str) -> None:
    path = tmp_path / "prompts.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=message):
        read_prompt_file(path)


def test_what_is_no_file(tmp_path: Path) -> None:
    """A read of a pipe would wait for ever."""
    os.mkfifo(tmp_path / "pipe.json")
    (tmp_path / "folder.json").mkdir()
    (tmp_path / "device.json").symlink_to("/dev/zero")
    for name in ("pipe", "folder", "device"):
        with (
            no_hang(),
            pytest.raises(DataError, match="is a folder, a pipe or a device"),
        ):
            read_prompt_file(tmp_path / f"{name}.json")
    with pytest.raises(DataError, match="Cannot read the prompt file"):
        read_prompt_file(tmp_path / f"{'x' * 300}.json")
    with pytest.raises(DataError, match="There is no prompt file|Cannot read"):
        read_prompt_file(tmp_path / "a\0b.json")
    with pytest.raises(DataError, match="'.yaml'; expected one of .json, .jsonl, .csv"):
        read_prompt_file(tmp_path / "prompts.yaml")


@pytest.mark.parametrize(
    "bad,message",
    [
        (prompt([[1], [2, 3]], [1, 2], [1], [0]), "prompt 1, .*ragged"),
        (prompt([1, [2]], [1, 2], [1], [0]), "prompt 1, .*ragged"),
        (prompt([1, 2, 3], [1, 2, 3], [1], [0]), "prompt 1 has numbers of shape .3,."),
        (prompt([], [], [1], [0]), "prompt 1, field 'clean': expected a list of numbers"),
        (prompt([[], []], [[], []], [1], [0]), "prompt 1 has numbers of shape .2, 0."),
        (prompt([True, 2], [1, 2], [1], [0]), "True is no number"),
        (prompt([1, "a"], [1, 2], [1], [0]), "'a' is no number"),
        (prompt([1e39, 2], [1, 2], [1], [0]), "too large for float32"),
        (prompt([10**30, 2], [1, 2], [1], [0]), "is too large a number"),
        (prompt([1, 2], [3, 4], [[1], 2], [0]), "'answers': .*ragged"),
    ],
)
def test_bad_prompts_of_numbers(
    tmp_path: Path, bad: dict[str, Any], message: str
) -> None:
    good = prompt([1, 2], [3, 4], [1], [0])
    path = write_prompts(tmp_path, [good, bad])
    with pytest.raises(DataError, match=message):
        load(path, None, (2, 0), prepend_bos=False, shuffle=False)


@pytest.mark.parametrize(
    "bad,message",
    [
        (prompt(corrupt=3), "prompt 1, field 'corrupt': expected a text"),
        (prompt(corrupt=[1.5]), "corrupt prompt .* must be a list of token ids"),
        (prompt(corrupt=[[1]]), "corrupt prompt .* must be a list of token ids"),
        (prompt(answers=[3.0]), "'answers': expected a list of texts and token ids; 3.0"),
        (prompt(answers=[True]), "prompt 1, field 'answers': .*; True is neither"),
        (prompt(answers=[99]), "prompt 1 has the token id 99, but .* words 0 to 19"),
        (prompt(wrong_answers=[-1]), "prompt 1 has the token id -1"),
        (prompt([10**30] * 6, [1] * 6), "prompt 1 has the token id 1000000"),
        (prompt(answers=[]), "prompt 1, field 'answers': the list is empty"),
        (prompt("Ann " * 32, "Bob " * 32), "prompt 1 has 33 tokens .* context has 32"),
        (prompt(clean="Ann \ud800"), "'clean': the text .* lone surrogate"),
        (prompt(answers=["\ud800"]), "'answers': the text .* lone surrogate"),
        ({**prompt(), "corrupt": None}, "'corrupt': expected a text"),
        (
            {"clean": "Ann", "corrupt": "Bob", "answers": ["Ann"], "wrong_answer": []},
            "prompt 1 has the unknown field 'wrong_answer'. Did you mean 'wrong_answers'",
        ),
        (prompt(corrupt="Ann met Bob"), "same number of tokens: .* has 7 .* has 4 "),
        (prompt(answers=[" Bob met"]), "' Bob met' must be one token, but it is"),
        (prompt(answers=[" Zoe"]), "' Zoe' is not in the tokenizer's vocabulary"),
        (
            prompt(clean="Zoe met Bob at the store"),
            "words that the tokenizer does not know",
        ),
        (prompt(clean="", corrupt=""), "has no tokens"),
    ],
)
def test_bad_prompts(tmp_path: Path, bad: dict[str, Any], message: str) -> None:
    path = write_prompts(tmp_path, [prompt(), bad])
    with pytest.raises(DataError, match=message):
        load(path, text_model(word_tokenizer()), (2, 0))


def test_a_tokenizer_with_more_words_than_the_model(tmp_path: Path) -> None:
    model = text_model(word_tokenizer(), n_words=10)
    path = write_prompts(tmp_path, [prompt()])
    with pytest.raises(DataError, match="prompt 0 has the token id 10, .* words 0 to 9"):
        load(path, model, (1, 0))


def test_answers_of_several_tokens_in_a_byte_level_vocabulary(tmp_path: Path) -> None:
    path = write_prompts(tmp_path, [prompt(answers=[" zebra"])])
    with pytest.raises(DataError, match="must be one token, but it is"):
        load(path, text_model(bpe_tokenizer()), (1, 0))


def test_bad_labels_and_positions(tmp_path: Path) -> None:
    model = text_model(word_tokenizer())

    def load_with(**fields: Any) -> None:
        path = write_prompts(tmp_path, name_prompts(2), **fields)
        load(path, model, (2, 0), return_seq_length=True)

    with pytest.raises(DataError, match='"seq_labels" must be a list of texts'):
        load_with(seq_labels=[3])
    for wrong in ("x", True, 1.0, None):
        with pytest.raises(DataError, match='"word_idxs" must map words to positions'):
            load_with(word_idxs={"A": wrong})
    with pytest.raises(DataError, match="3 `seq_labels`, but its prompts have 7 tokens"):
        load_with(seq_labels=["a", "b"])
    with pytest.raises(DataError, match="'A' at position 10"):
        load_with(word_idxs={"A": 9})
    path = write_prompts(tmp_path, RAGGED)
    with pytest.raises(DataError, match="have 4 to 9 tokens"):
        load(path, model, (3, 0), return_seq_length=True)


def test_too_few_prompts_and_bad_sizes(tmp_path: Path) -> None:
    model = text_model(word_tokenizer())
    path = write_prompts(tmp_path, name_prompts(3))
    with pytest.raises(
        DataError, match=r"3 prompts, but train_test_size=\(4, 1\) needs 5"
    ):
        load(path, model, (4, 1))
    with pytest.raises(ConfigError, match="`train_test_size`"):
        load(path, model, (0, 0))
    with pytest.raises(ConfigError, match="`batch_size` is"):
        load_datasets_from_json(model, path, batch_size=0, train_test_size=(1, 1))
    with pytest.raises(ConfigError, match="Without a model"):
        load(path, None, (1, 1), prepend_bos=True)
    with pytest.raises(ConfigError, match="empty list"):
        load_datasets_from_json(model, [], train_test_size=(1, 1))
    with pytest.raises(DataError, match="There is no prompt file"):
        load(tmp_path / "nothing.json", model, (1, 1))


def test_unpadded_prompts_of_different_lengths(tmp_path: Path) -> None:
    path = write_prompts(tmp_path, RAGGED)
    with pytest.raises(DataError, match="with pad=False all must have the same"):
        load(path, text_model(word_tokenizer()), (3, 0), pad=False)


def test_a_model_without_the_loaders_prefix(tmp_path: Path) -> None:
    # Upstream mistake 22: outputs without the prefix, and no word of it.
    model = text_model(word_tokenizer())
    path = write_prompts(tmp_path, name_prompts(4, "the big {} met {}"))
    cut = load(path, model, (2, 2), tail_divergence=True)
    with pytest.raises(DataError, match="first 3 tokens of these prompts were cut off"):
        batch_src_ablations(patchable(model), cut[0], clean_corrupt="clean")
    whole, _ = load(path, model, (2, 2))
    with pytest.raises(DataError, match="loaded without `tail_divergence`"):
        batch_src_ablations(patchable(model, *cut), whole, clean_corrupt="clean")


def test_one_prefix_serves_every_batch_size(tmp_path: Path) -> None:
    # Upstream mistake 34: a KeyError for any other batch size than the loader's.
    model = text_model(word_tokenizer())
    path = write_prompts(tmp_path, name_prompts(5, "the big {} met {}"))
    cut = load(path, model, (3, 2), tail_divergence=True)
    patched = patchable(model, *cut)
    clean = next(iter(cut[0])).clean
    t.testing.assert_close(patched(clean)[:1], patched(clean[:1]), **EXACT)


def test_arguments_of_the_loader(tmp_path: Path) -> None:
    path = write_prompts(tmp_path, [prompt([1, 2], [3, 4], [1], [0])] * 5)

    def load_with(**options: Any) -> Any:
        options = {"batch_size": 2, "train_test_size": (2, 1), **options}
        return load_datasets_from_json(None, path, **options)

    train, test = load_with(
        batch_size=(np.int64(1), np.int32(2)), train_test_size=(np.int64(2), 3)
    )
    assert (len(train), len(test)) == (2, 2)
    with pytest.raises(DataError, match=r"5 prompts, but train_test_size=\(6, 4\)"):
        load_with(train_test_size=(6, 4))
    with pytest.raises(ConfigError, match="`batch_size` is 2147483648"):
        load_with(batch_size=2**31)
    with pytest.raises(ConfigError, match="`random_seed` is -1; expected at least 0"):
        load_with(random_seed=-1)
    for device in ("nothing", "meta", "cuda:99"):
        with pytest.raises(ConfigError, match=f"`device` is '{device}', which cannot be"):
            load_with(device=device)


TOKENS = t.tensor([1, 2])


@pytest.mark.parametrize(
    "wrong,message",
    [
        ({"corrupt": t.tensor([1, 2, 3])}, "expected the same shape, type and device"),
        ({"corrupt": t.tensor([1.0, 2.0])}, "expected the same shape, type and device"),
        ({"corrupt": TOKENS.to("meta")}, "`corrupt` is .* on meta; expected token ids"),
        ({"clean": t.tensor(1)}, "`clean` is torch.int64 of shape .*least 1 dimension"),
        ({"clean": TOKENS == 1}, "`clean` is torch.bool .*expected token ids"),
        ({"clean": TOKENS[:0], "corrupt": TOKENS[:0]}, "expected at least one token"),
        ({"answers": t.tensor(1)}, "`answers` is .*least 1 dimension"),
        ({"answers": t.tensor([1.0])}, "expected token ids .integers. in all of them"),
        ({"wrong_answers": TOKENS.to("meta")}, "`wrong_answers` is .* on meta; expected"),
        ({"clean_attention_mask": TOKENS[:1]}, "expected a number for each token"),
    ],
)
def test_pairs_that_do_not_fit(wrong: dict[str, t.Tensor], message: str) -> None:
    parts: dict[str, Any] = dict.fromkeys(
        ("clean", "corrupt", "answers", "wrong_answers"), TOKENS
    )
    PromptPair(**parts)
    with pytest.raises(DataError, match=message):
        PromptPair(**{**parts, **wrong})
    batch = {name: row[None] for name, row in {**parts, **wrong}.items() if row.ndim}
    if len(batch) == len({**parts, **wrong}):
        with pytest.raises(DataError, match=message):
            PromptPairBatch(0, 0, **batch)


def test_batches_and_data_sets_that_do_not_fit() -> None:
    one, two = TOKENS[None], t.stack([TOKENS, TOKENS])
    with pytest.raises(DataError, match="`answers` has 1 rows, but the batch has 2"):
        PromptPairBatch(0, 0, two, two, one, two)
    with pytest.raises(
        DataError, match="`wrong_answers` has 1 rows, but the batch has 2"
    ):
        PromptPairBatch(0, 0, two, two, two, [TOKENS])
    longer = t.tensor([1, 2, 3])
    with pytest.raises(DataError, match="shapes .* cannot be one batch"):
        collate_fn([PromptPair(row, row, row, row) for row in (TOKENS, longer)])
    rows = [TOKENS, longer]
    ragged = PromptDataset(rows, rows, rows, rows)
    with pytest.raises(DataError, match="shapes .* cannot be one batch"):
        PromptDataLoader(ragged, None, 0, batch_size=2)
    assert len(PromptDataLoader(ragged, None, 0, batch_size=1)) == 2
    with pytest.raises(DataError, match=r"`seq_len` is 2, but prompts have \[2, 3\]"):
        PromptDataLoader(ragged, 2, 0, batch_size=1)
    mixed = [TOKENS, TOKENS.float()]
    with pytest.raises(DataError, match="Prompt 1 has .* expected one type and device"):
        PromptDataset(mixed, mixed, two, two)
    whole = PromptDataset(two, two, two, two)
    with pytest.raises(DataError, match="`seq_labels` .* a text for each of 2 positions"):
        PromptDataLoader(whole, 2, 0, None, ["a"])
    with pytest.raises(DataError, match="`word_idxs` is"):
        PromptDataLoader(whole, 2, 0, None, None, {"a": True})
    with pytest.raises(ConfigError, match="`batch_size` is 0; expected at least 1"):
        PromptDataLoader(whole, 2, 0, batch_size=0)
    with pytest.raises(ConfigError, match="The loader's options do not fit"):
        PromptDataLoader(whole, 2, 0, num_workers=-1)


def test_parts_of_a_data_set_have_equal_lengths() -> None:
    rows = [t.tensor([1, 2])] * 2
    with pytest.raises(DataError, match=r"got \[2, 2, 1, 2\]"):
        PromptDataset(rows, rows, rows[:1], rows)


def test_a_loader_has_its_own_batches() -> None:
    rows = [t.tensor([1, 2])] * 2
    dataset = PromptDataset(rows, rows, rows, rows)
    for option in ("collate_fn", "batch_sampler"):
        with pytest.raises(ConfigError, match=f"does not take `{option}`"):
            options: Any = {option: [[0]]}
            PromptDataLoader(dataset, None, 0, **options)


def test_the_first_difference_of_a_batch_is_its_earliest() -> None:
    clean = t.tensor([[1, 2, 3, 4], [1, 2, 3, 4]])
    corrupt = t.tensor([[1, 2, 3, 5], [1, 6, 3, 4]])
    one = [t.tensor([1]), t.tensor([1])]
    dataset = PromptDataset(clean, corrupt, one, [row + 1 for row in one])
    (batch,) = PromptDataLoader(dataset, None, 0, batch_size=2)
    assert batch.batch_diverge_idx == 1


def test_each_side_of_a_batch_has_its_own_mask() -> None:
    tokens, rows = t.tensor([[1, 2, 3]]), t.tensor([[1]])
    masks = t.tensor([[0, 1, 1]]), t.tensor([[0, 0, 1]])
    batch = PromptPairBatch(0, 0, tokens, tokens + 1, rows, rows + 1, *masks)
    for side, mask in zip(("clean", "corrupt"), masks, strict=True):
        _, kwargs = batch.model_input(side)
        assert kwargs["attention_mask"].tolist() == mask.tolist()


def test_a_file_that_is_read_again_is_what_is_there_then(tmp_path: Path) -> None:
    """Also if its size and time are what they were, and if what was read was changed."""
    path = tmp_path / "prompts.json"
    content = {
        "prompts": [{"clean": "Ann", "corrupt": "Bob", "answers": ["Bob"]}],
        "word_idxs": {"name": 0},
    }
    path.write_text(json.dumps(content))
    when = path.stat().st_mtime_ns
    first = read_prompt_file(path)
    first.prompts.clear()
    first.word_idxs.clear()
    again = read_prompt_file(path)
    assert again.prompts[0].clean == "Ann" and again.word_idxs == {"name": 0}
    path.write_text(json.dumps(content).replace("Ann", "Zoe"))
    os.utime(path, ns=(when, when))
    assert read_prompt_file(path).prompts[0].clean == "Zoe"
