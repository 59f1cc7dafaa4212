"""What the documentation promises: its example runs, its links lead somewhere."""

from __future__ import annotations

import fnmatch
import re
from pathlib import Path

import flex_prefill
import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = [
    ROOT / "README.md",
    ROOT / "bench" / "README.md",
    ROOT / "models" / "needle-7m" / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_relative_links_lead_to_files(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#\s]+)", page.read_text())
    local = [target for target in targets if "://" not in target]
    missing = [target for target in local if not (page.parent / target).exists()]
    assert not missing


def expanded(name: str) -> list[str]:
    """a.{cc,h} -> a.cc, a.h"""
    braces = re.search(r"\{([^}]*)\}", name)
    if braces is None:
        return [name]
    return [
        whole
        for option in braces[1].split(",")
        for whole in expanded(name[: braces.start()] + option + name[braces.end() :])
    ]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_source_files_that_are_named_exist(page: Path) -> None:
    """By their path in the tree or the end of it; patterns match something."""
    kept_out = {".git", ".venv", "build", "build-python", "third_party"}
    files = [
        "/" + path.relative_to(ROOT).as_posix()
        for top in ROOT.iterdir()
        if top.name not in kept_out
        for path in (top.rglob("*") if top.is_dir() else [top])
    ]
    quoted = re.findall(r"`([\w./*{},-]+\.(?:cc|cu|cuh|c|h|py|sh|cmake|\*))`", page.read_text())
    missing = [
        name
        for name in {name for each in quoted for name in expanded(each)}
        if not fnmatch.filter(files, f"*/{name.removeprefix('./')}")
    ]
    assert not missing


def test_the_api_page_has_every_public_name() -> None:
    page = (ROOT / "docs" / "api.md").read_text()
    documented = set(re.findall(r"^\.\. auto\w+:: flex_prefill\.(\w+)$", page, re.M))
    assert documented == set(flex_prefill.__all__) - {"__version__"} | {"attention", "patterns"}
    included = set(re.findall(r"literalinclude\} \.\./(include/\S+)", page))
    headers = {path.relative_to(ROOT).as_posix() for path in ROOT.glob("include/**/*.h")}
    assert included == headers


def test_the_readmes_python_example_runs() -> None:
    code = re.search(
        r"```python\n(import flex_prefill\n.*?)```", (ROOT / "README.md").read_text(), re.S
    )
    assert code is not None
    rng = np.random.default_rng(0)
    names = {
        name: rng.standard_normal((1, 1500, heads, 32), dtype=np.float32)
        for name, heads in (("q", 4), ("k", 2), ("v", 2))
    }
    exec(code[1], names)
    published = flex_prefill.flex_prefill_attention(
        names["q"], names["k"], names["v"], gamma=0.9, tau=0.1
    )
    np.testing.assert_array_equal(names["out"], published)
    assert names["lse"].shape == (1, 4, 1500)
    assert names["audit"].density.shape == (1, 4)
