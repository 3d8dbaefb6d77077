"""What a user installs."""

import pathlib
import re
import subprocess
import sys
import zipfile

import pytest

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    out = tmp_path_factory.mktemp("dist")
    # With the installed hatchling: in an isolated environment it would be downloaded, and this runs without a network.
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(ROOT)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    return zipfile.ZipFile(next(out.glob("*.whl")))


def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    names = [n for n in wheel.namelist() if ".dist-info/" not in n]
    package = ROOT / "momentum_optax"
    sources = [p for p in package.rglob("*") if p.suffix == ".py" or p.name == "py.typed"]
    assert sorted(names) == sorted(p.relative_to(ROOT).as_posix() for p in sources)
    assert "momentum_optax/py.typed" in names


def test_the_wheel_needs_only_jax_and_optax(wheel):
    metadata = next(n for n in wheel.namelist() if n.endswith("/METADATA"))
    lines = wheel.read(metadata).decode().splitlines()
    needed = [line.split()[1] for line in lines if line.startswith("Requires-Dist: ") and "extra ==" not in line]
    assert sorted(n.split(">")[0] for n in needed) == ["jax", "optax"]


def test_the_description_on_an_index_needs_nothing_beside_it(wheel):
    metadata = next(n for n in wheel.namelist() if n.endswith("/METADATA"))
    description = wheel.read(metadata).decode().partition("\n\n")[2]
    assert not re.search(r"\]\(|<img|href=", description), "an index shows the text without the files of the repository"
    (block,) = re.findall(r"^```python\n(.*?)^```", description, re.S | re.M)
    exec(block, {})
    first, readme = (text.split("\n\n")[1] for text in (description, (ROOT / "README.md").read_text()))
    assert " ".join(first.split()) == re.sub(r"\[(.*?)\]\(.*?\)", r"\1", " ".join(readme.split()))
