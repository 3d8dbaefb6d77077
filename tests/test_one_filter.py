"""docs/data/methods.toml, the published momentum methods: every linear row is run, every equality computed.

`python tests/test_one_filter.py` writes the tables of docs/one-filter.md anew.
"""

import pathlib
import re
import tomllib
from cmath import exp
from math import sqrt

import numpy as np
import optax
import pytest
from conformance import rule_functions

import momentum_optax as mo
from tests.rules.oracles import START, gradient

ROOT = pathlib.Path(__file__).parents[1]
PAGE = ROOT / "docs" / "one-filter.md"
DATA = tomllib.loads((ROOT / "docs" / "data" / "methods.toml").read_text())
METHODS, IDENTITIES = DATA["method"], DATA["identity"]
LINEAR = [method for method in METHODS if method["kind"] != "not linear"]
by_name = {"ids": lambda method: method["name"].replace(" ", "-")}
STEPS = 60


def thetas(steps):
    """OGM's, from 1; the last one is larger."""
    out = [1.0]
    for i in range(steps):
        out.append((1 + sqrt(1 + (8 if i == steps - 1 else 4) * out[-1] ** 2)) / 2)
    return out


def slow(period, decay, rate):
    """An outer heavy ball on the displacement of `period` steps, as a filter."""

    def meets(t):
        return float((t + 1) % period == 0)

    return mo.Filter(
        A=((lambda t: 1 - meets(t), 0.0), (meets, lambda t: 1 - meets(t) * (1 - decay))),
        B=(lambda t: 1 - meets(t), meets),
        C=(lambda t: meets(t) * (rate - 1), lambda t: meets(t) * rate * decay),
        D=lambda t: 1 + meets(t) * (rate - 1),
    )


def latest(period):
    """Plain descent, and its parameters at the last two multiples of `period` as velocities."""

    def stays(t):
        return float((t + 1) % period != 0)

    return mo.Filter(
        A=((stays, 0.0), (lambda t: 1 - stays(t), stays)), B=(stays, 1.0), C=(0.0, 0.0), D=1.0, lookahead=(0.5, 0.5)
    )


def item(L, mu):
    """ITEM with the velocity z - y: its coefficients for 200 steps."""
    q, A, pairs = mu / L, 0.0, []
    for _ in range(201):
        old, A = A, ((1 + q) * A + 2 * (1 + sqrt((1 + A) * (1 + q * A)))) / (1 - q) ** 2
        pairs.append((old / ((1 - q) * A), ((1 - q) ** 2 * A - (1 + q) * old) / (2 * (1 + q + q * old))))

    def entry(function):
        return lambda t: function(pairs[t + 1][0], pairs[t][1])

    return mo.Filter(
        A=entry(lambda b, d: b * (1 - q * d)),
        B=entry(lambda b, d: b * (1 - d) / L),
        C=entry(lambda b, d: (b - 1) * (1 - q * d)),
        D=entry(lambda b, d: (d + b * (1 - d)) / L),
        lookahead=1.0,
    )


def names(row):
    """What the expressions of a row may use; a `let` that is a string is an expression itself."""
    known = {"mo": mo, "sqrt": sqrt, "exp": exp, "thetas": thetas, "slow": slow, "latest": latest, "item": item}
    for name, value in row.get("let", {}).items():
        known[name] = eval(value, known) if isinstance(value, str) else value
    return known


def cited_run(method):
    """The points at which the cited loop takes its gradients, and those that it says to evaluate."""
    asked = []

    def g(point):
        asked.append(point)
        return gradient(point)

    loop, value = (compile(method.get(k, "None"), method["name"], m) for k, m in (("loop", "exec"), ("value", "eval")))
    zeros = dict.fromkeys(loop.co_names, 0.0)
    scope = zeros | names(method) | dict.fromkeys(method["start"].split(), START)
    scope |= {"a": method.get("rate", 0.1), "g": g, "max": max, "sum": sum, "len": len}
    exec(method.get("init", ""), scope)
    values = []
    for scope["t"] in range(STEPS):
        exec(loop, scope)
        assert len(asked) == scope["t"] + 1, "a step takes one gradient"
        values.append(eval(value, scope))
    return asked, values if "value" in method else None


