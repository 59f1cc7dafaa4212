#!/usr/bin/env bash
# Builds the wheel from nothing and runs it in an empty environment without torch.
#   tests/python/check_wheel.sh [PYTHON]      PYTHON (python3): has the package "build"
set -euo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)
python=${1:-python3}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

"$python" -m build --wheel --config-setting "build-dir=$work/build" --outdir "$work" "$root"
"$python" -m venv "$work/venv"
"$work/venv/bin/pip" --disable-pip-version-check install --quiet "$work"/*.whl

cd "$work" # not the source tree
"$work/venv/bin/python" - << 'END'
import importlib.metadata
import importlib.util
from pathlib import Path

import numpy as np

import flex_prefill as fp

for absent in ("torch", "transformers"):
    assert importlib.util.find_spec(absent) is None, absent
assert fp.__version__ == importlib.metadata.version("flex_prefill")
assert Path(fp.__file__).with_name("py.typed").exists()

rng = np.random.default_rng(0)
q, k, v = (rng.standard_normal((1, 2000, h, 64), dtype=np.float32) for h in (4, 2, 2))
out, lse, audit = fp.prefill(
    q, k, v, fp.FlexPrefill(gamma=0.5, min_budget=128), return_lse=True, audit=True
)
assert out.shape == q.shape and out.dtype == np.float32 and np.isfinite(out).all()
assert lse.shape == (1, 4, 2000) and np.isfinite(lse).all()
assert 0 < audit.mean_density < 1
np.testing.assert_allclose(
    fp.attend(q, k, v), fp.attend(q, k, v, backend="reference"), rtol=1e-4, atol=1e-5
)
print(f"flex_prefill {fp.__version__} from its wheel: density {audit.mean_density:.2f},", fp.info())
END
"$work/venv/bin/flexprefill" --help > /dev/null
