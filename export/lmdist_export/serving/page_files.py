"""The files of the page, with which lmdist-serve answers and of which `lmdist-export --layout web` makes a folder."""

from __future__ import annotations

from pathlib import Path

PAGE = Path(__file__).with_name("page")
MEDIA_TYPES = {".html": "text/html", ".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
SERVER_ENGINE = "server_engine.js"
"""What asks the server; the page in a folder has another engine."""


def page_files() -> list[Path]:
    """Return the files of the page, and nothing else that lies there."""
    return [file for file in sorted(PAGE.iterdir()) if file.suffix in MEDIA_TYPES and file.is_file()]