def our_run(rule, rate):
    """The stored points, from the first to the one after the last step, and those that `lookahead` leads to."""
    x, v = START, np.zeros((rule.order, len(START)))
    stored, evaluated = [x], []
    for t in range(STEPS):
        g, now = gradient(x), rule.at(t)
        A, B, C, D = now.matrices()
        x, v = x - rate * (np.tensordot(C, v, 1) + D * g), np.tensordot(A, v, 1) + np.multiply.outer(B, g)
        stored.append(x)
        evaluated.append(x + rate * np.tensordot(np.float64(now.lookahead), v, 1))
    return stored, evaluated


@pytest.mark.parametrize("method", LINEAR, **by_name)
def test_a_linear_row_takes_its_gradients_where_the_cited_loop_does(method):
    asked, values = cited_run(method)
    rule = eval(method["here"], names(method))
    stored, evaluated = our_run(rule, method.get("rate", 0.1))
    np.testing.assert_allclose(stored[:-1], asked, rtol=0, atol=1e-12)
    assert abs(stored[-1] - stored[-2]).max() > 1e-5, "it stands still"
    if values is not None:
        np.testing.assert_allclose(evaluated, values, rtol=0, atol=1e-12)


def laws():
    """For each method that is optimal on average: curvatures and weights of its law, of mean 1, for sums over it."""
    # Gauss's points for sqrt((L - x)(x - l)), which is x times the density of Marchenko and Pastur.
    angle, r = np.pi * np.arange(1, 200) / 200, 0.5
    x = 1 + r + 2 * sqrt(r) * np.cos(angle)
    nodes, weights = np.polynomial.laguerre.laggauss(60)
    return {
        "Marchenko-Pastur acceleration": (x, np.sin(angle) ** 2 / x),
        "Average-case acceleration, exponential law": (nodes, weights),
    }


@pytest.mark.parametrize("name", laws())
def test_what_is_optimal_on_average_has_residuals_that_are_orthogonal_in_curvature_times_the_law(name):
    # Then, and only then, no other mixture of the gradients is closer to the minimum on average.
    (method,) = (m for m in METHODS if m["name"] == name)
    rule, (x, weights) = eval(method["here"], names(method)), laws()[name]
    distance, v, residuals = np.ones_like(x), np.zeros_like(x), []
    for t in range(12):
        residuals.append(distance)
        A, B, C, D = (np.squeeze(np.float64(c)) for c in rule.at(t).matrices())
        g = x * distance
        distance, v = distance - (C * v + D * g), A * v + B * g
    products = np.array(residuals) * (x * weights) @ np.transpose(residuals)
    size = np.sqrt(np.diag(products))
    np.testing.assert_allclose(products / np.outer(size, size), np.eye(12), rtol=0, atol=1e-10)


def from_step(rule, step):
    """The rule with its coefficients shifted, so that special first steps are over."""
    return rule.at(step) if step else rule


@pytest.mark.parametrize("method", [m for m in LINEAR if "same" in m], **by_name)
def test_the_rules_that_are_said_to_be_the_same_are(method):
    known, late = names(method), method.get("late", False)
    rule = from_step(eval(method["here"], known), late)
    for other, rate in method["same"]:
        assert mo.equivalent(rule, from_step(eval(other, known), late), (1.0, eval(rate, known)), rtol=1e-12), other


@pytest.mark.parametrize("identity", IDENTITIES, ids=lambda row: row["text"][:30].replace(" ", "-"))
def test_an_identity_is_one(identity):
    known = names(identity)
    (f, rate), (g, other) = ((eval(rule, known), eval(rate, known)) for rule, rate in identity["rules"])
    assert mo.equivalent(f, g, (rate, other), rtol=1e-12)
    # Not because both are nothing, or one rule under one name.
    assert not mo.equivalent(f, g, (rate, 1.01 * other), rtol=1e-3)
    assert identity["rules"][0] != identity["rules"][1]


