"""Hooks of MkDocs.

While the site is built equations become MathML, the button beside a block with prompts copies its code
alone, and the interactive page gets a link back. A site that would fetch anything is refused.
"""

import html
import pathlib
import re
from typing import Any

from latex2mathml.converter import convert
from mkdocs.exceptions import PluginError

_EQUATION = re.compile(
    r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.S
)
_SESSION = re.compile(
    r'<div class="language-pycon (.*?)>(.*?)</pre></div>', re.S
)
# Filled here since there is nothing to go back to where the page is opened from a checkout.
_BACK = '<nav id="back"></nav>'
_LINK = '<nav id="back"><a href="../interactive.html">Documentation of momentum_optax</a></nav>'
_TAG = re.compile(r"<[^>]*>")
_PROMPT = re.compile(r"^(?:>>>|\.\.\.) ?(.*)", re.M)
# What a browser loads by itself: not the links that a reader may follow.
_LOADED = re.compile(
    r"""<(?:script|img|iframe|link)\b[^>]*\b(?:src|href)=["']?(?:https?:)?//|@import|url\(["']?(?:https?:)?//"""
)


def on_page_content(content: str, **rest: Any) -> str:
    """The page with every equation as MathML, and every interactive session with the code to copy."""
    del rest
    return _SESSION.sub(_copied, _EQUATION.sub(_mathml, content))


def _copied(match: re.Match[str]) -> str:
    """The block with an attribute that the theme's button copies in place of the text shown."""
    code = "\n".join(_PROMPT.findall(html.unescape(_TAG.sub("", match[2]))))
    return f'<div data-copy="{html.escape(code)}" class="language-pycon {match[1]}>{match[2]}</pre></div>'


def _mathml(match: re.Match[str]) -> str:
    block = match[1] == "div"
    text = convert(
        html.unescape(match[2]).strip(),
        display="block" if block else "inline",
    )
    # Wide equations scroll by themselves on a narrow screen.
    return f'<div class="equation">{text}</div>' if block else text


def on_post_build(*, config: Any, **rest: Any) -> None:
    """Link the interactive page; refuse a site with a page or a style that loads something from another host."""
    del rest
    page = (
        pathlib.Path(config["site_dir"]) / "interactive" / "momentum.html"
    )
    text = page.read_text(encoding="utf-8")
    if text.count(_BACK) != 1:
        raise PluginError(f"{page} must have one place for a link, {_BACK}")
    page.write_text(text.replace(_BACK, _LINK), encoding="utf-8")
    for path in pathlib.Path(config["site_dir"]).rglob("*"):
        if path.suffix in (".html", ".css"):
            found = _LOADED.search(path.read_text(encoding="utf-8"))
            if found:
                raise PluginError(
                    f"{path} loads something from elsewhere: {found[0]!r}"
                )
