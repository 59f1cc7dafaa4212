"""Answers a question hidden in a long document, with the model's own attention and sparse.

Both runs use the same model, weights, element type and threads, after a warm-up; time to first
token is that of the whole model reading the prompt. The model's own attention is torch's
scaled_dot_product_attention. Torch's idle threads sleep instead of spinning (OMP_WAIT_POLICY is
set to PASSIVE unless you set it), in both runs: spinning ones take the cores away from other pools.
"""

from __future__ import annotations

import argparse
import inspect
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flex_prefill.cli.common import (
    DTYPES,
    add_pattern_arguments,
    cache_of,
    check_context,
    choose_dtype,
    describe_pattern,
    find_model,
    format_table,
    load_model,
    load_torch,
    new_file,
    pattern_config,
    positive,
    require,
    run_description,
    write_json,
)
from flex_prefill.cli.prompts import (
    Prompt,
    add_prompt_arguments,
    check_prompt_arguments,
    make_prompt,
)

SUMMARY = "answer a question hidden in a long document, dense and sparse"
EXAMPLE = """examples:
  flexprefill demo
  flexprefill demo --model ~/models/Qwen2.5-0.5B-Instruct --prompt-file book.txt \\
      --question "Who was the father of Antonia?" --tokens 30000"""

_WARM_UP_TOKENS = 2048


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", type=Path, metavar="FOLDER", help="Hugging Face folder (default: the built-in)"
    )
    add_prompt_arguments(parser)
    parser.add_argument("--expect", metavar="TEXT", help="what the answer must contain")
    add_pattern_arguments(parser)
    parser.add_argument(
        "--dtype",
        choices=("auto", *DTYPES),
        default="auto",
        help="auto: the faster of bfloat16 and float32 in torch's matrix product on this machine",
    )
    parser.add_argument("--threads", type=positive, default=0, help="default: all there are")
    parser.add_argument("--repeat", type=positive, default=1, help="runs of each; medians count")
    parser.add_argument("--max-new-tokens", type=positive, default=32)
    parser.add_argument("--json", type=new_file, metavar="FILE", help="- is standard output")


def run(args: argparse.Namespace) -> None:
    check_prompt_arguments(args)
    cfg = pattern_config(args)
    folder = find_model(args.model)
    torch = load_torch(args.threads, "transformers")
    description = run_description(torch, args.command_line)  # before there is load of our own
    require("transformers", "transformers")
    require("rich", "transformers")
    dtype, reason = choose_dtype(torch, args.dtype)
    model, tokenizer = load_model(folder, dtype)
    prompt = make_prompt(args, tokenizer)
    check_context(model, len(prompt.token_ids) + args.max_new_tokens)

    quiet = str(args.json) == "-"
    if not quiet:
        _print_task(folder, model, torch, dtype, reason, prompt)
    with torch.inference_mode():
        runs = _run_both(torch, model, tokenizer, prompt, args, cfg)
    own, sparse = runs
    report = {
        **description,
        "model": {"folder": str(folder), "parameters": model.num_parameters()},
        "dtype": str(dtype).removeprefix("torch."),
        "pattern": {"name": args.pattern, **cfg},
        "prompt": {
            "tokens": len(prompt.token_ids),
            "question": prompt.question,
            "expected": prompt.answer,
            "answer_depth": prompt.answer_depth,
        },
        "own": own,
        "sparse": sparse,
        "speedup": own["seconds_to_first_token"] / sparse["seconds_to_first_token"],
    }
    write_json(args.json, report)
    if not quiet:
        _print_runs(report, describe_pattern(args.pattern, cfg))


