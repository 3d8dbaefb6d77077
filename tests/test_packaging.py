"""What a user installs."""

import ast
import pathlib
import re
import subprocess
import sys
import tomllib
import zipfile

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]


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
    # Run from a checkout: a user's own `examples` or `benchmarks` must not be shadowed.
    assert not [n for n in wheel.namelist() if n.startswith(("examples", "benchmarks", "tests"))]


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


def requirements():
    """Every requirement with its bound, by the name of its package; of the package itself and of its extras."""
    for line in [*PROJECT["dependencies"], *(line for extra in EXTRAS.values() for line in extra)]:
        yield re.match(r"([\w-]+)(?:\[[\w,]+\])?(?:>=([\d.]+))?", line).groups()


PINS = dict(re.findall(r"^([\w-]+)==([\d.]+)$", (ROOT / "tests" / "oldest.txt").read_text(), re.M))


def test_the_oldest_versions_that_are_tested_are_the_bounds_of_the_requirements():
    assert PINS["jaxlib"] == PINS["jax"]
    bounds = {name: bound for name, bound in requirements() if bound and name in PINS}
    assert bounds.keys() == PINS.keys() - {"jaxlib"}
    for name, bound in bounds.items():
        assert (PINS[name] + ".").startswith(bound + "."), name


def test_a_way_around_an_old_version_is_for_the_oldest_one():
    """Comments with a version say what it lacks; once it is not the oldest any more, the way around it can go."""
    found = []
    for folder in ("momentum_optax", "examples", "benchmarks", "tests"):
        for path in (ROOT / folder).rglob("*.py"):
            for name, version in re.findall(r"#.*?\b(JAX|Flax|Optax) (\d+\.\d+\.\d+)", path.read_text()):
                found.append((path.relative_to(ROOT).as_posix(), name, version))
    assert len(found) >= 6
    assert [row for row in found if PINS[row[1].lower()] != row[2]] == []


def test_a_bound_stands_in_one_place():
    """What several extras need has its bound in one of them, which the others name, or the same bound."""
    bounds = {}
    for name, bound in requirements():
        bounds.setdefault(name, set()).add(bound)
    assert all(len(found - {None}) <= 1 for found in bounds.values()), bounds


def imported(folder):
    """The packages that the files of a folder import, at the top or within functions."""
    found = set()
    for path in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module]
            found |= {name.partition(".")[0] for name in names}
    return found - sys.stdlib_module_names


# The names of packages that are not those of their modules.
PACKAGE_OF = {"sklearn": "scikit-learn", "orbax": "orbax-checkpoint", "momentum_optax": "momentum-optax"}


@pytest.mark.parametrize(("folder", "extra"), [("examples", "demo"), ("benchmarks", "bench")])
def test_the_extras_name_what_demos_and_benchmarks_import(folder, extra):
    named = {re.match(r"[\w-]+", line)[0] for key in {extra, "demo"} for line in EXTRAS[key]}
    # With the package and what it needs; of those that are not installed with an extra benchmarks ask whether they are.
    named |= {"momentum-optax", "jax", "optax", "numpy", "examples", "torch", "flashoptim", "libtpu"}
    assert {PACKAGE_OF.get(name, name) for name in imported(folder)} <= named
