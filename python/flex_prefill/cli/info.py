"""Shows what this build has and what this machine runs: version, CPU targets, GPUs, packages."""

from __future__ import annotations

import argparse
import platform
from typing import Any

import flex_prefill
from flex_prefill.cli.common import (
    CommandError,
    cpu_description,
    find_model,
    new_file,
    package_versions,
    write_json,
)

SUMMARY = "what this build has and this machine runs"
EXAMPLE = "example:\n  flexprefill info --json -"

# Optional packages and the extra that installs each.
_OPTIONAL = {
    "torch": "torch",
    "transformers": "transformers",
    "rich": "transformers",
    "matplotlib": "plot",
    "jax": "jax",
    "ml_dtypes": "ml_dtypes",
}
_EXTRAS = ("torch", "transformers", "plot")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--json", type=new_file, metavar="FILE", help="as JSON; - is standard output"
    )


def run(args: argparse.Namespace) -> None:
    info = flex_prefill.info()
    cuda = info["cuda"]
    packages = package_versions(tuple(_OPTIONAL))
    try:
        model: str | None = str(find_model(None))
    except CommandError:
        model = None
    report = {
        "version": info["version"],
        "python": platform.python_version(),
        **cpu_description(),
        "threads": info["threads"],
        "cpu_targets": info["cpu_targets"],
        "backends": ["cpu", "reference", *(["cuda", "sm80", "sm90"] if cuda["built"] else [])],
        "cuda": cuda,
        "builtin_model": model,
        "packages": packages,
    }
    write_json(args.json, report)
    if args.json is not None:
        return
    print(f"flex_prefill  {report['version']} (Python {report['python']})")
    print(f"processor     {report['cpu']}: {' '.join(report['cpu_features'])}")
    print(f"threads       {report['threads']}")
    print(f"CPU targets   {', '.join(report['cpu_targets'])} (best first)")
    print(f"backends      {', '.join(report['backends'])}")
    print(f"CUDA          {_describe_cuda(cuda)}")
    for device in cuda["devices"]:
        major, minor = device["compute_capability"]
        print(
            f"              {device['name']}: compute capability {major}.{minor}, "
            f"{device['multiprocessors']} multiprocessors, {device['memory_bytes'] / 2**30:.0f} GiB"
        )
    print(f"model         {model or 'none built in: it comes with a checkout of the repository'}")
    for name, version in packages.items():
        extra = _OPTIONAL[name]
        wanted = f"flex_prefill[{extra}]" if extra in _EXTRAS else extra
        print(f"{name:<13} {version or f'not installed: pip install {wanted!r}'}")


def _describe_cuda(cuda: dict[str, Any]) -> str:
    if not cuda["built"]:
        return "not in this build: install where nvcc is found"

    def version(number: int) -> str:
        return f"{number // 1000}.{number % 1000 // 10}"

    driver = f"driver for {version(cuda['driver'])}" if cuda["driver"] else "no driver"
    cards = "" if cuda["devices"] else f", no GPU ({cuda['error'] or 'none found'})"
    return f"{version(cuda['runtime'])}, {driver}{cards}"