def _run_both(
    torch: Any,
    model: Any,
    tokenizer: Any,
    prompt: Prompt,
    args: argparse.Namespace,
    cfg: dict[str, Any],
) -> list[dict[str, Any]]:
    """Answers, times to first token, density: of the own attention, then of the pattern."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    from flex_prefill.hf import collect_audits
    from flex_prefill.patch import patch_model, unpatch_model

    ids = torch.tensor([prompt.token_ids])
    layers = [module for module in model.modules() if getattr(module, "is_causal", None) is True]
    prepare: dict[str, Callable[[], Any]] = {
        "own attention": lambda: unpatch_model(model),
        args.pattern: lambda: patch_model(model, args.pattern, cfg),
    }
    seconds: dict[str, list[float]] = {name: [] for name in prepare}
    replies: dict[str, str] = {}
    heads: list[Any] = []
    columns = (TextColumn("{task.description:<28}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        for set_attention in prepare.values():
            set_attention()
            model(ids[:, :_WARM_UP_TOKENS], use_cache=False)
        for _ in range(args.repeat):
            for name, set_attention in prepare.items():
                set_attention()
                task = progress.add_task(f"{name}: reading", total=len(layers))
                hooks = [
                    layer.register_forward_hook(lambda *_, task=task: progress.advance(task))
                    for layer in layers
                ]
                with collect_audits() as audits:
                    start = time.perf_counter()
                    token, cache = _read(model, ids)
                    seconds[name].append(time.perf_counter() - start)
                for hook in hooks:
                    hook.remove()
                heads = audits or heads
                progress.update(task, description=f"{name}: answering")
                replies[name] = _write(torch, model, tokenizer, token, cache, args.max_new_tokens)
                progress.update(task, description=f"{name}: done")
                progress.stop_task(task)
    unpatch_model(model)
    runs = []
    for name, reply in replies.items():
        sparse = name != "own attention"
        kept = [audit for _, audit in heads] if sparse else []
        runs.append(
            {
                "reply": reply,
                "right": prompt.is_right(reply),
                "seconds_to_first_token": statistics.median(seconds[name]),
                "seconds": seconds[name],
                "density": _mean([float(audit.density.mean()) for audit in kept]),
                "kept_mass": _mean([float(audit.kept_mass.mean()) for audit in kept]),
            }
        )
    return runs


def _mean(values: list[float]) -> float:
    """1 where there are none: everything was kept."""
    return statistics.fmean(values) if values else 1.0


def _read(model: Any, ids: Any) -> tuple[int, dict[str, Any]]:
    """The first token of the answer, and the cache as `cache_of` gives it."""
    options: dict[str, Any] = {"use_cache": True}
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        options["logits_to_keep"] = 1
    output = model(ids, **options)
    return int(output.logits[0, -1].argmax()), cache_of(output)


def _write(
    torch: Any, model: Any, tokenizer: Any, token: int, cache: dict[str, Any], max_new_tokens: int
) -> str:
    """The greedy answer up to its first line's end."""
    stop = model.generation_config.eos_token_id
    ends = set(stop if isinstance(stop, list) else [stop, tokenizer.eos_token_id])
    tokens: list[int] = []
    reply = ""
    while token not in ends:
        tokens.append(token)
        reply = tokenizer.decode(tokens, skip_special_tokens=True)
        if len(tokens) == max_new_tokens or "\n" in reply.lstrip():
            break
        output = model(torch.tensor([[token]]), use_cache=True, **cache)
        token, cache = int(output.logits[0, -1].argmax()), cache_of(output)
    return reply.strip().partition("\n")[0]


def _print_task(
    folder: Path, model: Any, torch: Any, dtype: Any, reason: str, prompt: Prompt
) -> None:
    config = model.config.get_text_config()
    n = len(prompt.token_ids)
    print(
        f"model     {folder}: {model.num_parameters() / 1e6:.1f} M parameters, "
        f"{config.num_hidden_layers} layers, {config.num_attention_heads} heads"
    )
    name = str(dtype).removeprefix("torch.")
    print(f"machine   {torch.get_num_threads()} threads, {name} ({reason})")
    if prompt.answer_depth is None:
        print(f"prompt    {n} tokens")
    else:
        print(
            f"prompt    {n} tokens; the answer is stated at token {prompt.answer_depth} "
            f"({prompt.answer_depth / n:.0%} of the way)"
        )
    print(f"question  {prompt.question}")
    if prompt.answer is not None:
        print(f"expected  {prompt.answer}")
    print(flush=True)


def _print_runs(report: dict[str, Any], pattern: str) -> None:
    rows = []
    for name, result in (("own attention (torch)", report["own"]), (pattern, report["sparse"])):
        right = {True: "right", False: "wrong", None: ""}[result["right"]]
        rows.append(
            [
                name,
                result["reply"][:60],
                right,
                f"{result['seconds_to_first_token']:.2f} s",
                f"{result['density']:.2f}",
            ]
        )
    print()
    print(format_table(["attention", "answer", "", "time to first token", "density"], rows))
    print(f"\nspeed-up  {report['speedup']:.2f}x to the first token, the whole model counted")
    if report["sparse"]["density"] == 1:
        print("note      every block was kept: the prompt is too short for this pattern's budget")
