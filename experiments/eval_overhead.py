"""What `flexprefill eval` takes beyond plain lm-eval: the same model, task and prompts, in turn.

    python experiments/eval_overhead.py --length 8192 --samples 20

Plain is lm-eval's own HFLM with the model's own attention; ours the same under pattern `default`,
with the journal on the disk and the audit. The ratio of the medians is printed, and with --pattern
that of a pattern too (which includes what the pattern saves).
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from flex_prefill.cli.common import find_model, require
from flex_prefill.cli.models import add_engine_arguments, context_of, load_engine
from flex_prefill.eval import lm
from flex_prefill.eval.data import DEFAULT_FOLDER, DataFolder
from flex_prefill.eval.tasks import TASKS
from flex_prefill.patch import patch_model, unpatch_model


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_engine_arguments(parser)
    parser.add_argument("--task", choices=list(TASKS), default="retrieval_single")
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--samples", type=int, default=20)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--pattern", help="time this pattern too")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch, model, tokenizer = load_engine(args, find_model(args.model))
    context = context_of(model) or args.length + 4096
    task = TASKS[args.task]
    room = task.max_new_tokens
    samples = task.make(tokenizer, args.length, args.samples, room, DataFolder(DEFAULT_FOLDER))
    manager = require("lm_eval.tasks", "eval").TaskManager(include_defaults=False)
    plain = require("lm_eval.models.huggingface", "eval").HFLM(
        pretrained=model, tokenizer=tokenizer, backend="causal", max_length=context, batch_size=1
    )
    audited = lm.make_lm(model, tokenizer, context)
    audited.on_reply = lambda record: None
    names = ["plain", "default", *([args.pattern] if args.pattern else [])]
    seconds: dict[str, list[float]] = {name: [] for name in names}

    def run(name: str, folder: str) -> None:
        engine: Any = plain
        if name != "plain":
            engine = audited
            patch_model(model, name)
            engine.journal = lm.Journal(Path(folder) / f"{len(seconds[name])}-{name}.jsonl")
            engine.must_be_sparse = name != "default"
        start = time.perf_counter()
        with contextlib.redirect_stdout(io.StringIO()):
            lm.evaluate(engine, lm.make_task(task, samples), manager, chat_template=False)
        seconds[name].append(time.perf_counter() - start)
        unpatch_model(model)

    with torch.inference_mode(), tempfile.TemporaryDirectory() as folder:
        run("plain", folder)  # loads kernels
        seconds["plain"].clear()
        for _ in range(args.repeat):
            for name in names:
                run(name, folder)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    over = {name: median[name] / median["plain"] - 1 for name in names[1:]}
    for name in names[1:]:
        print(f"{name}: {over[name]:+.1%} of plain lm-eval's {median['plain']:.2f} s")
    if args.json is not None:
        report = {"seconds": seconds, "over_plain": over, "length": args.length}
        report |= {"samples": args.samples, "task": args.task, "device": str(model.device)}
        args.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
