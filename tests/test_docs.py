"""The documentation: its code runs and shows what it says, its names are complete, its site would fetch nothing."""

import ast
import doctest
import html
import importlib.util
import inspect
import json
import pathlib
import re
import tomllib

import pytest
from conformance import public_storages

import momentum_optax as mo

ROOT = pathlib.Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
# Statements are blocks of `python`; sessions, with prompts and what is printed, are blocks of `pycon`.
CODE = re.compile(r"^```(python|pycon)\n(.*?)^```", re.S | re.M)
WITH_CODE = [page for page in PAGES if CODE.search(page.read_text())]


def name_of(page):
    return page.relative_to(DOCS).as_posix()


# Pages that train something take many seconds.
LONG = {"two-gradients.md"}
WITH_CODE_TO_RUN = [pytest.param(page, marks=pytest.mark.slow if name_of(page) in LONG else ()) for page in WITH_CODE]


@pytest.mark.parametrize("page", WITH_CODE_TO_RUN, ids=name_of)
def test_the_code_of_a_page_runs_and_prints_what_it_shows(page, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    names = {}
    for match in CODE.finditer(page.read_text()):
        line = page.read_text()[: match.start()].count("\n") + 1
        if match[1] == "python":
            exec(compile("\n" * line + match[2], str(page), "exec"), names)
            continue
        test = doctest.DocTestParser().get_doctest(match[2], names, name_of(page), str(page), line)
        test.globs = names  # the parser copies it
        found = []
        doctest.DocTestRunner(verbose=False, optionflags=doctest.ELLIPSIS).run(
            test, out=found.append, clear_globs=False
        )
        assert not found, "".join(found)


@pytest.mark.parametrize("page", [*WITH_CODE, ROOT / "README.md"], ids=lambda page: page.stem)
def test_code_is_named_by_its_kind_and_fits_the_column_of_a_page(page):
    for language, code in CODE.findall(page.read_text()):
        lines = code.splitlines()
        prompts = [line for line in lines if line.startswith((">>>", "..."))]
        assert bool(prompts) == (language == "pycon"), "only a pycon block is copied without its prompts"
        assert max(map(len, prompts or lines)) <= 80, "a wider line is broken where the reader does not want it"


def exported(module):
    """The public names of a module: what a package re-exports, what a plain module defines."""
    if hasattr(module, "__path__"):
        tree = ast.parse(inspect.getsource(module))
        imports = [node for node in tree.body if isinstance(node, ast.ImportFrom)]
        names = {alias.asname for node in imports for alias in node.names if alias.asname}
        stars = [f".{node.module}" for node in imports if node.names[0].name == "*"]
        return names.union(*(importlib.import_module(star, module.__name__).__all__ for star in stars))
    ours = {n: x for n, x in vars(module).items() if getattr(x, "__module__", "") == module.__name__}
    return {n for n, x in ours.items() if n[0] != "_" and (inspect.isfunction(x) or inspect.isclass(x))}


def public():
    for name in exported(mo):
        thing = getattr(mo, name)
        if not inspect.ismodule(thing):
            yield name
        else:
            yield from (f"{name}.{inner}" for inner in exported(thing))


def is_there(name):
    """Whether a dotted name, such as that of a state's class in its own module, leads somewhere."""
    thing = mo
    for part in name.split("."):
        thing = getattr(thing, part, None)
    return thing is not None


def loaded(name):
    """A module of the folder of the documentation, which is no package."""
    spec = importlib.util.spec_from_file_location(name, DOCS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_public_name_is_in_the_api_and_nothing_else_is():
    written_out = loaded("api_pages").on_page_markdown
    text = "".join(written_out(page.read_text()) for page in sorted((DOCS / "api").glob("*.md")))
    assert "docs/api_pages.py" in (ROOT / "mkdocs.yml").read_text()
    listed = re.findall(r"^::: momentum_optax\.(\S+)$", text, re.M)
    assert len(listed) == len(set(listed))
    missing = set(public()) - set(listed)
    unknown = {name for name in set(listed) - set(public()) if not is_there(name)}
    assert not missing, f"add a line ::: momentum_optax.NAME to a page of docs/api/ for {sorted(missing)}"
    assert not unknown, f"docs/api/ names what there is not: {sorted(unknown)}"


def test_every_class_of_a_state_is_on_the_page_of_states():
    text = "".join(path.read_text() for path in (ROOT / "momentum_optax").rglob("*.py"))
    classes = re.findall(r"^class ([A-Z]\w*State)\(NamedTuple\)", text, re.M)
    listed = re.findall(r"^::: momentum_optax\.\S*?(\w+State)$", (DOCS / "api" / "states.md").read_text(), re.M)
    assert sorted(listed) == sorted(classes)


def test_the_api_has_a_row_for_each_of_its_pages():
    index = (DOCS / "api" / "index.md").read_text()
    pages = {page.name for page in (DOCS / "api").glob("*.md")} - {"index.md"}
    assert set(re.findall(r"^\| \[.*?\]\((\S+)\) \|", index, re.M)) == pages


def reached(name):
    """What a dotted name such as `mo.outer.OuterMomentum.pull(retain=)` leads to, its parameters looked up too."""
    path, _, arguments = name.partition("(")
    thing = mo
    for part in path.removeprefix("mo.").split("."):
        fields = getattr(thing, "__dataclass_fields__", {})
        thing = fields[part] if part in fields else getattr(thing, part)
    wanted = set(re.findall(r"(\w+)=", arguments))
    assert not wanted or wanted <= inspect.signature(thing).parameters.keys(), name
    return thing


def renames():
    text = (ROOT / "CHANGELOG.md").read_text()
    for row in re.findall(r"^\| (`mo\..*?) \| (`mo\..*?) \|$", text, re.M):
        old, new = (re.findall(r"`(mo\..*?)`", cell) for cell in row)
        yield from zip(old, new, strict=True)


@pytest.mark.parametrize(("old", "new"), list(renames()))
def test_a_rename_of_the_changelog_leads_from_what_is_gone_to_what_is_there(old, new):
    reached(new)
    with pytest.raises((AttributeError, AssertionError)):
        reached(old)


def schedules_listed():
    return set(re.findall(r"^\| `mo\.schedules\.(\w+)", (DOCS / "schedules.md").read_text(), re.M))


def test_every_schedule_has_a_row():
    assert schedules_listed() == exported(mo.schedules)


def test_every_storage_has_a_row():
    rows = re.findall(r"^\| `mo\.storage\.(\w+)\(.*?\)` \| \S", (DOCS / "storage.md").read_text(), re.M)
    assert set(rows) == public_storages()


def test_every_notebook_is_listed_by_the_question_that_it_asks():
    rows = re.findall(r"^\| (.*\?) \| `notebooks/(\S+)` \|$", (DOCS / "notebooks.md").read_text(), re.M)
    asked = []
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        first = json.loads(path.read_text())["cells"][0]["source"]
        asked.append((first[0].strip().removeprefix("# "), path.name))
    assert sorted(rows) == sorted(asked)


def test_the_navigation_has_every_page_and_every_page_is_there():
    nav = (ROOT / "mkdocs.yml").read_text()
    nav = nav[nav.index("\nnav:") :]
    assert sorted(re.findall(r"\S+\.md\b", nav)) == sorted(map(name_of, PAGES))


needs_mkdocs = pytest.mark.skipif(importlib.util.find_spec("mkdocs") is None, reason="see `make docs` for mkdocs")


@needs_mkdocs
def test_a_site_that_would_fetch_something_is_refused(tmp_path):
    made = loaded("hooks")
    interactive = tmp_path / "interactive" / "momentum.html"
    interactive.parent.mkdir()
    interactive.write_text((DOCS / "interactive" / "momentum.html").read_text())
    page = tmp_path / "index.html"
    page.write_text('<a href="https://example.org">a link to follow</a><script src="local.js"></script>')
    made.on_post_build(config={"site_dir": tmp_path})
    (link,) = re.findall(r'<a href="(.*?)"', interactive.read_text())
    assert (DOCS / "interactive" / link).resolve() == DOCS / "interactive.html"
    with pytest.raises(made.PluginError, match="must have one place for a link"):
        made.on_post_build(config={"site_dir": tmp_path})  # it is taken
    interactive.write_text((DOCS / "interactive" / "momentum.html").read_text())
    page.write_text('<script async src="https://example.org/x.js"></script>')
    with pytest.raises(made.PluginError, match="elsewhere"):
        made.on_post_build(config={"site_dir": tmp_path})
    equation = '<p><span class="arithmatex">\\(a &lt; b_1\\)</span></p>'
    assert "<msub>" in made.on_page_content(equation)


@needs_mkdocs
def test_the_button_beside_a_session_copies_its_code_alone():
    markdown = pytest.importorskip("markdown")
    session = ">>> for x in '<\"':  # quoted\n...     print(x)\n<\n\"\n>>> 1 + 1\n2\n"
    marks = {"pymdownx.highlight": {"use_pygments": True, "pygments_lang_class": True}}
    extensions = ["pymdownx.superfences", "pymdownx.highlight"]
    text = f"```pycon\n{session}```\n\n```python\nprint(1)\n```\n"
    page = loaded("hooks").on_page_content(markdown.markdown(text, extensions=extensions, extension_configs=marks))
    (copied,) = re.findall('data-copy="(.*?)"', page, re.S)
    assert html.unescape(copied) == "for x in '<\"':  # quoted\n    print(x)\n1 + 1"
    assert "pygments_lang_class: true" in (ROOT / "mkdocs.yml").read_text()


def test_the_packages_for_the_documentation_wrap_signatures():
    # mkdocstrings leaves a signature on one line unless it finds one of the two.
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert {re.split(r"[>\[]", name)[0] for name in extras["docs"]} & {"ruff", "black"}


# Of the list of phrases that the house style does without.
DIALECT = (
    r"hangs? on\b", r"of (?:its|their) own\b", r"\bas (?:it is|they are)[.,;:]", r"\b(?:is|are) none\b", r"\bso many\b",
    r"\bevery published\b", r"\bsuperset\b",
)  # fmt: skip


def prose_of(page):
    """The text of a page, or of the cells of a notebook that are text."""
    if page.suffix == ".ipynb":
        cells = json.loads(page.read_text())["cells"]
        return "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    return re.sub(r"<!-- begin: map.*end: map -->", "", CODE.sub("", page.read_text()), flags=re.S)


@pytest.mark.parametrize(
    "page",
    [
        *PAGES,
        *sorted(ROOT.glob("*.md")),
        *sorted(ROOT.glob(".github/**/*.md")),
        *sorted(ROOT.glob("notebooks/*.ipynb")),
    ],
    ids=lambda page: page.stem,
)
def test_the_prose_is_the_fields(page):
    assert not re.findall("|".join(DIALECT), " ".join(prose_of(page).split()))
    assert not re.match(r"# .*\n+(What|How|Where)\b", prose_of(page)) or page.suffix == ".ipynb"
