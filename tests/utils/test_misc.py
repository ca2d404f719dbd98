"""Paths, result files, modules by name, printed predictions."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from enum import Enum
from pathlib import Path
from typing import Any

import pytest
import torch as t
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import Linear, Module, ReLU, Sequential

from auto_circuit import files
from auto_circuit.caches import load_cache, save_cache
from auto_circuit.errors import ConfigError, DataError, GraphError
from auto_circuit.files import repo_path_to_abs_path
from auto_circuit.modules import module_by_name, remove_hooks, set_module_by_name
from auto_circuit.types import AblationType, PatchType
from auto_circuit.utils.misc import (
    get_most_similar_embeddings,
    percent_gpu_mem_used,
    run_prompt,
    top_tokens,
)

# ------------------------------------------------------------------------------- files


def assert_same(found: Any, expected: Any) -> None:
    """Equal values of equal types, tensors bit for bit."""
    if isinstance(expected, Tensor):
        assert found.dtype == expected.dtype and found.shape == expected.shape
        assert t.equal(found.nan_to_num(7.0), expected.nan_to_num(7.0))
        return
    if isinstance(expected, dict):
        assert list(found) == list(expected)
        assert [type(k) for k in found] == [type(k) for k in expected]
        for key in expected:
            assert_same(found[key], expected[key])
        return
    assert type(found) is type(expected)
    if isinstance(expected, (list, tuple)):
        assert len(found) == len(expected)
        for a, b in zip(found, expected, strict=True):
            assert_same(a, b)
    elif isinstance(expected, float) and math.isnan(expected):
        assert math.isnan(found)
    else:
        assert found == expected


def test_nested_scores_come_back(tmp_path: Path) -> None:
    shared = t.randn(4, 3)
    scores = {
        "Task/1": {
            "EAP": {"blocks.0.hook_q_input": shared, "blocks.1": shared.T},
            "ACDC": {"blocks.0": t.tensor(math.inf), "empty": t.zeros(0, 2)},
        },
        "Task": {"1": {"EAP": {"blocks.0.hook_q_input": t.tensor([True])}}},
        "half": {"x": {"y": t.tensor([1.5, math.nan], dtype=t.bfloat16)}},
    }
    path = save_cache(scores, str(tmp_path / "new folder"), "scores")
    assert path.suffix == ".safetensors"
    assert_same(load_cache(str(tmp_path / "new folder"), path.name), scores)


def test_enum_keyed_measurements_come_back(tmp_path: Path) -> None:
    measurements = {
        AblationType.RESAMPLE: {
            "Clean KL Div": {"Task": {"EAP": [(0, 1.5), (10, math.inf), (20, 0)]}}
        },
        AblationType.ZERO: {PatchType.TREE_PATCH: [None, True, (), [], {}, "text"]},
        3: -math.inf,
        (1, "a"): {0.5: math.nan},
    }
    path = save_cache(measurements, str(tmp_path), "measurements")
    assert path.suffix == ".json"
    json.loads(path.read_text(), parse_constant=pytest.fail)
    assert_same(load_cache(str(tmp_path), path.name), measurements)


LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4)
TREES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3)
    | st.lists(inner, max_size=3).map(tuple)
    | st.dictionaries(st.text(max_size=3) | st.sampled_from(AblationType), inner),
    max_leaves=8,
)


@given(tree=TREES)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_any_nesting_comes_back(tmp_path: Path, tree: Any) -> None:
    path = save_cache({"tree": tree, "tensor": t.ones(2)}, str(tmp_path), "any")
    loaded = load_cache(str(tmp_path), path.name)
    assert_same(loaded["tree"], tree)
    path.unlink()


def test_parameters_and_default_dicts_are_saved_plain(tmp_path: Path) -> None:
    scores: dict[str, Any] = defaultdict(dict)
    scores["a"]["b"] = t.nn.Parameter(t.ones(2))
    loaded = load_cache(str(tmp_path), save_cache(scores, str(tmp_path), "x").name)
    assert_same(loaded, {"a": {"b": t.ones(2)}})
    assert not loaded["a"]["b"].requires_grad


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    paths = {save_cache({"i": i}, str(tmp_path), "same") for i in range(3)}
    assert len(paths) == 3
    assert sorted(load_cache(str(tmp_path), p.name)["i"] for p in paths) == [0, 1, 2]


class Colour(Enum):
    """An enum that result files do not know."""

    RED = 1


@pytest.mark.parametrize("value", [object(), {1, 2}, Colour.RED, b"bytes"])
def test_other_types_are_not_saved(tmp_path: Path, value: Any) -> None:
    with pytest.raises(DataError, match=r"Cannot save .* at 'task/0'"):
        save_cache({"task": [value]}, str(tmp_path), "bad")
    assert not list(tmp_path.iterdir())


def test_a_missing_file_names_near_ones(tmp_path: Path) -> None:
    path = save_cache({"a": 1}, str(tmp_path), "scores")
    with pytest.raises(DataError, match=f"no file .* Did you mean '{path.name}'"):
        load_cache(str(tmp_path), path.name.replace("scores", "score"))


def test_pickles_are_not_loaded(tmp_path: Path) -> None:
    t.save({"a": t.ones(1)}, tmp_path / "old.pkl")
    with pytest.raises(DataError, match="Pickles .* are not loaded"):
        load_cache(str(tmp_path), "old.pkl")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("text.json", "no json"),
        ("other.json", '{"a": 1}'),
        ("several.json", '{"a": 1, "b": 2}'),
        ("enum.json", '{"enum": ["Colour", "RED"]}'),
        ("text.safetensors", "no safetensors"),
    ],
)
def test_damaged_and_foreign_files(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match="is not a file of `save_cache`"):
        load_cache(str(tmp_path), name)


def test_foreign_safetensors(tmp_path: Path) -> None:
    save_file({"a": t.ones(1)}, tmp_path / "foreign.safetensors")
    with pytest.raises(DataError, match="is not a file of `save_cache`"):
        load_cache(str(tmp_path), "foreign.safetensors")


# ------------------------------------------------------------------------------- paths


def test_paths_of_a_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "auto_circuit"
    (package / "datasets").mkdir(parents=True)
    (tmp_path / "datasets").mkdir()
    (tmp_path / "pyproject.toml").touch()
    (tmp_path / "datasets" / "a.json").touch()
    (package / "datasets" / "b.json").touch()
    monkeypatch.setattr(files, "PACKAGE_DIR", package)
    home = tmp_path / "datasets"
    assert repo_path_to_abs_path("datasets/a.json") == home / "a.json"
    assert repo_path_to_abs_path(Path("datasets/b.json")) == (
        package / "datasets" / "b.json"
    )
    assert repo_path_to_abs_path("datasets/c.json") == home / "c.json"


def test_paths_of_an_installation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "site-packages" / "auto_circuit"
    (package / "datasets").mkdir(parents=True)
    (package / "datasets" / "a.json").touch()
    # The Hugging Face package of that name.
    (tmp_path / "site-packages" / "datasets").mkdir()
    monkeypatch.setattr(files, "PACKAGE_DIR", package)
    monkeypatch.chdir(tmp_path)
    assert repo_path_to_abs_path("datasets") == package / "datasets"
    assert repo_path_to_abs_path("datasets/a.json") == package / "datasets" / "a.json"
    assert repo_path_to_abs_path(".cache") == tmp_path / ".cache"
    assert repo_path_to_abs_path(tmp_path / "x") == tmp_path / "x"


# ----------------------------------------------------------------------------- modules


def test_modules_by_name() -> None:
    model = Sequential(Linear(2, 2), Sequential(ReLU()))
    assert module_by_name(model, "1.0") is model[1][0]
    assert module_by_name(model, "") is model
    new = Linear(2, 3)
    set_module_by_name(model, "1.0", new)
    assert model[1][0] is new


def test_modules_of_a_wrapped_model() -> None:
    wrapper = Module()
    wrapper.wrapped_model = Sequential(ReLU())
    assert module_by_name(wrapper, "0") is wrapper.wrapped_model[0]


@pytest.mark.parametrize("name", ["1.1", "0.weight", "0.forward"])
def test_unknown_modules(name: str) -> None:
    model = Sequential(Linear(2, 2), Sequential(ReLU()))
    with pytest.raises(GraphError, match=f"Sequential has no module '{name}'"):
        module_by_name(model, name)
    with pytest.raises(GraphError, match=f"Sequential has no module '{name}'"):
        set_module_by_name(model, name, ReLU())


def test_the_model_itself_is_not_replaced() -> None:
    with pytest.raises(GraphError, match="cannot be replaced"):
        set_module_by_name(Sequential(), "", ReLU())


def test_hooks_are_removed_when_the_body_raises() -> None:
    module = ReLU()
    with pytest.raises(KeyError), remove_hooks() as handles:
        handles.add(module.register_forward_hook(lambda *_: None))
        assert module._forward_hooks
        raise KeyError
    assert not module._forward_hooks


def test_gpu_memory() -> None:
    percent = percent_gpu_mem_used()
    assert percent.endswith("%") and 0 <= float(percent[:-1]) <= 100


# ------------------------------------------------------------------------- predictions


class LetterModel:
    """Predicts the letter after the last one."""

    W_E = t.eye(26)

    def to_tokens(self, text: str, prepend_bos: bool = True) -> Tensor:
        return t.tensor([[ord(letter) - ord("a") for letter in text]])

    def to_str_tokens(self, tokens: Tensor | str) -> list[str]:
        return [chr(ord("a") + int(token)) for token in tokens]

    def __call__(self, tokens: Tensor) -> Tensor:
        return 10 * t.eye(26)[(tokens + 1) % 26] + t.linspace(1, 0, 26)

    def ln_final(self, x: Tensor) -> Tensor:
        return x / x.norm(dim=-1, keepdim=True)

    def unembed(self, x: Tensor) -> Tensor:
        return x.flip(-1)


def test_top_tokens() -> None:
    logits = t.tensor([0.0, math.log(3), math.log(4)])
    rows = top_tokens(LetterModel(), logits, top_k=10)
    assert [row.token for row in rows] == ["c", "b", "a"]
    assert [row.rank for row in rows] == [0, 1, 2]
    assert [row.prob for row in rows] == pytest.approx([4 / 8, 3 / 8, 1 / 8])


def test_run_prompt_prints_the_best_tokens(capsys: pytest.CaptureFixture[str]) -> None:
    run_prompt(LetterModel(), "xyz", answer="c", top_k=2)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "Prompt: ['x', 'y', 'z']"
    assert lines[1].split()[:2] == ["0", "'a'"]
    assert lines[2].split()[:2] == ["1", "'b'"]
    assert lines[3:4] == ["Answer:"] and lines[4].split()[:2] == ["2", "'c'"]


def test_similar_embeddings(capsys: pytest.CaptureFixture[str]) -> None:
    model, vector = LetterModel(), t.eye(26)[1]
    get_most_similar_embeddings(model, 3 * vector, top_k=1, apply_embed=True)
    get_most_similar_embeddings(
        model, 3 * vector, top_k=1, apply_unembed=True, apply_ln_final=True
    )
    lines = capsys.readouterr().out.splitlines()
    assert "'b'" in lines[0] and "logit    3.000" in lines[0]
    assert "'y'" in lines[1] and "logit    1.000" in lines[1]


def test_bad_questions_about_embeddings() -> None:
    model = LetterModel()
    with pytest.raises(ConfigError, match="not both"):
        get_most_similar_embeddings(
            model, t.ones(26), apply_unembed=True, apply_embed=True
        )
    with pytest.raises(DataError, match="'ab' is 2 tokens"):
        run_prompt(model, "a", answer="ab")


@pytest.mark.parametrize(
    "content", [{"n": 1}, {"scores": t.arange(6.0)}], ids=["json", "safetensors"]
)
def test_a_damaged_name_of_the_checksum_hides_no_damage(
    content: dict[str, Any], tmp_path: Path
) -> None:
    path = save_cache(content, str(tmp_path), "x")
    damaged = path.read_bytes().replace(b"checksum", b"checksun")
    path.write_bytes(damaged)
    with pytest.raises(
        DataError, match="is not a file of `save_cache`, or it is damaged"
    ):
        load_cache(str(tmp_path), path.name)
