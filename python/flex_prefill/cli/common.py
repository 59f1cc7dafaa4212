"""What the commands share: arguments, optional packages, the model, tables, what a run was on."""

from __future__ import annotations

import argparse
import difflib
import importlib
import importlib.metadata
import io
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import flex_prefill
from flex_prefill.minference import LayerPatterns
from flex_prefill.patch import check_config, get_config_example, pattern_of
from flex_prefill.patterns import Pattern

PATTERNS = (
    "flex_prefill",
    "vertical_slash",
    "streaming_llm",
    "xattention",
    "flash_prefill",
    "block_cover",
    "minfer",
    "flash",
)
DTYPES = ("float32", "float16", "bfloat16")
PICTURES = (".png", ".svg", ".pdf")
_BUILTIN_MODEL = Path("models", "needle-7m")


class CommandError(Exception):
    """An expected failure: one line for the user. ``usage``: the arguments are at fault."""

    def __init__(self, message: str, *, usage: bool = False) -> None:
        super().__init__(message)
        self.usage = usage


def require(module: str, extra: str) -> Any:
    """Imports an optional package, or names the extra that brings it."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise CommandError(
            f"{error.name} is needed and not installed: pip install 'flex_prefill[{extra}]'"
        ) from None


def positive(text: str) -> int:
    """An argument that counts something."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a number of at least 1, got {text}")
    return value


def new_file(text: str) -> Path:
    """An argument that names a file to write: what would fail after the work fails before it."""
    path = Path(text)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"expected a file to write, got the folder {text}")
    folder = path.absolute().parent
    while not folder.exists():  # made when the file is written
        folder = folder.parent
    if not (folder.is_dir() and os.access(folder, os.W_OK)):
        raise argparse.ArgumentTypeError(f"{text} cannot be written: {folder} is no such folder")
    return path


def new_picture(text: str) -> Path:
    """The same for a picture of matplotlib."""
    if Path(text).suffix not in PICTURES:
        raise argparse.ArgumentTypeError(
            f"expected a name that ends in {', '.join(PICTURES)}, got {text}"
        )
    return new_file(text)


def _pattern_name(text: str) -> str:
    if text not in PATTERNS:
        nearest = difflib.get_close_matches(text, PATTERNS, n=1, cutoff=0.5)
        hint = f"; did you mean {nearest[0]}?" if nearest else ""
        raise argparse.ArgumentTypeError(
            f"expected one of {', '.join(PATTERNS)}, got {text!r}{hint}"
        )
    return text


def add_pattern_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("pattern")
    group.add_argument(
        "--pattern",
        type=_pattern_name,
        default="flex_prefill",
        metavar="NAME",
        help=f"{', '.join(PATTERNS)} (default: %(default)s)",
    )
    group.add_argument(
        "--gamma",
        type=float,
        help="share of the attention to cover (flex_prefill, block_cover; default 0.9)",
    )
    group.add_argument(
        "--cfg",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="what else the pattern takes, by the keys of flex_prefill.get_config_example, e.g. "
        "flex_prefill_min_budget=512",
    )


def pattern_config(args: argparse.Namespace) -> dict[str, Any]:
    """The checked ``cfg`` of ``patch_model(model, args.pattern, cfg)``."""
    cfg: dict[str, Any] = {}
    for pair in args.cfg:
        key, separator, value = pair.partition("=")
        if key in ("path", "model_type") and separator:
            cfg[key] = value
            continue
        try:
            cfg[key] = json.loads(value)
        except ValueError:
            raise CommandError(
                f"argument --cfg: expected KEY=NUMBER, got {pair!r}"
                + ("" if separator else " (no '=')"),
                usage=True,
            ) from None
    if args.gamma is not None:
        key = {"flex_prefill": "flex_prefill_gamma", "block_cover": "gamma"}.get(args.pattern)
        if key is None:
            raise CommandError(f"argument --gamma: {args.pattern} has none", usage=True)
        cfg[key] = args.gamma
    try:
        return check_config(args.pattern, cfg)
    except ValueError as error:
        raise CommandError(str(error), usage=True) from None


def pattern_from(args: argparse.Namespace) -> tuple[Pattern, int]:
    """The pattern and the block size that the arguments ask for."""
    pattern, block_size = pattern_of(args.pattern, pattern_config(args))
    if isinstance(pattern, LayerPatterns):
        # A layer's, where there is a model; the first where there is none.
        layer = getattr(args, "layer", None) or 0
        heads = pattern.layers[0].heads
        pattern = pattern.of(layer, getattr(args, "heads", len(heads)))
    return pattern, block_size


def describe_pattern(name: str, cfg: dict[str, Any]) -> str:
    """``flex_prefill (gamma 0.9, min_budget 512)``: what differs from the defaults, and gamma."""
    default = get_config_example(name)
    shown = [
        f"{key.removeprefix('flex_prefill_')} {value}"
        for key, value in cfg.items()
        if key.endswith("gamma") or value != default[key]
    ]
    return f"{name} ({', '.join(shown)})" if shown else name


def load_torch(threads: int, extra: str = "torch") -> Any:
    """Imports torch with a thread pool that sleeps between calls.

    libgomp's threads otherwise spin for a while after each of torch's calls and take the cores away
    from whoever computes next. It reads OMP_WAIT_POLICY when torch is loaded; a value that the
    user has set stays.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    torch = require("torch", extra)
    torch.set_num_threads(threads or flex_prefill.info()["threads"])
    return torch


def gemm_rate(torch: Any, dtype: Any, seconds: float = 0.05) -> tuple[float, int]:
    """FLOP/s of torch's square matrix product, and its size: the first that takes `seconds`."""
    n = 128
    while True:
        a, b = torch.ones(n, n, dtype=dtype), torch.ones(n, n, dtype=dtype)
        a @ b
        start = time.perf_counter()
        a @ b
        spent = time.perf_counter() - start
        if spent >= seconds or n == 4096:
            return 2 * n**3 / spent, n
        n *= 2


