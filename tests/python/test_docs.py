"""What the documentation promises: its example runs, its links lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import flex_prefill
import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "bench" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_relative_links_lead_to_files(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#\s]+)", page.read_text())
    local = [target for target in targets if "://" not in target]
    missing = [target for target in local if not (page.parent / target).exists()]
    assert not missing


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