def test_every_row_is_whole():
    assert len({m["name"] for m in METHODS}) == len(METHODS) >= 60
    assert [m["year"] for m in METHODS] == sorted(m["year"] for m in METHODS)
    assert len(IDENTITIES) >= 8
    for method in METHODS:
        assert method["kind"] in ("linear", "periodic", "not linear"), method["name"]
        assert re.match(r"(code: |text: |run: |no$)", method["read"]), method["name"]
        needed = {"why"} if method["kind"] == "not linear" else {"here", "loop", "start"}
        allowed = {"name", "year", "source", "read", "kind", "here", "note", "why"}
        allowed |= set() if method["kind"] == "not linear" else {"loop", "start", "init", "let", "rate", "value"}
        allowed |= set() if method["kind"] == "not linear" else {"same", "late", "shown"}
        assert needed <= set(method) <= allowed, (method["name"], set(method) - allowed)
        if method["kind"] == "not linear" and "here" in method:
            assert callable(eval(method["here"], {"mo": mo, "optax": optax})), method["name"]


def test_a_row_is_periodic_where_its_coefficients_repeat_and_not_else():
    for method in LINEAR:
        rule = eval(method["here"], names(method))
        rows = [rule.at(t).coefficients() for t in range(130)]
        repeats = [
            p for p in range(1, 61) if rows[1:60] == rows[1 + p : 60 + p] and rows[60:70] == rows[60 + p : 70 + p]
        ]
        constant = bool(repeats) and repeats[0] == 1
        assert (bool(repeats) and not constant) == (method["kind"] == "periodic"), (method["name"], repeats[:1])


def test_every_rule_of_the_package_has_a_row():
    text = " ".join(m.get("here", "") + " ".join(o for o, _ in m.get("same", ())) for m in METHODS)
    missing = {name for name in rule_functions() if not re.search(rf"mo\.(contrib\.)?{name}\b", text)}
    assert missing <= {"aggregated_exponential"}


def normal_form(method):
    """The three numbers of a row's normal form, once its first steps are over; a word where it has none."""
    rule = eval(method["here"], names(method))
    if method["kind"] == "periodic":
        return "periodic"
    if any(rule.at(t).coefficients() != rule.at(10).coefficients() for t in (11, 50, 99)):
        return "by step"
    try:
        return ", ".join(f"{x:.4g}" for x in rule.at(10).normal_form())
    except ValueError:
        return "pole 0" if rule.pruned().order == 1 else f"order {rule.pruned().order}"


def line(method):
    """The row of a method in the page's table."""
    cells = [str(method["year"]), f"{method['name']} ({method['source']})"]
    if method["kind"] == "not linear":
        here = f"`{method['here']}`; " if "here" in method else ""
        cells += ["no", here + method["why"], ""]
    else:
        note = f"; {method['note']}" if "note" in method else ""
        values = ", ".join(f"{k} = {v}" for k, v in method.get("let", {}).items() if not isinstance(v, str))
        others = "".join(f"; = `{other}`{times(rate)}" for other, rate in method.get("same", ()))
        others += " from the second step on" if method.get("late") else ""
        cells += [method["kind"], method.get("shown", f"`{method['here']}`") + others + note]
        cells += [normal_form(method) + (f" at {values}" if values else "")]
    return "| " + " | ".join([*cells, method["read"]]) + " |"


def times(rate):
    return "" if rate == "1.0" else f" at {rate} times the rate"


def with_tables(text):
    head = "| year | method | linear | here | normal form: scale, decay, nu | read |\n|---|---|---|---|---|---|\n"
    table = head + "\n".join(map(line, METHODS))
    listed = "\n".join(f"{i}. {row['text']}" for i, row in enumerate(IDENTITIES, 1))
    counts = {kind: sum(m["kind"] == kind for m in METHODS) for kind in ("linear", "periodic", "not linear")}
    said = f"{len(METHODS)} methods: {counts['linear']} are linear, {counts['periodic']} linear with a period, "
    said += f"{counts['not linear']} not."
    for name, new in (("counts", said), ("identities", listed), ("table", table)):
        begin, end = f"<!-- begin: {name} -->\n", f"<!-- end: {name} -->"
        text = text[: text.index(begin) + len(begin)] + "\n" + new + "\n\n" + text[text.index(end) :]
    return text


def test_the_page_is_that_of_the_data():
    assert with_tables(PAGE.read_text()) == PAGE.read_text(), "write it anew, with python tests/test_one_filter.py"


if __name__ == "__main__":
    PAGE.write_text(with_tables(PAGE.read_text()))
