"""Lets a model answer from a long prompt under a pattern, and logs the total time.

The options are those of the published code's tests/test_llm.py. The prompt hides a code in a long
document, of each length asked for; without --length, of 4k, 8k, ... up to the model's context or
128k. The total time is that of the prompt and of the new tokens.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

from flex_prefill import retrieval
from flex_prefill.cli.common import (
    CommandError,
    find_model,
    format_table,
    new_file,
    positive,
    require,
    run_description,
    write_json,
)
from flex_prefill.cli.models import (
    add_engine_arguments,
    check_engine,
    context_of,
    load_engine,
    named_patterns,
    token_length,
)

SUMMARY = "answers from long prompts under a pattern, with the total time"
EXAMPLE = """examples:
  flexprefill test-llm --length 4k 16k
  flexprefill test-llm --model ~/models/Llama-3.1-8B-Instruct --pattern flex_prefill \\
      --config '{"gamma": 0.9}' --length 4k 8k 16k 32k 64k 128k --max_new_tokens 64"""

LENGTHS = tuple(4096 << i for i in range(6))  # 4k to 128k


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_engine_arguments(parser)
    parser.add_argument("--pattern", default="flex_prefill", metavar="NAME")
    parser.add_argument("--config", metavar="JSON", help="the pattern's settings")
    parser.add_argument(
        "--length", nargs="+", type=token_length, metavar="TOKENS", help="4096 or 4k, ..."
    )
    parser.add_argument(
        "--max_new_tokens", "--max-new-tokens", type=positive, default=64, metavar="N"
    )
    parser.add_argument("--seed", type=int, default=0, help="another seed, another document")
    parser.add_argument("--json", type=new_file, metavar="FILE", help="- is standard output")


def run(args: argparse.Namespace) -> None:
    check_engine(args.engine)
    (pattern,) = named_patterns([args.pattern], [args.config] if args.config else [])
    folder = find_model(args.model)
    collect_audits = require("flex_prefill.hf", "transformers").collect_audits
    from flex_prefill.patch import patch_model

    torch, model, tokenizer = load_engine(args, folder)
    description = run_description(torch, args.command_line)
    lengths = _lengths(args, context_of(model))
    patch_model(model, pattern.name, pattern.config)

    def count(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False)["input_ids"])

    quiet = str(args.json) == "-"
    rows: list[dict[str, Any]] = []
    for length in lengths:
        text, answer = retrieval.make_prompt("single", length, args.seed, count)
        ids = tokenizer(text, return_tensors="pt").to(model.device)
        with torch.inference_mode(), collect_audits() as audits:
            _wait(torch, model.device)
            start = time.perf_counter()
            output = model.generate(
                **ids,
                max_new_tokens=args.max_new_tokens,
                do_sample=False,
                pad_token_id=tokenizer.eos_token_id,
            )
            _wait(torch, model.device)
            seconds = time.perf_counter() - start
        tokens = ids["input_ids"].shape[1]
        reply = tokenizer.decode(output[0, tokens:], skip_special_tokens=True).strip()
        densities = [audit.mean_density for _, audit in audits]
        rows.append(
            {
                "tokens": tokens,
                "new_tokens": output.shape[1] - tokens,
                "total_seconds": seconds,
                "density": sum(densities) / len(densities) if densities else 1.0,
                "reply": reply,
                "expected": answer,
                "right": retrieval.is_correct(reply, answer),
            }
        )
        if not quiet:
            print(
                f"{tokens} tokens: {seconds:.2f} s in total; {reply.splitlines()[:1]}", flush=True
            )
    report = {
        **description,
        "model": str(folder),
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": str(model.device),
        "pattern": {"name": pattern.name, **pattern.config},
        "lengths": rows,
    }
    write_json(args.json, report)
    if not quiet:
        print(f"\n{pattern.label}\n\n{_table(rows)}")


def _lengths(args: argparse.Namespace, context: int | None) -> list[int]:
    most = None if context is None else context - args.max_new_tokens
    if args.length is None:
        found = [length for length in LENGTHS if most is None or length <= most]
        if found:
            return found
        raise CommandError(f"the model's context of {context} tokens is too short for 4k")
    for length in args.length:
        if most is not None and length > most:
            raise CommandError(
                f"--length: the model's context is {context} tokens, {args.max_new_tokens} of "
                f"them for the answer; got {length}"
            )
    return list(args.length)


def _wait(torch: Any, device: Any) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _table(rows: list[dict[str, Any]]) -> str:
    return format_table(
        ["answer", "tokens", "new", "density", "total time"],
        [
            [
                "right" if row["right"] else "wrong",
                str(row["tokens"]),
                str(row["new_tokens"]),
                f"{row['density']:.2f}",
                f"{row['total_seconds']:.2f} s",
            ]
            for row in rows
        ],
    )
