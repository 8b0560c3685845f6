"""What a model writes can do nothing in a page."""

from __future__ import annotations

from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loramix.studio.text import as_html

TAGS = {"p", "br", "strong", "em", "s", "code", "pre", "ul", "ol", "li", "a", "hr", "blockquote"}
TAGS |= {"table", "thead", "tbody", "tr", "th", "td"}
TAGS |= {f"h{level}" for level in range(1, 7)}
ATTRIBUTES = {"href", "title", "target", "rel", "style", "class", "start"}
PIECES = ["<script>", "</p>", "<img src=x onerror=alert(1)>", "[a](", "javascript:alert(1)", ")",
          "![i](http://evil/?q)", "`", "```\n", "<!--", "&lt;", "<a href='x'>", "|a|b|\n|-|-|\n",
          "data:text/html,x", "# ", "\n", " onload=x", "\"", "'", ">"]  # fmt: skip


class Seen(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.text = set(), [], ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes += attrs

    def handle_data(self, data):
        self.text += data


@given(st.lists(st.sampled_from(PIECES) | st.text(max_size=5), max_size=12).map("".join))
def test_nothing_but_text_comes_out(text):
    seen = Seen(as_html(text))
    assert seen.tags <= TAGS
    assert {name for name, _ in seen.attributes} <= ATTRIBUTES
    for name, value in seen.attributes:
        if name == "href":
            assert not value.lower().startswith(("javascript:", "vbscript:", "data:", "file:"))
        if name == "style":
            assert value in ("text-align:left", "text-align:right", "text-align:center")


@pytest.mark.parametrize("text", ["<think>so</think>", "a < b > c", "<script>alert(1)</script>"])
def test_a_tag_is_shown_as_it_was_written(text):
    assert Seen(as_html(text)).text.strip() == text


def test_markdown_is_read():
    html = as_html(
        "# One\n\n| a | b |\n|---|---|\n| 1 | `2` |\n\n```sql\nSELECT 1;\n```\n[x](http://x)"
    )
    assert {"h1", "table", "td", "pre", "code", "a"} <= Seen(html).tags
    assert 'rel="noopener noreferrer nofollow"' in html