def choose_dtype(torch: Any, name: str) -> tuple[Any, str]:
    """A dtype of torch, and why: for "auto" the faster of bfloat16 and float32 on this machine."""
    if name != "auto":
        return getattr(torch, name), "as asked"
    rates = {dtype: gemm_rate(torch, dtype)[0] for dtype in (torch.bfloat16, torch.float32)}
    best = max(rates, key=lambda dtype: rates[dtype])
    other = next(dtype for dtype in rates if dtype is not best)
    ratio = rates[best] / rates[other]
    return best, f"torch multiplies matrices {ratio:.1f}x as fast as in {_dtype_name(other)} here"


def _dtype_name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")


def checkout() -> Path | None:
    """The source tree: the working directory (as "."), or where this file lies in one."""
    for root in (Path(), Path(__file__).resolve().parents[3]):
        if (root / "include" / "flexprefill" / "flexprefill.h").is_file():
            return root
    return None


def find_model(path: Path | None) -> Path:
    """The folder of the user's model, or of the built-in one."""
    if path is not None:
        if not (path / "config.json").is_file():
            raise CommandError(
                f"--model: expected a Hugging Face model folder, found no config.json in {path}"
            )
        return path
    root = checkout()
    if root is not None and (root / _BUILTIN_MODEL / "config.json").is_file():
        return root / _BUILTIN_MODEL
    raise CommandError(
        f"the built-in model ({_BUILTIN_MODEL}) is part of the repository: run this from a "
        "checkout, or name a model by --model FOLDER"
    )


def load_model(folder: Path, dtype: Any, attention: str = "sdpa") -> tuple[Any, Any]:
    """(model, tokenizer), in evaluation mode, nothing fetched from a network."""
    transformers = require("transformers", "transformers")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, attn_implementation=attention, local_files_only=True
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CommandError(f"--model: {folder} cannot be loaded: {first_line}") from None
    return model.eval(), tokenizer


def cache_of(output: Any) -> dict[str, Any]:
    """The cache of a forward pass, as the keyword argument that the next one takes it by."""
    name = "cache" if "cache" in output else "past_key_values"  # before transformers 5.24
    return {name: output[name]}


def read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise CommandError(f"--prompt-file: expected text in UTF-8 in {path}") from None


def check_context(model: Any, n_tokens: int) -> None:
    """Refuses a prompt that the model has no positions for."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and n_tokens > limit:
        raise CommandError(f"the model takes at most {limit} tokens, the prompt has {n_tokens}")


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns under a rule; the first is left-aligned, the others right-aligned."""
    widths = [max(len(line[c]) for line in (header, *rows)) for c in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        first, *others = (
            cell.rjust(width) if c else cell.ljust(width)
            for c, (cell, width) in enumerate(zip(cells, widths, strict=True))
        )
        return "  ".join((first, *others)).rstrip()

    return "\n".join([line(header), "  ".join("-" * width for width in widths), *map(line, rows)])


def package_versions(names: Sequence[str]) -> dict[str, str | None]:
    """Installed versions; None where a package is not there. Imports nothing."""
    versions: dict[str, str | None] = {}
    for name in names:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return versions


def cpu_description() -> dict[str, Any]:
    """The processor's model and the features that matter here, as the system names them."""
    model, features = platform.processor() or platform.machine(), []
    interesting = ("avx2", "fma", "f16c", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "bf16")
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    for line in lines:
        key, _, value = (part.strip() for part in line.partition(":"))
        if key == "model name":
            model = value
        elif key in ("flags", "Features"):
            features = [name for name in interesting if name in value.split()]
    return {"cpu": model, "cpu_features": features, "architecture": platform.machine()}


def commit() -> str | None:
    """The source tree's commit, "+" behind it where files differ; None outside a checkout."""
    root = checkout()
    if root is None:
        return None

    def git(*command: str) -> str:
        return subprocess.run(
            ["git", "-C", str(root), *command], check=True, capture_output=True, text=True
        ).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", "src", "python")
        return git("rev-parse", "--short=12", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def run_description(torch: Any, command_line: str) -> dict[str, Any]:
    """What a measurement was made on and by, for its JSON."""
    info = flex_prefill.info()
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command_line,
        "commit": commit(),
        "machine": {
            **cpu_description(),
            "threads": torch.get_num_threads(),
            "system": platform.system(),
            "cpu_targets": info["cpu_targets"],
            "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY"),
            "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        },
        "versions": {
            "flex_prefill": info["version"],
            "python": platform.python_version(),
            **package_versions(("torch", "transformers", "numpy")),
        },
    }


def write_json(path: Path | None, report: dict[str, Any]) -> None:
    """Writes a report; "-" is standard output, None nothing."""
    if path is None:
        return
    text = json.dumps(report, indent=1) + "\n"
    if str(path) == "-":
        sys.stdout.write(text)
        return
    from flex_prefill.eval.data import write_atomically

    write_atomically(path, text)


def write_picture(path: Path, figure: Any, dpi: int) -> None:
    """Writes a figure of matplotlib, in the format of the path's suffix, and closes it."""
    from matplotlib import pyplot as plt

    from flex_prefill.eval.data import write_atomically

    data = io.BytesIO()
    figure.savefig(data, dpi=dpi, format=path.suffix[1:])
    plt.close(figure)
    write_atomically(path, data.getvalue())
