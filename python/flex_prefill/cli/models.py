"""What eval and test-llm share: lengths, patterns with JSON settings, a model on a device."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flex_prefill.cli.common import (
    DTYPES,
    CommandError,
    choose_dtype,
    describe_pattern,
    load_model,
    load_torch,
    positive,
)
from flex_prefill.patch import _suggestion, check_config, get_config_example

ENGINES = ("hf", "vllm")


@dataclass(frozen=True)
class NamedPattern:
    """A pattern by its published name and its checked settings, as `patch_model` takes them."""

    name: str
    config: dict[str, Any]

    @property
    def label(self) -> str:
        return describe_pattern(self.name, self.config)


def token_length(text: str) -> int:
    """A number of tokens: 4096 or 4k."""
    number, thousand = (text[:-1], 1024) if text[-1:] in "kK" else (text, 1)
    try:
        return positive(number) * thousand
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"expected a number of tokens such as 4096 or 4k, got {text!r}"
        ) from None


def named_patterns(names: Sequence[str], configs: Sequence[str]) -> list[NamedPattern]:
    """Patterns with their settings, JSON objects with the keys of `get_config_example`, whose
    prefix `flex_prefill_` may be left out; no settings at all, or one object for each pattern."""
    if configs and len(configs) != len(names):
        raise CommandError(
            f"argument --config: expected one for each of {len(names)} patterns, got "
            f"{len(configs)}",
            usage=True,
        )
    patterns = []
    for name, text in zip(names, configs or ["{}"] * len(names), strict=True):
        try:
            config = json.loads(text)
        except ValueError as error:
            raise CommandError(
                f"argument --config: expected JSON such as '{{\"gamma\": 0.9}}', got {text!r}: "
                f"{error}",
                usage=True,
            ) from None
        try:
            if isinstance(config, dict):
                config = _with_prefixes(config, get_config_example(name))
            patterns.append(NamedPattern(name, check_config(name, config)))
        except ValueError as error:
            raise CommandError(str(error), usage=True) from None
    return patterns


def _with_prefixes(config: dict[str, Any], known: dict[str, Any]) -> dict[str, Any]:
    """Short names spelt out; one that is none is named with the nearest."""
    long_names = {name.removeprefix("flex_prefill_"): name for name in known}
    for key in config:
        if key not in known and key not in long_names:
            raise ValueError(
                f"argument --config: no setting {key!r}" + _suggestion(key, long_names, "settings")
            )
    return {long_names.get(key, key): value for key, value in config.items()}


def add_engine_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", type=Path, metavar="FOLDER", help="Hugging Face folder (default: the built-in)"
    )
    parser.add_argument(
        "--engine", default="hf", help="what runs the model: hf, transformers (default)"
    )
    parser.add_argument(
        "--device", default="auto", help="as torch names it (default: cuda where there is one)"
    )
    parser.add_argument(
        "--dtype",
        choices=("auto", *DTYPES),
        default="auto",
        help="auto: the faster of bfloat16 and float32 on a CPU, the weights' own elsewhere",
    )
    parser.add_argument("--threads", type=positive, default=0, help="default: all there are")


def check_engine(name: str) -> None:
    if name == "vllm":
        raise CommandError("argument --engine: vllm is not there yet, hf is", usage=True)
    if name not in ENGINES:
        raise CommandError(f"argument --engine: expected hf, got {name!r}", usage=True)


def load_engine(args: argparse.Namespace, folder: Path) -> tuple[Any, Any, Any]:
    """(torch, model, tokenizer): the model on its device, in its dtype, for inference."""
    torch = load_torch(args.threads, "transformers")
    name = args.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        first_line = str(error).splitlines()[0]
        raise CommandError(f"argument --device: {name!r}: {first_line}", usage=True) from None
    dtype: Any = "auto"
    if args.dtype != "auto" or device.type == "cpu":
        dtype = choose_dtype(torch, args.dtype)[0]
    model, tokenizer = load_model(folder, dtype)
    if args.dtype == "auto" and device.type != "cpu" and model.dtype == torch.float32:
        model = model.to(torch.bfloat16)
    return torch, model.to(device), tokenizer


def context_of(model: Any) -> int | None:
    """Tokens that the model has positions for, where its configuration says."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return None if limit is None else int(limit)
