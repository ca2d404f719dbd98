"""Circuit files that are damaged in any way: our JSON, MIB's JSON and MIB's tensors."""

from __future__ import annotations

import io
import json
import tempfile
from pathlib import Path
from typing import Any

import torch as t
from hypothesis import given
from hypothesis import strategies as st

from auto_circuit.caches import load_cache, save_cache
from auto_circuit.circuit_files import (
    load_circuit,
    load_mib_circuit,
    save_circuit,
    save_mib_circuit,
)
from auto_circuit.types import PruneScores
from auto_circuit.utils.graph_utils import patchable_model
from tests.fuzzing import only_our_errors
from tests.micro import micro_model
from tests.models import ARCHITECTURES

FOLDER = Path(tempfile.mkdtemp())
MICRO = micro_model(seq_len=2)
GPT2 = patchable_model(ARCHITECTURES["gpt2"](), factorized=True, separate_qkv=True)


def _saved() -> tuple[bytes, dict[str, Any], dict[str, Any], bytes]:
    edges = {edge: 0.25 * i - 2 for i, edge in enumerate(MICRO.edges)}
    save_circuit(FOLDER / "ours.json", MICRO, MICRO.circuit_prune_scores(edge_dict=edges))
    scores = GPT2.circuit_prune_scores(list(GPT2.edges)[:40])
    save_mib_circuit(FOLDER / "mib.json", GPT2, scores)
    save_mib_circuit(FOLDER / "mib.pt", GPT2, scores)
    tensors = (FOLDER / "mib.pt").read_bytes()
    return (
        (FOLDER / "ours.json").read_bytes(),
        json.loads((FOLDER / "mib.json").read_text()),
        t.load(io.BytesIO(tensors), weights_only=True),
        tensors,
    )


OURS, MIB, MIB_TENSORS, MIB_BYTES = _saved()
OUR_SCORES, MIB_SCORES = (
    load_circuit(FOLDER / "ours.json", MICRO),
    load_mib_circuit(FOLDER / "mib.pt", GPT2),
)

VALUES = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.floats(),
        st.text(max_size=8),
        st.sampled_from([1e308, -1e308, 1e-46, 10**400, "inf", "-inf", "nan"]),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.text(max_size=5), inner, max_size=3),
    ),
    max_leaves=5,
)


def changed(data: st.DataObject, content: dict[str, Any]) -> dict[str, Any]:
    """A file's content with one value, at any depth, that is another or gone."""
    content = json.loads(json.dumps(content))
    place: Any = content
    while True:
        key = data.draw(
            st.sampled_from(list(place) if isinstance(place, dict) else range(len(place)))
        )
        inner = place[key]
        if not isinstance(inner, (dict, list)) or not inner or data.draw(st.booleans()):
            break
        place = inner
    if isinstance(place, dict) and data.draw(st.booleans()):
        new_key = data.draw(st.text(max_size=8))
        place[new_key] = place.pop(key)
    else:
        place[key] = data.draw(VALUES)
    return content


def flipped(data: st.DataObject, content: bytes) -> bytes:
    """The bytes with some of them changed, put in or gone, or without their end."""
    found = bytearray(content)
    for _ in range(data.draw(st.integers(1, 3))):
        if not found:
            break
        place = data.draw(st.integers(0, len(found) - 1))
        kind = data.draw(st.sampled_from(["bit", "byte", "gone", "end", "twice"]))
        if kind == "bit":
            found[place] ^= 1 << data.draw(st.integers(0, 7))
        elif kind == "byte":
            found[place] = data.draw(st.integers(0, 255))
        elif kind == "gone":
            del found[place]
        elif kind == "twice":
            found[place:place] = found[place : place + 40]
        else:
            found = found[: max(place, 1)]
    return bytes(found)


def same(first: PruneScores, second: PruneScores) -> bool:
    return all(t.equal(scores, second[name]) for name, scores in first.items())


@given(data=st.data())
def test_our_files(data: st.DataObject) -> None:
    path = FOLDER / "ours.json"
    content = {k: v for k, v in json.loads(OURS).items() if k != "checksum"}
    path.write_text(json.dumps(changed(data, content)))
    with only_our_errors():
        found = load_circuit(path, MICRO)
        assert all(not scores.isnan().any() for scores in found.values())


@given(data=st.data())
def test_damage_of_our_files_is_noticed(data: st.DataObject) -> None:
    path = FOLDER / "ours.json"
    path.write_bytes(flipped(data, OURS))
    with only_our_errors():
        assert same(load_circuit(path, MICRO), OUR_SCORES)


@given(data=st.data())
def test_mib_json(data: st.DataObject) -> None:
    path = FOLDER / "mib.json"
    path.write_text(json.dumps(changed(data, MIB)))
    with only_our_errors():
        load_mib_circuit(path, GPT2, in_graph=data.draw(st.booleans()))


@given(data=st.data())
def test_damage_of_mib_tensors_is_noticed(data: st.DataObject) -> None:
    path = FOLDER / "mib.pt"
    path.write_bytes(flipped(data, MIB_BYTES))
    with only_our_errors():
        assert same(load_mib_circuit(path, GPT2), MIB_SCORES)


@given(data=st.data())
def test_mib_tensors(data: st.DataObject) -> None:
    content = dict(MIB_TENSORS)
    key = data.draw(st.sampled_from([*content]))
    value = content[key]
    if isinstance(value, t.Tensor):
        dtypes = [t.float16, t.float64, t.complex64, t.int64, t.bool]
        make = data.draw(
            st.sampled_from(
                [
                    lambda x: x.to(data.draw(st.sampled_from(dtypes))),
                    lambda x: x.to_sparse(),
                    lambda x: x.float() + data.draw(st.floats(width=32)),
                    lambda x: x[..., :-1],
                    lambda x: x.double() * 1e300,
                ]
            )
        )
        content[key] = make(value)
    elif isinstance(value, list) and data.draw(st.booleans()):
        content[key] = [
            *value[:-1],
            data.draw(st.sampled_from([value[0], "m9", 3, None])),
        ]
    else:
        content[key] = data.draw(VALUES)
    path = FOLDER / "mib.pt"
    t.save(content, path)
    with only_our_errors():
        load_mib_circuit(path, GPT2)


CACHED = {"EAP": {"a": t.ones(2, 3), "b": t.zeros(0)}, "n": [1, 2.5, None, True, ("x",)]}


@given(data=st.data(), name=st.text(max_size=6))
def test_caches(data: st.DataObject, name: str) -> None:
    with only_our_errors():
        path = save_cache(CACHED, str(FOLDER), name)
        path.write_bytes(flipped(data, path.read_bytes()))
        try:
            found = load_cache(str(FOLDER), path.name)
            assert found["n"] == CACHED["n"] and t.equal(found["EAP"]["a"], t.ones(2, 3))
        finally:
            path.unlink()


@given(value=st.dictionaries(st.one_of(st.text(max_size=3), st.integers()), VALUES))
def test_anything_is_cached_or_refused(value: Any) -> None:
    with only_our_errors():
        path = save_cache(value, str(FOLDER), "any")
        path.unlink()
