"""A built wheel holds each file once and works away from the source tree."""

from __future__ import annotations

import configparser
import os
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[2]
BUILD_INPUTS = ("LICENSE", "README.md", "kasmina_fx", "passes", "pyproject.toml")

# Never imports kasmina_fx before it compiles: the entry point alone must lead torch to the backend.
COMPILE_BY_NAME = """
import sys
import torch

assert "kasmina_fx" not in sys.modules
model = torch.nn.Linear(4, 3)
x = torch.randn(2, 4)
compiled = torch.compile(model, backend="kasmina")
torch.testing.assert_close(compiled(x), model(x))

import kasmina_fx.passes
print(kasmina_fx.__file__)
print(kasmina_fx.passes.__file__)
"""


class Dists(NamedTuple):
    """What was built from one copy of the tree."""

    sdist: Path
    wheel: Path
    wheel_of_sdist: Path


def run_python(*args: str | Path, cwd: Path, python: Path | str = sys.executable) -> str:
    env = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    done = subprocess.run([python, *args], cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def build(source: Path, out: Path, *formats: str) -> None:
    run_python(
        "-m", "build", "--no-isolation", "--outdir", out, *formats, source, cwd=source.parent
    )


def package_files() -> list[str]:
    """Every module and C++ source of the tree, under its name in a package, and py.typed."""
    kinds = ("*.py", "*.cpp", "*.h")
    own = [p.relative_to(ROOT) for kind in kinds for p in (ROOT / "kasmina_fx").rglob(kind)]
    names = [path.as_posix() for path in own if path.parts[1] != "passes"]
    names += [
        f"kasmina_fx/{path.relative_to(ROOT).as_posix()}"
        for path in (ROOT / "passes").rglob("*.py")
    ]
    return sorted([*names, "kasmina_fx/py.typed"])


@pytest.fixture(scope="module")
def dists(tmp_path_factory: pytest.TempPathFactory) -> Dists:
    # Built from a copy: no build output lands in the tree, and none from before is picked up.
    base = tmp_path_factory.mktemp("dists")
    tree = base / "tree"
    tree.mkdir()
    for name in BUILD_INPUTS:
        if (ROOT / name).is_dir():
            ignore = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / name, tree / name, symlinks=True, ignore=ignore)
        else:
            shutil.copy(ROOT / name, tree / name)
    build(tree, base / "direct", "--wheel")
    build(tree, base / "through_sdist")  # without a format: an sdist, then a wheel from that
    (wheel,) = (base / "direct").glob("*.whl")
    (sdist,) = (base / "through_sdist").glob("*.tar.gz")
    (wheel_of_sdist,) = (base / "through_sdist").glob("*.whl")
    return Dists(sdist, wheel, wheel_of_sdist)


@pytest.fixture(params=["wheel", "wheel_of_sdist"])
def wheel(request: pytest.FixtureRequest, dists: Dists) -> Path:
    path = getattr(dists, request.param)
    assert isinstance(path, Path)
    return path


def test_wheel_holds_each_file_once(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert sorted(name for name in names if ".dist-info/" not in name) == package_files()


def test_wheel_registers_the_backend(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("/entry_points.txt"))
        text = archive.read(name).decode()
    entry_points = configparser.ConfigParser()
    entry_points.read_string(text)
    assert dict(entry_points["torch_dynamo_backends"]) == {"kasmina": "kasmina_fx.backend:kasmina"}


def test_sdist_holds_plain_files_only(dists: Dists) -> None:
    # A link would unpack to a second copy of passes/, or to nothing where links are not allowed.
    with tarfile.open(dists.sdist) as archive:
        members = archive.getmembers()
    assert [member.name for member in members if not (member.isfile() or member.isdir())] == []
    inner = [member.name.partition("/")[2] for member in members if member.isfile()]
    assert len(inner) == len(set(inner))
    assert not any(name.startswith("kasmina_fx/passes/") for name in inner)


@pytest.mark.parametrize(
    "wheel", ["wheel", pytest.param("wheel_of_sdist", marks=pytest.mark.slow)], indirect=True
)
def test_installed_wheel_compiles_by_name(wheel: Path, tmp_path: Path) -> None:
    new = tmp_path / "venv"
    venv.create(new, symlinks=True)
    python = new / "bin" / "python"
    # Installed before the .pth file below is there, so that pip sees an empty environment.
    install = ("install", "--quiet", "--no-deps", "--no-index", "--disable-pip-version-check")
    run_python("-m", "pip", "--python", python, *install, wheel, cwd=tmp_path)

    # torch and the rest come from the environment that runs this test, behind the new one's own
    # packages. A .pth file of that environment, an editable kasmina_fx for one, is not followed.
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    own = Path(run_python("-c", code, cwd=tmp_path, python=python).strip())
    shared = [entry for entry in sys.path if Path(entry).name in {"site-packages", "dist-packages"}]
    (own / "shared.pth").write_text("\n".join(shared) + "\n")

    out = run_python("-I", "-c", COMPILE_BY_NAME, cwd=tmp_path, python=python)
    assert out.split() == [
        str(own / "kasmina_fx" / "__init__.py"),
        str(own / "kasmina_fx" / "passes" / "__init__.py"),
    ]
