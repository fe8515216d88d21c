"""The text of HTML: tags dropped, entities decoded, as `--clean html` asks for.

Entities are decoded by Python's html.unescape. Tags are found by one regular expression that reads each character a few times
at most: html.parser needs minutes for 60 kB of unclosed tags, and raises AssertionError for `<![x y]>`, in Python 3.11.7.
"""

from __future__ import annotations

import html
import re

# What is inside these is not read by people.
HIDDEN = r"<(script|style|template|noscript)\b[^<>]*+>.*?(?:</\1\s*>|\Z)"
COMMENT = r"<!--.*?(?:-->|\Z)|<[!?][^<>]*+>"
# A quote counts after "=" alone, so that the apostrophe in <p title='it's'> does not hide the end of the tag.
ELEMENT = r"</?([a-z][^\s/<>]*+)(?:[^<>=]|=\s*+(?:\"[^\"]*+\"|'[^']*+')?)*+>"
MARKUP = re.compile(f"{HIDDEN}|{COMMENT}|{ELEMENT}", re.IGNORECASE | re.DOTALL)

# These stand inside words; at any other tag a word ends.
INLINE = frozenset(
    """
    a abbr acronym b bdi bdo big cite code data del dfn em font i ins kbd label mark q s samp small span strike strong sub sup
    time tt u var wbr
    """.split()
)


def text_of_html(document: str) -> str:
    """Return the text of an HTML document or fragment, with a space where a tag ends a word; "a < b" is text."""
    if "<" in document:
        document = MARKUP.sub(replacement, document)
    return html.unescape(document)


def replacement(markup: re.Match[str]) -> str:
    """Return what stands in place of a tag, a comment, or an element that is not read."""
    inside_words = markup[0].startswith("<!--") or (markup[2] or "").lower() in INLINE
    return "" if inside_words else " "
