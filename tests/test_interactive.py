"""The interactive page: it loads nothing, in a browser its numbers are those of `mo.analysis`, its sliders work."""

import html
import itertools
import json
import math
import pathlib
import re
import shutil
import subprocess

import numpy as np
import pytest

import momentum_optax as mo

PAGE = pathlib.Path(__file__).parents[1] / "docs" / "interactive" / "momentum.html"
TEXT = PAGE.read_text()
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
needs_browser = pytest.mark.skipif(BROWSER is None, reason="needs Chromium or Chrome on the path")

RULES = {
    "descent": lambda s: mo.heavy_ball(0.0),
    "heavy_ball": lambda s: mo.heavy_ball(s["decay"]),
    "ema": lambda s: mo.ema(s["decay"]),
    "nesterov": lambda s: mo.nesterov(s["decay"]),
    "quasi_hyperbolic": lambda s: mo.quasi_hyperbolic(s["decay"], s["nu"]),
    "aggregated": lambda s: mo.aggregated((0.0, s["decay"], s["slow"])),
    "complex_heavy_ball": lambda s: mo.complex_heavy_ball(s["decay"], s["angle"]),
    "optimistic": lambda s: mo.optimistic(1.0, s["beta"]),
    "primal_averaging": lambda s: mo.primal_averaging(s["decay"], s["nu"]),
    "lookahead": lambda s: mo.lookahead(s["period"], min(s["outer"], 1.0)),
    "outer_nesterov": lambda s: mo.outer_nesterov(s["period"], s["outer"], s["decay"]),
}
PERIODS = {0.0: 1, 0.413: 6, 0.907: 7, 0.9893: 24}
# Rates and decays are odd so that no two roots of a loop meet, where float64 has half its digits only.
CASES = [
    {
        "rule": rule,
        "decay": decay,
        "nu": 0.37,
        "slow": 0.9931,
        "angle": 0.83,
        "period": PERIODS[decay],
        "outer": 1.13 if rate > 1 else 0.71,
        "beta": 0.61,
        "rate": rate,
        "kappa": kappa,
    }
    for rule, decay, rate, kappa in itertools.product(
        RULES, (0.0, 0.413, 0.907, 0.9893), (0.00713, 0.231, 1.17), (1, 173.0)
    )
]
STEPS = 40


def rule_of(s):
    """The rule of some settings, past special first steps; one with a period unchanged."""
    rule = RULES[s["rule"]](s)
    return rule.at(10**6) if rule.period == 1 else rule


def test_the_page_is_one_file_that_loads_nothing():
    assert not re.findall(
        r"https?:|//[a-z]|@import|url\(|\b(?:src|href)=|fetch\(|XMLHttpRequest|WebSocket|import\(", TEXT
    )


def test_the_page_knows_the_rules_of_the_table_above():
    block = TEXT[TEXT.index("const RULES = {") : TEXT.index("// ---- Small matrices")]
    assert set(re.findall(r"^  (\w+): \{ label", block, re.M)) == set(RULES)


def test_the_worst_curvature_of_its_rules_is_at_an_end():
    rng = np.random.default_rng(0)
    for _ in range(500):
        s = dict(zip(("decay", "slow"), 1 - 10 ** -rng.uniform(0, 3, 2), strict=True))
        s |= {"nu": rng.uniform(), "angle": rng.uniform(0, math.pi), "beta": rng.uniform(0, 3)}
        s |= {"period": int(rng.integers(1, 65)), "outer": rng.uniform(0.01, 1.2), "rule": rng.choice(list(RULES))}
        rule, rate = rule_of(s), 10 ** rng.uniform(-4, 0.8)
        products = np.geomspace(rate / 10 ** rng.uniform(0, 4), rate, 200)
        radius = mo.analysis.spectral_radius(rule, products, 1.0)
        # With a period, or where one plain step would end it.
        inside = rule.period > 1 and products[0] < 1 < products[-1]
        ends = [radius[0], radius[-1], *([mo.analysis.spectral_radius(rule, 1.0, 1.0)] if inside else [])]
        assert radius.max() <= max(ends) + 1e-9, (s, rate)


def luminance(color):
    parts = (int(color[i : i + 2], 16) / 255 for i in (1, 3, 5))
    linear = [x / 12.92 if x <= 0.03928 else ((x + 0.055) / 1.055) ** 2.4 for x in parts]
    return np.dot([0.2126, 0.7152, 0.0722], linear)


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_every_color_of_a_text_can_be_read(scheme):
    """At least 4.5 to 1 on either background: WCAG 2.2, criterion 1.4.3."""
    block = re.findall(r":root \{(.*?)\}", TEXT, re.S)[scheme]
    colors = dict(re.findall(r"--(\w+): (#\w{6})", block))
    for back in ("card", "back"):
        for ink in ("ink", "soft", "blue", "red", "green", "grey"):
            if back == "card" or ink in ("ink", "soft", "blue"):
                high, low = sorted((luminance(colors[ink]), luminance(colors[back])), reverse=True)
                assert (high + 0.05) / (low + 0.05) >= 4.5, (ink, back)


