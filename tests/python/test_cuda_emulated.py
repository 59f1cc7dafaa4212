"""The Python side of CUDA calls where there is a build for the emulator, in build/emulator:

cmake --preset emulator -DFLEXPREFILL_BUILD_PYTHON=ON -DBUILD_SHARED_LIBS=OFF
cmake --build build/emulator --target _core
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "emulator"
EXTENSIONS = sorted(BUILD.glob("python/_core*.so"))
LIBRARY = BUILD / "tests" / "cuda_emulator" / "libflexprefill_cuda_emulator.so"


@pytest.mark.skipif(not (EXTENSIONS and LIBRARY.is_file()), reason="no build for the emulator")
def test_on_the_emulator(tmp_path):
    package = tmp_path / "flex_prefill"
    package.mkdir()
    for file in (*(ROOT / "python" / "flex_prefill").iterdir(), EXTENSIONS[0]):
        (package / file.name).symlink_to(file)
    script = Path(__file__).with_name("emulated_cuda.py")
    subprocess.run(
        [sys.executable, str(script), str(LIBRARY)],
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        check=True,
        timeout=600,
    )
