"""One self-contained HTML page of a Markdown text. Owns what a page may hold, not what it says.

Figures are in the page, nothing is fetched, and a content security policy has the browser hold it to that: no request
to anywhere, no script but the one that sorts tables. HTML in the Markdown shows as text.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Mapping

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markdown_it import MarkdownIt
from markdown_it.token import Token
from markupsafe import Markup

from smbench import resources

FRONT_MATTER = re.compile(r"\A---\n.*?^---\n", re.DOTALL | re.MULTILINE)
"""What a site generator reads at the top of a post; to a browser it would be a rule and a heading."""
TEMPLATE = "page.html.j2"
SCRIPT = "sort.js"


def render_page(markdown: str, title: str, figures: Mapping[str, bytes]) -> str:
    """The page. `figures` are PNGs by the place that the Markdown names; an image that is not among them is its text.

    Equal arguments give equal bytes.
    """
    parser = MarkdownIt("commonmark", {"html": False}).enable(["table", "strikethrough"])
    parser.add_render_rule("table_open", lambda *_: '<div class="table" tabindex="0"><table>\n')
    parser.add_render_rule("table_close", lambda *_: "</table></div>\n")
    tokens = parser.parse(FRONT_MATTER.sub("", markdown))
    for token in tokens:
        token.children = [_inlined(child, figures) for child in token.children or ()] or token.children
    script = (resources.templates_dir() / SCRIPT).read_text(encoding="utf-8")
    environment = Environment(
        loader=FileSystemLoader(resources.templates_dir()),
        undefined=StrictUndefined,
        autoescape=True,
        keep_trailing_newline=True,
    )
    return environment.get_template(TEMPLATE).render(
        title=title,
        body=Markup(parser.renderer.render(tokens, parser.options, {})),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )


def _inlined(token: Token, figures: Mapping[str, bytes]) -> Token:
    """An image with its bytes in it; one that there is no figure of becomes the text that stands for it."""
    if token.type != "image":
        return token
    figure = figures.get(str(token.attrs["src"]))
    if figure is None:
        return Token("text", "", 0, content=f"[{token.content}]")
    token.attrs["src"] = f"data:image/png;base64,{base64.b64encode(figure).decode()}"
    return token