def ask(tmp_path, script, query="", width=None):
    """What `script`, run at the end of the page in a browser, returns, by way of JSON."""
    copy = tmp_path / "page.html"
    if width is not None:  # a window has at least 500 pixels
        script = f"document.body.style.width = '{width}px'; draw(); {script}"
    answer = (
        f"JSON.stringify((() => {{ {script} }})(), (_, x) => typeof x === 'number' && !isFinite(x) ? String(x) : x)"
    )
    shown = f"let answer; try {{ answer = {answer}; }} catch (e) {{ answer = JSON.stringify(String(e.stack)); }}"
    out = "document.body.insertAdjacentHTML('beforeend', '<pre id=answer></pre>'); $('answer').textContent = answer;"
    copy.write_text(TEXT.replace("</body>", f"<script>{shown} {out}</script></body>"))
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom"]
    command = [BROWSER, *options, f"--window-size={max(width or 1280, 500)},1000", f"{copy.as_uri()}{query}"]
    run = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    found = re.search(r'<pre id="answer">(.*?)</pre>', run.stdout, re.S)
    assert found, run.stderr[-2000:]
    return json.loads(html.unescape(found[1]))


def expected(case):
    rule, rate, mu = rule_of(case), case["rate"], 1 / case["kappa"]
    worst = float(mo.analysis.contraction(rule, rate, mu, 1.0))
    return {
        "dc_gain": mo.analysis.dc_gain(rule),
        "effective_learning_rate": mo.analysis.effective_learning_rate(rule, rate),
        "half_life": mo.analysis.half_life(rule),
        "mean_lag": mo.analysis.mean_lag(rule),
        "noise_gain": mo.analysis.noise_gain(rule),
        "stability_limit": mo.analysis.stability_limit(rule, 1.0),
        "radius_at_L": mo.analysis.spectral_radius(rule, rate, 1.0),
        "radius_at_mu": mo.analysis.spectral_radius(rule, rate, mu),
        "contraction": worst,
        "iterations": float(mo.analysis.asymptotic_iterations(worst)),
    }


@needs_browser
def test_its_numbers_are_those_of_the_analysis(tmp_path):
    script = f"""
      const cases = {json.dumps(CASES)};
      return cases.map(s => {{
        const f = RULES[s.rule].filter(s);
        return [numbers(s), impulse(f, {STEPS}), run(f, s.rate, ([x]) => [0.8 * x], [1], {STEPS}).map(p => p[0])];
      }});
    """
    answers = ask(tmp_path, script)
    assert len(answers) == len(CASES)
    for case, (found, impulse, path) in zip(CASES, answers, strict=True):
        rule = rule_of(case)
        wanted = expected(case)
        assert found.keys() == wanted.keys()
        for name, value in wanted.items():
            assert float(found[name]) == pytest.approx(float(value), rel=1e-9, abs=1e-9), (case, name)
        np.testing.assert_allclose(impulse, mo.analysis.impulse_response(rule, STEPS), rtol=1e-9, atol=1e-12)
        curve = mo.analysis.error_curve(rule, case["rate"], 0.8, STEPS)
        np.testing.assert_allclose(path, curve, rtol=1e-9, atol=1e-9 * abs(curve).max())


@needs_browser
def test_the_address_sets_it_the_sliders_move_it_and_it_draws(tmp_path):
    script = """
      const shown = () => Object.fromEntries(CARDS.map(([name]) => [name, Number($(name).dataset.value)]));
      const ink = id => { const c = $(id), d = c.getContext("2d").getImageData(0, 0, c.width, c.height).data;
        return new Set(Array.from({length: d.length / 4}, (_, i) => d.slice(4 * i, 4 * i + 4).join())).size; };
      const first = [{...settings}, shown(), ["impulse", "bowl", "basins", "map"].map(ink)];
      const move = (id, value) => { $(id).value = value; $(id).dispatchEvent(new Event("input")); };
      move("decay", 2); const decay = [{...settings}, shown()];
      $("matched").checked = true; move("decay", 1); const matched = [{...settings}, shown()];
      $("matched").checked = false; move("rule", "aggregated"); move("kappa", 3);
      const other = [{...settings}, shown()];
      const presets = [...$("presets").children].map(b => { b.click(); return [{...settings}, shown()]; });
      return {first, moved: [decay, matched, other, ...presets]};
    """
    found = ask(tmp_path, script, "?rule=heavy_ball&decay=0.95&rate=0.2&kappa=50&start=-1&nu=none&beta=1e9")
    settings, numbers, colors = found["first"]
    given = {"rule": "heavy_ball", "decay": 0.95, "rate": 0.2, "kappa": 50, "start": -1, "nu": 0.7, "beta": 3}
    assert given.items() <= settings.items()
    assert min(colors) > 5
    for at, shown in [(settings, numbers), *found["moved"]]:
        for name, value in expected(at).items():
            # Some presets are at critical damping, where two roots meet.
            tolerance = 1e-6 if name in ("radius_at_L", "radius_at_mu", "contraction", "iterations") else 1e-9
            text = math.inf if shown[name] is None else float(shown[name])
            assert text == pytest.approx(float(value), rel=tolerance, abs=tolerance), (at, name)
    (_, decay), (at, matched) = found["moved"][:2]
    assert decay["dc_gain"] == pytest.approx(100)
    assert matched["effective_learning_rate"] == pytest.approx(20)
    assert at["rate"] == pytest.approx(2)


