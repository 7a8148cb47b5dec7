"""The wheel holds the library and nothing else, and works with the core dependencies alone."""

import importlib.metadata
import pathlib
import re
import shutil
import subprocess
import sys
import zipfile

import pytest
import uv

ROOT = pathlib.Path(__file__).parents[1]


def run(*command, **kwargs):
    """Runs a command; a failure shows what it printed."""
    done = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, check=False, **kwargs
    )
    assert done.returncode == 0, f"{command} failed:\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy, since setuptools writes next to its sources and reuses what it finds."""
    source, out = tmp_path_factory.mktemp("source") / "proma_jax", tmp_path_factory.mktemp("wheel")
    left_out = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist", "runs")
    shutil.copytree(ROOT, source, ignore=left_out)
    run(uv.find_uv_bin(), "build", "--wheel", "--out-dir", out, source)
    (path,) = out.glob("*.whl")
    return path


def test_wheel_holds_the_library_alone(wheel):
    sources = {p.relative_to(ROOT).as_posix() for p in (ROOT / "proma_jax").rglob("*.py")}
    with zipfile.ZipFile(wheel) as archive:
        files = {name for name in archive.namelist() if ".dist-info/" not in name}
        (license_file,) = (name for name in archive.namelist() if name.endswith("/LICENSE"))
        assert archive.read(license_file) == (ROOT / "LICENSE").read_bytes()
    assert files == sources | {"proma_jax/py.typed"}


def test_wheel_requires_the_core_dependencies_alone(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("/METADATA"))
        metadata = archive.read(name).decode()
    required = re.findall(r"^Requires-Dist: ([\w-]+)[^;\n]*$", metadata, flags=re.MULTILINE)
    assert sorted(required) == ["jax", "optax"]


def test_library_alone_imports_in_a_clean_environment(wheel, tmp_path):
    """Its dependencies at the versions of this environment, which are in uv's cache."""
    constraints = tmp_path / "constraints.txt"
    constraints.write_text(
        "".join(
            f"{dist.name}=={dist.version}\n"
            for dist in importlib.metadata.distributions()
            if dist.name != "proma-jax"
        )
    )
    venv = tmp_path / "venv"
    python = venv / "bin" / "python"
    run(uv.find_uv_bin(), "venv", "--python", sys.executable, venv)
    run(uv.find_uv_bin(), "pip", "install", "--python", python, "--constraints", constraints, wheel)
    program = "import proma_jax; print(proma_jax.__file__)"
    location = run(python, "-I", "-c", program, cwd=tmp_path)
    assert pathlib.Path(location.strip()).is_relative_to(venv)
    installed = run(uv.find_uv_bin(), "pip", "freeze", "--python", python)
    assert not re.search(r"^(flax|matplotlib|pytest|tyro)==", installed, flags=re.MULTILINE)
