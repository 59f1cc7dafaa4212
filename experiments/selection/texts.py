"""Long real texts that every machine with a Rust toolchain has: the books of its documentation.

  rustup component add rust-docs && python texts.py TEXTS

writes each book as plain text to TEXTS/<book>.txt.
"""

from __future__ import annotations

import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

BOOKS = (
    "book",
    "reference",
    "cargo",
    "rustc",
    "rust-by-example",
    "nomicon",
    "unstable-book",
    "edition-guide",
    "embedded-book",
    "clippy",
)


class Text(HTMLParser):
    """The text of <main>, a blank line between blocks."""

    SKIPPED = ("script", "style", "nav", "button", "svg")
    BLOCKS = ("p", "div", "pre", "h1", "h2", "h3", "h4", "table", "ul", "ol")
    LINES = ("li", "tr", "br")

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self.skipped = self.inside = 0

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.inside += tag == "main"
        self.skipped += tag in self.SKIPPED
        if tag in self.BLOCKS:
            self.parts.append("\n\n")
        elif tag in self.LINES:
            self.parts.append("\n")
        elif tag == "td":
            self.parts.append(" ")

    def handle_endtag(self, tag: str) -> None:
        self.inside -= tag == "main"
        self.skipped -= tag in self.SKIPPED
        if tag == "pre":
            self.parts.append("\n\n")

    def handle_data(self, data: str) -> None:
        if self.inside and not self.skipped:
            self.parts.append(data)


def main() -> None:
    out = Path(sys.argv[1])
    command = ["rustc", "--print", "sysroot"]
    root = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    out.mkdir(parents=True, exist_ok=True)
    for book in BOOKS:
        parser = Text()
        page = Path(root, "share", "doc", "rust", "html", book, "print.html")
        parser.feed(page.read_text(encoding="utf-8"))
        text = re.sub(r"[ \t]+\n", "\n", "".join(parser.parts))
        text = re.sub(r"\n{3,}", "\n\n", text)
        (out / f"{book}.txt").write_text(text, encoding="utf-8")
        print(book, len(text))


if __name__ == "__main__":
    main()
