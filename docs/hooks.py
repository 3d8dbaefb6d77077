"""Hooks of MkDocs: equations become MathML while the site is built, and a site that would fetch anything is refused."""

import html
import pathlib
import re
from typing import Any

from latex2mathml.converter import convert
from mkdocs.exceptions import PluginError

_EQUATION = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.S)
# What a browser loads by itself: not the links that a reader may follow.
_LOADED = re.compile(
    r"""<(?:script|img|iframe|link)\b[^>]*\b(?:src|href)=["']?(?:https?:)?//|@import|url\(["']?(?:https?:)?//"""
)


def on_page_content(content: str, **rest: Any) -> str:
    """The page with every equation as MathML."""
    del rest
    return _EQUATION.sub(_mathml, content)


def _mathml(match: re.Match[str]) -> str:
    block = match[1] == "div"
    text = convert(html.unescape(match[2]).strip(), display="block" if block else "inline")
    # Wide equations scroll by themselves on a narrow screen.
    return f'<div class="equation">{text}</div>' if block else text


def on_post_build(*, config: Any, **rest: Any) -> None:
    """Refuse a site with a page or a style that loads something from another host."""
    del rest
    for path in pathlib.Path(config["site_dir"]).rglob("*"):
        if path.suffix in (".html", ".css"):
            found = _LOADED.search(path.read_text(encoding="utf-8"))
            if found:
                raise PluginError(f"{path} loads something from elsewhere: {found[0]!r}")
