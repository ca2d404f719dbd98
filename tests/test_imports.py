"""Importing does no work: auto-circuit trained models, seeded and restyled plotly there."""

from __future__ import annotations

import pkgutil
import re
import subprocess
import sys
from pathlib import Path

from importlinter.api import read_configuration

import auto_circuit
from auto_circuit.experiment_utils import load_tl_model
from auto_circuit.tasks import POCKET_MODEL
from auto_circuit.utils.graph_utils import patchable_model

REPO = Path(__file__).parents[1]
PROGRAM = """
import importlib, pkgutil, random, numpy, torch, plotly.io, transformer_lens
import rich.console  # draws ids for its styles
before = (
    random.getstate(),
    numpy.random.get_state()[1].tolist(),
    torch.get_rng_state().tolist(),
    torch.get_num_threads(),
    torch.is_grad_enabled(),
    plotly.io.templates.default,
    plotly.io.templates[plotly.io.templates.default].to_plotly_json(),
)
import auto_circuit
for module in pkgutil.walk_packages(auto_circuit.__path__, "auto_circuit."):
    importlib.import_module(module.name)
import experiments
after = (
    random.getstate(),
    numpy.random.get_state()[1].tolist(),
    torch.get_rng_state().tolist(),
    torch.get_num_threads(),
    torch.is_grad_enabled(),
    plotly.io.templates.default,
    plotly.io.templates[plotly.io.templates.default].to_plotly_json(),
)
assert before == after
assert not [task for task in auto_circuit.tasks.TASKS if "_model" in task.__dict__]
auto_circuit.tasks.find_task("Tracr reverse Token Circuit").model
assert not {"jax", "haiku", "tracr"} & {*sys.modules}
"""


def test_importing_everything_changes_and_prints_nothing(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(REPO)!r}){PROGRAM}"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert not list(tmp_path.iterdir())


def test_the_version_is_the_one_that_is_built() -> None:
    project = (REPO / "pyproject.toml").read_text()
    assert f'\nversion = "{auto_circuit.__version__}"\n' in project


def test_a_patchable_model_hands_texts_and_tokens_to_its_model() -> None:
    """auto-circuit's took no arguments."""
    bridge = load_tl_model(POCKET_MODEL)
    model = patchable_model(bridge, True, separate_qkv=True)
    text = "Then Mary and John met"
    tokens = model.to_tokens(text, prepend_bos=False)
    assert tokens.tolist() == bridge.to_tokens(text, prepend_bos=False).tolist()
    assert model.to_str_tokens(text) == bridge.to_str_tokens(text)
    assert model.to_string(tokens[0]).strip() == text
    assert model.cfg is bridge.cfg and model.tokenizer is bridge.tokenizer


def test_the_command_line_starts_without_what_only_a_run_needs() -> None:
    """Each of them takes half a second or more; `--help` needs little beside torch."""
    code = (
        "import sys, auto_circuit.experiments as experiments\n"
        "assert not {'torch', 'tyro', 'rich'} & set(sys.modules)\n"
        "try: experiments.main(['--help'])\n"
        "except SystemExit as stop: assert not stop.code\n"
        "slow = {'pandas', 'plotly', 'transformers', 'transformer_lens', 'matplotlib'}\n"
        "slow |= {'rich.console', 'pyarrow', 'safetensors'}\n"
        "assert not slow & set(sys.modules), slow & set(sys.modules)\n"
        "import gc; assert gc.isenabled() and gc.get_freeze_count() > 100_000"
    )
    subprocess.run(
        [sys.executable, "-c", code], cwd=REPO, check=True, stdout=subprocess.DEVNULL
    )


def test_every_module_has_its_layer_and_no_import_is_ignored() -> None:
    """`lint-imports` looks at imports of modules that its contract names, and no others."""
    contracts = read_configuration(str(REPO / "pyproject.toml"))["contracts_options"]
    assert not any("ignore_imports" in contract for contract in contracts)
    layers = re.findall(r"auto_circuit[\w.]*", str(contracts[0]["layers"]))
    assert len(layers) == len(set(layers)) > 20
    for module in pkgutil.walk_packages(auto_circuit.__path__, "auto_circuit."):
        homes = [x for x in layers if f"{module.name}.".startswith(f"{x}.")]
        # A package holds modules of several layers, or is one.
        is_cut = any(x.startswith(f"{module.name}.") for x in layers)
        assert len(homes) == (0 if is_cut else 1), module.name
