"""The pages of the rules: every rule is on the page of its family, and the tables of the index are computed.

`python tests/test_docs_rules.py` writes the table of the groups anew.
"""

import importlib
import pathlib
import re

import pytest

import momentum_optax as mo

PAGES = pathlib.Path(__file__).parents[1] / "docs" / "rules"
INDEX = PAGES / "index.md"
BEGIN, END = "<!-- begin: groups -->\n", "<!-- end: groups -->\n"
NAVIGATION = (PAGES.parents[1] / "mkdocs.yml").read_text()
GROUPS = [name for name in re.findall(r"rules/([\w-]+)\.md", NAVIGATION) if name != "index"]


def rules_of(group):
    """The names of the rules of a family, as in its module, and those of `contrib` that its page calls."""
    family = importlib.import_module(f"momentum_optax.rules.{group.replace('-', '_')}")
    calls = re.findall(r"`mo\.contrib\.(\w+)(?=[(`])", (PAGES / f"{group}.md").read_text())
    return [*family.__all__, *dict.fromkeys(calls)]


def the_groups():
    """A row for each page: its title, and the rules that it describes."""
    rows = ["", "| page | rules |", "|---|---|"]
    for group in GROUPS:
        title = (PAGES / f"{group}.md").read_text().partition("\n")[0].removeprefix("# ")
        rows.append(f"| [{title}]({group}.md) | {', '.join(f'`{name}`' for name in rules_of(group))} |")
    return "\n".join([*rows, "", ""])


def with_groups(text):
    start, end = text.index(BEGIN) + len(BEGIN), text.index(END)
    return text[:start] + the_groups() + text[end:]


def test_the_table_of_the_groups_is_that_of_the_pages():
    assert with_groups(INDEX.read_text()) == INDEX.read_text(), "write it anew: python tests/test_docs_rules.py"


def test_every_rule_has_a_place_on_a_page_of_its_group():
    from conformance import public_rules

    found = [name for group in GROUPS for name in rules_of(group)]
    assert sorted(found) == sorted(public_rules()), "each on one page"


@pytest.mark.parametrize("group", GROUPS)
def test_a_page_says_something_of_each_of_its_rules(group):
    text = (PAGES / f"{group}.md").read_text()
    missing = [name for name in rules_of(group) if not re.search(rf"\bmo\.(contrib\.)?{name}\b", text)]
    assert not missing, f"docs/rules/{group}.md says nothing of {missing}"


def test_the_table_of_normal_forms_is_computed():
    rows = re.findall(r"^\| (`[^|]*\)`) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|", INDEX.read_text(), re.M)
    assert len(rows) >= 11
    late = 10**6  # past every special first step
    for calls, *numbers in rows:
        for call in re.findall(r"`([^`]+)`", calls):
            form = eval(f"mo.{call}", {"mo": mo}).at(late).normal_form()
            assert [f"{x:.4g}" for x in form] == numbers, call


if __name__ == "__main__":
    INDEX.write_text(with_groups(INDEX.read_text()))
