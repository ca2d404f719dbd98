"""The command line: parsed and checked, without any work."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from auto_circuit import experiments
from tests.fuzzing import only_our_errors

NUMBERS = st.one_of(
    st.integers().map(str),
    st.floats().map(str),
    st.sampled_from(["1e999", "0x10", "1_000", "-0", "00", "½", "1" + "0" * 400]),
)
TEXTS = st.one_of(
    st.text(max_size=12),
    st.text(st.characters(categories=["Cs", "Cc", "Cf", "Lo"]), max_size=4),
    st.sampled_from(
        ["", ".", "..", "../x", "/", "a/b", "a\0b", "x" * 300, "é" * 120, "NaN", "None"]
    ),
)
NAMES = st.sampled_from(
    ["Pocket IOI", "pocket ioi", "EAP", "eap", "EAP (alias)", "GT", "Logit Diff", "KL"]
)
VALUES = st.one_of(NUMBERS, TEXTS, NAMES, st.sampled_from(["cpu", "cuda", "meta", "x"]))
FLAGS = [f"--{name}".replace("_", "-") for name in vars(experiments.ExperimentConfig())]
# A random folder would really be made: those are drawn apart.
OPTION = st.tuples(
    st.sampled_from([flag for flag in FLAGS if flag != "--out"]),
    st.lists(VALUES, max_size=3),
).map(lambda option: [option[0], *option[1]])
WORDS = st.lists(
    st.one_of(
        OPTION,
        VALUES.map(lambda value: [value]),
        st.sampled_from([["--no-nodes"], ["--nodes"], ["-h"], ["--"], ["--help"]]),
        st.sampled_from(
            ["a\0b", "", ".", "file", "file/x", "sub", "/dev/null", "\udcff"]
        ).map(lambda out: ["--out", out]),
    ),
    max_size=4,
).map(lambda options: [word for option in options for word in option])
FIRST = st.sampled_from([[], *([name] for name in experiments.EXPERIMENTS), ["sweeep"]])


@pytest.fixture(autouse=True, scope="module")
def _folder_of_its_own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(tmp_path_factory.mktemp("command_line"))
    Path("file").write_text("in the way")
    yield
    os.chdir(before)


@given(first=FIRST, words=WORDS)
def test_any_words(first: list[str], words: list[str]) -> None:
    """An error of ours, an exit code of 2 after one line, or a configuration that is checked."""
    try:
        with only_our_errors():
            _, config, options = experiments.parse([*first, *words])
            experiments.check_config(config)
    except SystemExit as stop:
        assert stop.code in ((0, 2) if {"-h", "--help"} & {*words} else (2,))


@given(words=WORDS)
def test_what_a_user_sees(words: list[str]) -> None:
    """`main` never gets as far as to run something with an option that makes no sense."""
    stops: list[object] = []
    try:
        with only_our_errors():
            experiments.main([*words, "--algos", "No such algorithm"])
    except SystemExit as stop:
        stops.append(stop.code)
    (code,) = stops
    if isinstance(code, str):
        assert "\n" not in code and code.split(":")[0].endswith("Error")
    else:
        assert code == 2 or (code == 0 and {"-h", "--help"} & {*words})
