"""Finds MInference's pattern for each head of a model, and writes them in its file format.

On sample prompts, every head's attention is computed densely and with each candidate: a-shapes,
vertical and slash in several proportions, block-sparse. All candidates have the same budget of keys
for each query, so they cost about the same; what counts is the error of the head's output
(relative, root mean square), computed by this library's own kernels, as MInference's kernel-aware
search does (arXiv 2407.02490, section 3.3). Beside FILE.json the evidence is written, with the
error, the kept attention mass and the density of each candidate: FILE.evidence.json.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np

import flex_prefill
from flex_prefill.cli.common import (
    DTYPES,
    CommandError,
    check_context,
    choose_dtype,
    find_model,
    format_table,
    load_model,
    load_torch,
    new_file,
    positive,
    require,
)
from flex_prefill.cli.prompts import add_prompt_arguments, check_prompt_arguments, make_prompt
from flex_prefill.minference import to_entry
from flex_prefill.patterns import MInference, MInferenceHead

SUMMARY = "find MInference's per-head patterns of a model"
EXAMPLE = """examples:
  flexprefill calibrate --out needle.json
  flexprefill calibrate --model ~/models/Qwen2.5-0.5B-Instruct --tokens 16384 --out qwen.json
  then patch_model(model, "minfer", {"path": "qwen.json"})"""

_NAME = "flex_prefill_calibrate"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", type=Path, metavar="FOLDER", help="Hugging Face folder (default: the built-in)"
    )
    parser.add_argument("--out", type=new_file, required=True, metavar="FILE.json")
    parser.add_argument(
        "--budget", type=positive, help="keys of each query (default: a quarter of --tokens)"
    )
    parser.add_argument("--block-size", type=int, choices=(32, 64, 128), default=128)
    parser.add_argument("--samples", type=positive, default=3, help="prompts (default 3)")
    add_prompt_arguments(parser, tokens=4096)
    parser.add_argument("--dtype", choices=("auto", *DTYPES), default="auto")
    parser.add_argument("--threads", type=positive, default=0, help="default: all there are")


def candidates(budget: int, block_size: int) -> list[MInferenceHead]:
    """What is tried: all with `budget` keys for each query, in whole blocks."""
    blocks = max(-(-budget // block_size), 2)
    found = []
    for kind, shares in (("a_shape", (8, 2)), ("vertical_slash", (8, 4, 2))):
        for share in shares:
            part = max(blocks // share, 1)
            splits = {(part, blocks - part)}
            if kind == "vertical_slash":
                splits.add((blocks - part, part))
            for vertical, slash in sorted(splits):
                head = MInferenceHead(kind, vertical * block_size, slash * block_size)
                if head not in found:
                    found.append(head)
    return [*found, MInferenceHead("block_sparse", blocks * block_size, 1)]


def run(args: argparse.Namespace) -> None:
    check_prompt_arguments(args)
    if args.out.suffix != ".json":
        raise CommandError(f"argument --out: expected a name that ends in .json, got {args.out}")
    folder = find_model(args.model)
    torch = load_torch(args.threads, "transformers")
    require("transformers", "transformers")
    dtype, _ = choose_dtype(torch, args.dtype)
    model, tokenizer = load_model(folder, dtype)
    config = model.config.get_text_config()
    prompts = []
    for sample in range(1 if args.prompt_file is not None else args.samples):
        numbered = copy.copy(args)
        numbered.seed = args.seed + sample
        prompts.append(make_prompt(numbered, tokenizer).token_ids)
        check_context(model, len(prompts[-1]))
    tokens = min(map(len, prompts))
    budget = args.budget or tokens // 4
    tried = candidates(budget, args.block_size)
    if tokens < 2 * budget or tokens <= 2 * args.block_size:
        raise CommandError(
            f"argument --tokens: expected at least {2 * max(budget, args.block_size)}, twice the "
            f"budget, got {tokens}",
            usage=True,
        )
    figures = measure(torch, model, prompts, tried, args)
    report = evidence(folder, config, figures, tried, budget, tokens, args)
    layers = [
        {
            str(h): to_entry(tried[head["best"]], round(1 - head["candidates"][head["best"]][0], 4))
            for h, head in enumerate(layer)
        }
        for layer in report["layers"]
    ]
    _write(args.out, json.dumps(layers))
    where = args.out.with_suffix(".evidence.json")
    _write(where, json.dumps(report, indent=1) + "\n")
    _print(report)
    print(f"\nwrote {args.out} and {where}")


def measure(
    torch: Any, model: Any, prompts: list[list[int]], tried: list[MInferenceHead], args: Any
) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Means over the prompts, [layers, candidates, heads, 3]: error, kept mass, density."""
    tqdm = require("tqdm", "transformers").tqdm
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    config = model.config.get_text_config()
    figures = np.zeros((config.num_hidden_layers, len(tried), config.num_attention_heads, 3))
    seen: set[int] = set()
    own = ALL_ATTENTION_FUNCTIONS["sdpa"]
    progress = tqdm(
        total=len(prompts) * len(figures) * len(tried),
        unit="candidate",
        file=sys.stderr,
        disable=None,
    )

    def attention(
        module: Any, query: Any, key: Any, value: Any, mask: Any, **kwargs: Any
    ) -> tuple[Any, Any]:
        window = kwargs.get("sliding_window")
        if window is not None and window < query.shape[2]:
            raise CommandError(
                f"layer {module.layer_idx} sees a sliding window of {window} tokens only"
            )
        result: tuple[Any, Any] = own(module, query, key, value, mask, **kwargs)
        exact = result[0].float()  # [1, s, h_q, d_v]
        scale = exact.square().mean(dim=(0, 1, 3)).sqrt().clamp_min(1e-30)
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        for number, head in enumerate(tried):
            out, audit = flex_prefill.prefill(
                q,
                k,
                v,
                MInference((head,) * q.shape[2]),
                softmax_scale=kwargs.get("scaling"),
                block_size=args.block_size,
                num_threads=torch.get_num_threads(),
                audit=True,
            )
            error = (out.float() - exact).square().mean(dim=(0, 1, 3)).sqrt() / scale
            figures[module.layer_idx, number] += np.stack(
                [error.numpy(), audit.kept_mass[0], audit.density[0]], axis=1
            ) / len(prompts)
            progress.update()
        seen.add(module.layer_idx)
        return result

    AttentionInterface.register(_NAME, attention)
    AttentionMaskInterface.register(_NAME, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    before = model.config._attn_implementation
    model.set_attn_implementation(_NAME)
    try:
        with torch.inference_mode():
            for prompt in prompts:
                model(torch.tensor([prompt]), use_cache=False, logits_to_keep=1)
    finally:
        model.set_attn_implementation(before)
        progress.close()
    if seen != set(range(len(figures))):
        raise CommandError(
            f"{type(model).__name__} has layers whose attention cannot be looked at: "
            f"{sorted(set(range(len(figures))) - seen)}"
        )
    return figures


def evidence(
    folder: Path,
    config: Any,
    figures: np.ndarray[Any, np.dtype[np.float64]],
    tried: list[MInferenceHead],
    budget: int,
    tokens: int,
    args: argparse.Namespace,
) -> dict[str, Any]:
    """Everything that was measured, and the best of each head: the least error of its output."""
    return {
        "model": folder.name,
        "model_type": getattr(config, "model_type", None),
        "tokens": tokens,
        "budget": budget,
        "block_size": args.block_size,
        "samples": 1 if args.prompt_file is not None else args.samples,
        "prompts": str(args.prompt_file or args.kind),
        "version": flex_prefill.__version__,
        "candidates": [[head.kind, head.vertical_size, head.slash_size] for head in tried],
        "figures": ["error of the output", "kept attention mass (probe)", "density"],
        "layers": [
            [
                {
                    "best": int(np.argmin(layer[:, h, 0])),
                    "candidates": np.round(layer[:, h], 5).tolist(),
                }
                for h in range(layer.shape[1])
            ]
            for layer in figures
        ],
    }


def _print(report: dict[str, Any]) -> None:
    rows = []
    for number, layer in enumerate(report["layers"]):
        best = [head["candidates"][head["best"]] for head in layer]
        kinds = [report["candidates"][head["best"]][0] for head in layer]
        means = np.mean(best, axis=0)
        rows.append(
            [
                str(number),
                *(str(kinds.count(kind)) for kind in ("a_shape", "vertical_slash", "block_sparse")),
                *(f"{mean:.3f}" for mean in means),
            ]
        )
    header = ["layer", "a-shape", "vertical-slash", "block-sparse", "error", "kept", "density"]
    print(format_table(header, rows))


def _write(path: Path, text: str) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)
