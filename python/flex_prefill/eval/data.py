"""The folder of texts and files that tasks read.

    essays.txt              the haystack of RULER's essay tasks
    squad.json, hotpot.json RULER's questions
    infinitebench/*.jsonl   InfiniteBench's files
    sources.json            where each came from, its size and SHA-256
    samples/                prompts made of them, by tokenizer (see runner.py)

`flexprefill eval prepare` fills it, from local files or by download. Files are written whole or not
at all.
"""

from __future__ import annotations

import ast
import hashlib
import json
import os
import re
import urllib.error
import urllib.request
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flex_prefill import retrieval

DEFAULT_FOLDER = Path.home() / ".cache" / "flex_prefill" / "eval"
_TIMEOUT = 20  # seconds, of one read from the network
_CHUNK = 1 << 20
_ESSAY_WORDS = 120_000  # more words than 128k tokens hold
LOCAL_TEXT = "Python's language reference and the documentation strings of its library"

_HUB = "https://huggingface.co/datasets/"
_INFINITEBENCH = _HUB + "xinrongzhang2022/InfiniteBench/resolve/main/"


@dataclass(frozen=True)
class Source:
    """A file that tasks read: its name in the folder, where it is downloaded, what it holds."""

    name: str
    url: str
    what: str


def _infinitebench(split: str) -> Source:
    name = f"{split}.jsonl"
    return Source(f"infinitebench/{name}", _INFINITEBENCH + name, f"InfiniteBench, {split}")


ESSAYS = Source(
    "essays.txt",
    "https://raw.githubusercontent.com/NVIDIA/RULER/main/scripts/data/synthetic/json/"
    "PaulGrahamEssays_URLs.txt",
    "text to hide needles in (RULER: Paul Graham's essays)",
)
SOURCES: dict[str, Source] = {
    source.name: source
    for source in (
        ESSAYS,
        Source(
            "squad.json",
            "https://rajpurkar.github.io/SQuAD-explorer/dataset/dev-v2.0.json",
            "SQuAD 2.0, development set",
        ),
        Source(
            "hotpot.json",
            _HUB + "namlh2004/hotpotqa/resolve/7e54db4656209750ff487f6fdf8e39a66dba136b/"
            "hotpot_dev_distractor_v1.json",
            "HotpotQA, development set with distractors",
        ),
        *map(
            _infinitebench,
            (
                "passkey",
                "number_string",
                "kv_retrieval",
                "longbook_sum_eng",
                "longbook_qa_eng",
                "longbook_choice_eng",
                "longdialogue_qa_eng",
                "longbook_qa_chn",
                "code_debug",
                "math_find",
            ),
        ),
    )
}


def write_atomically(path: Path, data: str | bytes) -> None:
    """All of it or nothing: through a file beside it that then takes its name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_bytes(data.encode() if isinstance(data, str) else data)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


class DataFolder:
    """One such folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def has(self, name: str) -> bool:
        return (self.path / name).is_file()

    def file(self, name: str) -> Path:
        """Where a file lies; FileNotFoundError says what is missing and how to get it."""
        path = self.path / name
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing; " + how_to_get(SOURCES[name]))
        return path

    def text(self, name: str) -> str:
        return self.file(name).read_text(encoding="utf-8")

    def lines(self, name: str, count: int) -> list[dict[str, Any]]:
        """The first `count` records of a JSON-lines file."""
        records: list[dict[str, Any]] = []
        with self.file(name).open(encoding="utf-8") as file:
            for line in file:
                if len(records) == count:
                    break
                if line.strip():
                    records.append(json.loads(line))
        return records

    def sources(self) -> dict[str, dict[str, Any]]:
        """Origin, bytes and SHA-256 of every file that `prepare` put here."""
        try:
            known: dict[str, dict[str, Any]] = json.loads(
                (self.path / "sources.json").read_text(encoding="utf-8")
            )
        except FileNotFoundError:
            return {}
        return {name: source for name, source in known.items() if self.has(name)}

    def origin(self, name: str) -> str:
        return self.sources().get(name, {}).get("origin", "put there by hand")

    def put(self, name: str, data: bytes, origin: str) -> None:
        """Stores a file and where it came from."""
        write_atomically(self.path / name, data)
        known = self.sources()
        known[name] = {
            "origin": origin,
            "bytes": len(data),
            "sha256": hashlib.sha256(data).hexdigest(),
        }
        write_atomically(self.path / "sources.json", json.dumps(known, indent=1) + "\n")


