"""Sums up logs of compute-sanitizer's racecheck: which lines race with which, and which are known.

    python tests/gpu/racecheck_report.py LOG ...

Exit code 1 where a pair is not explained by KNOWN. Names need a build with -lineinfo; without it a
pair is two offsets in a kernel, and nothing is known of it.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

# Kernel, and a word of the statement that writes or reads: why what the tool reports is in order
# by the mbarriers. That the tool does not follow their parity waits is what racecheck_control.cu
# is there to show (way 1 with hazards, ways 0 and 2 without).
KNOWN: dict[tuple[str, str], str] = {
    (
        "attend_sm90",
        "work",
    ): "written by the loading warp before it arrives at q_full, read after the "
    "wait for it; a slot is written again 4 rows later, after q_empty of the row 2 before, when "
    "every warp has stored the row 3 before",
    ("attend_sm90", "key_tile"): "written before the arrival at k_full, read after the wait for it "
    "and before the arrival at k_empty, for which the next write waits",
    (
        "attend_sm90",
        "value_tile",
    ): "likewise, v_full and v_empty, which the checking warps arrive at too",
    (
        "attend_sm90",
        "not_finite",
    ): "written by a checking warp before it arrives at v_checked, read "
    "after the wait for it and before the arrival at v_empty",
    ("attend_sm90", "row"): "V's rows zeroed by a checking warp after v_full and before v_checked, "
    "which whoever multiplies by them waits for",
}
_ACCESS = re.compile(
    r"(?P<kind>Read|Write) access at (?P<kernel>.*?)\+0x(?P<offset>[0-9a-f]+)"
    r"(?: in (?P<file>\S+?):(?P<line>\d+))?(?: \[(?P<count>\d+) hazards?\])?\s*$"
)
Access = tuple[str, str, str]  # kind, kernel, place


def accesses(lines: Iterable[str]) -> Iterable[tuple[Access, Access, int]]:
    """Pairs that race, and how often."""
    first: Access | None = None
    for line in lines:
        found = _ACCESS.search(line)
        if found is None:
            continue
        place = f"{found['file']}:{found['line']}" if found["file"] else f"+0x{found['offset']}"
        access = (found["kind"], found["kernel"], place)
        if "Race reported between" in line:
            first = access
        elif first is not None:
            yield first, access, int(found["count"] or 1)


def statement(place: str, root: Path) -> str:
    """The line of the source, or nothing."""
    name, _, line = place.rpartition(":")
    for path in [Path(name), *root.glob(f"src/**/{Path(name).name}")] if name else []:
        if path.is_file():
            return path.read_text(encoding="utf-8").splitlines()[int(line) - 1].strip()
    return ""


def reason(pair: tuple[Access, Access], root: Path) -> str:
    """Why a pair is in order, or nothing."""
    for (kernel, word), why in KNOWN.items():
        for _, name, place in pair:
            # By name or by file: functions that are not inlined bear names of their own.
            if kernel in f"{name} {place}" and re.search(rf"\b{word}\b", statement(place, root)):
                return f"{word}: {why}"
    return ""


def main(logs: list[str]) -> int:
    root = Path(__file__).resolve().parents[2]
    pairs: Counter[tuple[Access, Access]] = Counter()
    for log in logs:
        with Path(log).open(encoding="utf-8", errors="replace") as file:
            for first, second, count in accesses(file):
                pairs[first, second] += count
    unknown = 0
    for pair, count in pairs.most_common():
        why = reason(pair, root)
        unknown += not why
        print(f"{count} hazards, {why or 'NOT EXPLAINED'}")
        for kind, kernel, place in pair:
            print(f"  {kind:<5} {place} {kernel[:60]} | {statement(place, root)[:80]}")
    print(f"{len(pairs)} pairs, {unknown} not explained")
    return 1 if unknown else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
