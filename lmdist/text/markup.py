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

# At these a line ends, as a browser shows it.
BLOCKS = frozenset(
    """
    address article aside blockquote body caption center dd details dialog div dl dt fieldset figcaption figure footer form h1
    h2 h3 h4 h5 h6 head header hr html legend li main menu nav ol option p pre section summary table tbody tfoot thead title
    tr ul
    """.split()
)
HAS_LINES = re.compile(rf"</?(?:br|{'|'.join(BLOCKS)})[\s/>]", re.IGNORECASE)
BREAK, BORDER = "\x1d", "\x1e"
"""What stands for `<br>`, and for the border of a block, until all are known."""
SOURCE_SPACE = re.compile(r"(<pre\b.*?(?:</pre\s*+>|\Z))|[ \t\r\n\f\x1d\x1e]++", re.IGNORECASE | re.DOTALL)
EDGES = re.compile("(?:(?<! ) *+|\r?\n *+)[\x1d\x1e][ \x1d\x1e]*+(?:\r?\n)?")


def text_of_html(document: str) -> str:
    """Return the text of an HTML document or fragment, with a space where a tag ends a word; "a < b" is text."""
    if "<" in document:
        document = MARKUP.sub(replacement, document)
    return html.unescape(document)


def lines_of_html(document: str) -> str:
    """Return the text in lines, as a browser shows it: of the source's own line breaks only those in `<pre>` count.

    A document without an element that ends a line is taken for text that has its lines already.
    """
    if not HAS_LINES.search(document):
        return text_of_html(document)
    document = SOURCE_SPACE.sub(lambda found: found[1] or " ", document)
    return EDGES.sub(line_breaks, html.unescape(MARKUP.sub(edge_or_replacement, document)))


def edge_or_replacement(markup: re.Match[str]) -> str:
    """Return what stands in place of a tag, with BREAK and BORDER."""
    name = (markup[2] or "").lower()
    return BREAK if name == "br" else BORDER if name in BLOCKS else replacement(markup)


def line_breaks(edges: re.Match[str]) -> str:
    """Return the line breaks of a run of edges: one for each BREAK, and one between two blocks."""
    at_end = edges.start() == 0 or edges.end() == len(edges.string)
    return "\n" * max(edges[0].count(BREAK), not at_end)


def replacement(markup: re.Match[str]) -> str:
    """Return what stands in place of a tag, a comment, or an element that is not read."""
    inside_words = markup[0].startswith("<!--") or (markup[2] or "").lower() in INLINE
    return "" if inside_words else " "