def how_to_get(source: Source) -> str:
    """What to do about a file that is not there."""
    return (
        f"needs {source.name} ({source.what}): fetch {source.url}, and run 'flexprefill eval "
        "prepare --from FOLDER' with the folder that it lies in"
    )


def _check(source: Source, data: bytes) -> None:
    """Refuses what is no such file (an error page, a torn download)."""
    try:
        text = data.decode()
        if source.name.endswith(".json"):
            json.loads(text)
        elif source.name.endswith(".jsonl"):
            record = json.loads(text.partition("\n")[0])
            missing = {"context", "input", "answer"} - set(record)
            if missing:
                raise ValueError(f"its records lack {', '.join(sorted(missing))}")
        elif len(text.split()) < 1000:
            raise ValueError("it has fewer than 1000 words")
    except (ValueError, UnicodeDecodeError) as error:
        raise ValueError(f"{source.name}: expected {source.what}, but {error}") from None


def take_local(data: DataFolder, source: Source, folder: Path) -> bool:
    """Copies a file of `folder`, wherever in it; False where it has none of that name."""
    wanted = {Path(source.name).name, Path(source.url).name}
    if source is ESSAYS:
        wanted = {"essays.txt"}
    found = sorted(p for name in wanted for p in folder.rglob(name) if p.is_file())
    if not found:
        return False
    content = found[0].read_bytes()
    _check(source, content)
    data.put(source.name, content, f"local file {found[0].name}")
    return True


def download(data: DataFolder, source: Source, progress: Callable[[int, int | None], None]) -> None:
    """Fetches a file; OSError where the network does not have it. progress: (bytes, total)."""
    content = _fetch_essays(progress) if source is ESSAYS else _fetch(source.url, progress)
    _check(source, content)
    data.put(source.name, content, source.url)


def _fetch(url: str, progress: Callable[[int, int | None], None]) -> bytes:
    parts: list[bytes] = []
    with urllib.request.urlopen(url, timeout=_TIMEOUT) as response:
        total = response.headers.get("Content-Length")
        while chunk := response.read(_CHUNK):
            parts.append(chunk)
            progress(len(chunk), int(total) if total else None)
    return b"".join(parts)


def _fetch_essays(progress: Callable[[int, int | None], None]) -> bytes:
    """RULER's list of essays, those of it that are plain text."""
    urls = _fetch(ESSAYS.url, progress).decode().split()
    texts = []
    for url in urls:
        if not url.endswith(".txt"):
            continue
        try:
            texts.append(_fetch(url, progress).decode())
        except urllib.error.HTTPError:
            continue  # essays come and go
    return "\n\n".join(texts).encode()


def put_text(data: DataFolder, text: str, origin: str) -> None:
    """Takes a text of the user's, or the local one, as the haystack."""
    _check(ESSAYS, text.encode())
    data.put(ESSAYS.name, text.encode(), origin)


def local_text() -> str:
    """Prose that every machine with Python has: `LOCAL_TEXT`, some 200,000 words."""
    return "\n\n".join(_prose())


def _prose() -> Iterator[str]:
    for label, text in retrieval.library_files():
        documents = [text] if label.startswith("topic/") else _docstrings(text)
        for document in documents:
            for paragraph in retrieval.paragraphs_of(document):
                # Sentences only: no code, tables or lists.
                if re.match(r"[A-Z]", paragraph) and paragraph.rstrip().endswith("."):
                    yield " ".join(paragraph.split())


def _docstrings(source: str) -> list[str]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of old escapes in the library's own files
            tree = ast.parse(source)
    except SyntaxError:
        return []
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds))
    return [text for text in found if text]


def haystack(data: DataFolder) -> list[str]:
    """The words of essays.txt, repeated to more than 128k tokens hold."""
    words = data.text(ESSAYS.name).split()
    return words * (-(-_ESSAY_WORDS // len(words)))