@needs_browser
def test_what_it_says_of_basins_is_what_the_rule_does(tmp_path):
    starts = np.linspace(-1.8, 1.8, 37)
    script = f"""
      const f = RULES.heavy_ball.filter({{ decay: 0.95 }});
      return {starts.tolist()}.map(x => basin(f, 0.3, x));
    """
    ends = ask(tmp_path, script)
    x, last = starts.copy(), starts.copy()
    for _ in range(400):  # Polyak's form
        x, last = x - 0.3 * (x**3 - x + 0.12) / 8.72 + 0.95 * (x - last), x
    for _ in range(4000):
        x = x - 0.5 * (x**3 - x + 0.12) / 8.72
    np.testing.assert_array_equal(ends, np.sign(x))
    assert (np.sign(x) != np.sign(starts)).any()


@needs_browser
def test_its_lines_of_python_make_the_rule_that_is_shown(tmp_path, capsys):
    cases = [case for case in CASES if (case["decay"], case["rate"], case["kappa"]) == (0.907, 0.231, 173.0)]
    assert [case["rule"] for case in cases] == list(RULES)
    show = "s => { Object.assign(settings, s); draw(); return $('python').textContent; }"
    script = f"return {json.dumps(cases)}.map({show})"
    for case, lines in zip(cases, ask(tmp_path, script), strict=True):
        names = {}
        exec(lines, names)
        wanted = rule_of(case)
        rule = names["rule"].at(10**6) if wanted.period == 1 else names["rule"]
        np.testing.assert_allclose(rule.impulse_response(STEPS), wanted.impulse_response(STEPS), rtol=1e-5, atol=1e-12)
        effective = case["rate"] * mo.analysis.dc_gain(wanted)
        assert re.search(rf"effective learning rate +{re.escape(f'{effective:.4g}')}\n", capsys.readouterr().out)
        rates = (names["tx"].update(np.float32(1), names["tx"].init(np.float32(0)))[0],)
        assert rates[0] == pytest.approx(-case["rate"] * names["rule"].at(0).impulse_response(1)[0], rel=1e-6)


@pytest.mark.one_in(2)
@needs_browser
@pytest.mark.parametrize("width", [1280, 390])
def test_examples_stay_in_their_panel_and_leave_the_buttons_where_they_are(tmp_path, width):
    script = """
      const places = () => [...$("presets").children].map(b => b.getBoundingClientRect().top + scrollY);
      const seen = [];
      for (const button of $("presets").children) {
        button.click();
        const b = bowl(RULES[settings.rule].filter(settings));
        const inside = b.path.every(([x, y]) => Math.abs(x) <= b.x && Math.abs(y) <= b.y);
        seen.push([button.textContent, inside, Number($("contraction").dataset.value), places()]);
      }
      for (const rule of Object.keys(RULES)) { settings.rule = rule; draw(); seen.push([rule, true, 0, places()]); }
      return {seen, wide: document.body.scrollWidth};
    """
    found = ask(tmp_path, script, width=width)
    assert found["wide"] == width, "nothing leaves the page on the right"
    tops = found["seen"][0][3]
    assert tops == sorted(tops)
    for name, inside, contraction, places in found["seen"]:
        assert places == tops, name
        assert inside or contraction >= 1, name
    assert [contraction >= 1 for *_, contraction, _ in found["seen"][:8]] == [False] * 7 + [True]


@needs_browser
def test_the_names_of_the_bars_are_beside_them_and_whole_on_a_phone(tmp_path):
    script = """
      const texts = [], bars = [], canvas = CanvasRenderingContext2D.prototype, {fillText, fillRect} = canvas;
      canvas.fillText = function (t, x, y) {
        if (this.canvas.id === "basins") texts.push([t, x, x + this.measureText(t).width, y, this.textAlign]);
        fillText.apply(this, arguments);
      };
      canvas.fillRect = function (x, y, w, h) {
        if (this.canvas.id === "basins") bars.push([y, y + h]);
        fillRect.apply(this, arguments);
      };
      draw();
      return {texts, bars, wide: $("basins").clientWidth, high: $("basins").clientHeight};
    """
    found = ask(tmp_path, script, width=390)
    names = [text for text in found["texts"] if text[0].endswith(" %")]
    assert len(names) == 3
    assert len(found["bars"]) == 3 * 121
    for text, left, right, base, align in names:
        assert align == "left"
        assert 0 <= left < right <= found["wide"], text
        for top, bottom in found["bars"]:
            assert not (top < base + 2 and base - 9 < bottom), text
    assert max(bottom for _, bottom in found["bars"]) <= found["high"]
