"""What a model wrote as HTML that can do nothing: no tags of its own, no scripts, no images."""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from typing import Any

from markdown_it import MarkdownIt
from markdown_it.renderer import RendererHTML
from markdown_it.token import Token


def as_html(markdown: str) -> str:
    """Markdown with tables. A tag in it is text, and a link to anything but a page or mail, too.

    >>> as_html("**a** <script>b</script>").strip()
    '<p><strong>a</strong> &lt;script&gt;b&lt;/script&gt;</p>'
    """
    return str(_MARKDOWN.render(markdown))


def _outside(
    renderer: RendererHTML,
    tokens: Sequence[Token],
    index: int,
    options: Any,
    env: MutableMapping[str, Any],
) -> str:
    """A link opens beside the page and learns nothing of it."""
    tokens[index].attrs.update(target="_blank", rel="noopener noreferrer nofollow")
    return renderer.renderToken(tokens, index, options, env)


_MARKDOWN = MarkdownIt("js-default", {"html": False, "breaks": True})
_MARKDOWN.disable("image")  # an image would tell its server that this was read, and by whom
_MARKDOWN.add_render_rule("link_open", _outside)
