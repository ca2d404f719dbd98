"""The wheel and the source distribution: what they hold, and that the wheel runs."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

REPO = Path(__file__).parents[1]
# All tasks of the default sweep; its slow algorithms, and more seeds and sizes, need nothing
# more from the wheel.
SWEEP = ["-m", "auto_circuit.experiments", "--name", "wheel-check"]
SWEEP += ["--algos", "Random", "EAP", "--n-seeds", "1", "--circuit-sizes", "0", "50"]

pytestmark = pytest.mark.slow


def run(*command: str | Path, cwd: Path) -> str:
    """Run a command where nothing of the repository is importable; its output."""
    outside = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    done = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env=outside,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, f"{command} failed:\n{done.stdout}"
    return done.stdout


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel and the source distribution."""
    out = tmp_path_factory.mktemp("dist")
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", out]
    run(*build, "--wheel", "--sdist", REPO, cwd=out)
    return out


@pytest.fixture(scope="module")
def wheel(dist: Path) -> Path:
    (path,) = dist.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def wheel_python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of a new environment: the wheel, and this one's dependencies."""
    folder = tmp_path_factory.mktemp("wheel-env")
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    site = run(
        python,
        "-c",
        "import sysconfig; print(sysconfig.get_path('purelib'))",
        cwd=folder,
    ).strip()
    run(
        *(sys.executable, "-m", "pip", "install", "--no-deps", "--no-index"),
        *("--target", site, wheel),
        cwd=folder,
    )
    # A path line only appends to sys.path: .pth files of the folder that it names, an
    # editable install's among them, are not read.
    here = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    Path(site, "dependencies.pth").write_text("".join(f"{path}\n" for path in here))
    return python


def test_everything_in_the_wheel_lies_in_the_package(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        top_level = {name.split("/")[0] for name in archive.namelist()}
    dist_info = {name for name in top_level if name.endswith(".dist-info")}
    assert len(dist_info) == 1
    assert top_level - dist_info == {"auto_circuit"}


def test_wheel_holds_the_package_and_its_data(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    modules = {
        path.relative_to(REPO).as_posix()
        for path in (REPO / "auto_circuit").rglob("*")
        if path.is_file() and not {"__pycache__", "node_modules"} & set(path.parts)
    }
    prompts = {
        f"auto_circuit/datasets/{path.relative_to(REPO / 'datasets').as_posix()}"
        for path in (REPO / "datasets").rglob("*.json")
    }
    assert prompts, "datasets/ has no prompt files"
    assert modules | prompts <= names
    assert {
        "auto_circuit/experiments.py",
        "auto_circuit/py.typed",
        "auto_circuit/explorer/built/explorer.js",
        "auto_circuit/pocket_model/config.json",
        "auto_circuit/pocket_model/model.safetensors",
    } <= names
    assert not [name for name in names if "node_modules" in name]


def test_source_distribution_builds_the_same_wheel(
    dist: Path, wheel: Path, tmp_path: Path
) -> None:
    (sdist,) = dist.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    (source,) = tmp_path.iterdir()
    build = [sys.executable, "-m", "build", "--no-isolation", "--wheel"]
    run(*build, "--outdir", tmp_path / "again", source, cwd=tmp_path)
    (again,) = (tmp_path / "again").glob("*.whl")
    with zipfile.ZipFile(wheel) as one, zipfile.ZipFile(again) as other:
        assert sorted(one.namelist()) == sorted(other.namelist())


def test_wheel_imports_from_its_own_folder(wheel_python: Path, tmp_path: Path) -> None:
    script = (
        "import auto_circuit, datasets; print(auto_circuit.__file__, datasets.__file__)"
    )
    ours, hugging_face = run(wheel_python, "-c", script, cwd=tmp_path).split()[-2:]
    assert Path(ours).is_relative_to(wheel_python.parents[1])
    assert not Path(hugging_face).is_relative_to(REPO / "datasets")


def test_wheel_runs_the_sweep_in_an_empty_folder(
    wheel_python: Path, tmp_path: Path
) -> None:
    run(wheel_python, *SWEEP, cwd=tmp_path)
    (results,) = (tmp_path / "results").glob("wheel-check-*")
    assert (results / "config.json").is_file()
