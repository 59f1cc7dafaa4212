"""tests/gpu/racecheck_report.py reads the tool's lines and tells known pairs from others."""

import importlib.util
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
spec = importlib.util.spec_from_file_location(
    "racecheck_report", ROOT / "tests" / "gpu" / "racecheck_report.py"
)
report = importlib.util.module_from_spec(spec)
spec.loader.exec_module(report)

KERNEL = "void flexprefill::attend_sm90_kernel<int>(Params)"


def line_of(text):
    source = (ROOT / "src" / "attend" / "attend_sm90_load.cuh").read_text().splitlines()
    return next(i for i, line in enumerate(source, 1) if text in line)


def log(path, line):
    path.write_text(
        "========= COMPUTE-SANITIZER\n"
        f"========= Error: Race reported between Write access at {KERNEL}+0x10 in "
        f"attend_sm90_load.cuh:{line}\n"
        f"=========     and Read access at {KERNEL}+0x20 in attend_sm90_kernel.cuh:1 [16 hazards]\n"
        "=========\n========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)\n"
    )
    return str(path)


def test_known_and_unknown_pairs(tmp_path, capsys):
    assert report.main([log(tmp_path / "a", line_of("shared_.key_tile[stage].kind ="))]) == 0
    assert "16 hazards, key_tile" in capsys.readouterr().out
    assert report.main([log(tmp_path / "b", line_of("#include <cstdint>"))]) == 1
    assert "NOT EXPLAINED" in capsys.readouterr().out


def test_without_line_numbers_nothing_is_known(tmp_path, capsys):
    path = tmp_path / "c"
    path.write_text(
        f"========= Error: Race reported between Write access at {KERNEL}+0x10\n"
        f"=========     and Read access at {KERNEL}+0x20 [4 hazards]\n"
    )
    assert report.main([str(path)]) == 1
    assert "1 pairs, 1 not explained" in capsys.readouterr().out
