"""Evaluates a model's accuracy under patterns, through lm-eval.

  flexprefill eval            computes; the same command again goes on where it was
  flexprefill eval prepare    gets the texts and files that tasks read
  flexprefill eval report     table and plots of a results folder again
  flexprefill eval tasks      lists the tasks

Suites: ruler (13 tasks), infinitebench (10 tasks), retrieval (3 tasks, no data needed), quick (the
built-in model's few minutes, checked against its table). Pattern 'default' is the model's own
attention. docs/eval.md has more.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from flex_prefill.cli.common import (
    CommandError,
    find_model,
    positive,
    read_text,
    require,
    run_description,
)
from flex_prefill.cli.models import (
    add_engine_arguments,
    check_engine,
    context_of,
    load_engine,
    named_patterns,
    token_length,
)

SUMMARY = "accuracy of a model under patterns: RULER, InfiniteBench, retrieval"
EXAMPLE = """examples:
  flexprefill eval --suite quick
  flexprefill eval prepare --suite ruler
  flexprefill eval --suite ruler --model ~/models/Llama-3.1-8B-Instruct --chat-template \\
      --pattern default flex_prefill --config '{}' '{"gamma": 0.95}' --length 4k 16k 64k \\
      --samples 50 --out results/llama"""

ACTIONS = ("run", "prepare", "report", "tasks")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from flex_prefill.eval.data import DEFAULT_FOLDER

    parser.add_argument("action", nargs="?", choices=ACTIONS, default="run")
    add_engine_arguments(parser)
    parser.add_argument("--suite", nargs="+", default=[], metavar="SUITE", help="suites")
    parser.add_argument("--task", nargs="+", default=[], metavar="TASK", help="single tasks")
    parser.add_argument("--pattern", nargs="+", default=["default", "flex_prefill"], metavar="NAME")
    parser.add_argument(
        "--config", nargs="+", default=[], metavar="JSON", help="settings, one for each pattern"
    )
    parser.add_argument(
        "--length",
        nargs="+",
        type=token_length,
        default=[4096],
        metavar="TOKENS",
        help="4096 or 4k; answers are part of it (default 4k)",
    )
    parser.add_argument(
        "--samples", type=positive, default=100, help="prompts of each task and length"
    )
    parser.add_argument(
        "--chat-template", action="store_true", help="ask by the tokenizer's chat template"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("eval_results"), metavar="FOLDER", help="results"
    )
    parser.add_argument("--data", type=Path, default=DEFAULT_FOLDER, metavar="FOLDER")
    parser.add_argument("--skip-missing", action="store_true", help="leave out tasks without data")
    group = parser.add_argument_group("prepare")
    group.add_argument(
        "--from", type=Path, dest="source", metavar="FOLDER", help="take files from here"
    )
    group.add_argument(
        "--text", type=Path, metavar="FILE", help="a text of your own for RULER's haystacks"
    )
    group.add_argument("--offline", action="store_true", help="try no download")


def run(args: argparse.Namespace) -> None:
    {"run": _run, "prepare": _prepare, "report": _report, "tasks": _tasks}[args.action](args)


def _chosen(args: argparse.Namespace) -> list[Any]:
    from flex_prefill.eval.tasks import SUITES, choose
    from flex_prefill.patch import _suggestion

    for name in args.suite:
        if name not in SUITES:
            raise CommandError(
                f"argument --suite: no suite {name!r}"
                + _suggestion(name, [*SUITES, "quick"], "suites"),
                usage=True,
            )
    return choose([*args.suite, *args.task] or ["ruler"])


def _tasks(args: argparse.Namespace) -> None:
    from flex_prefill.eval.data import DataFolder
    from flex_prefill.eval.tasks import SUITES, missing_files

    data = DataFolder(args.data)
    for suite, tasks in SUITES.items():
        print(suite)
        for task in tasks:
            missing = ", ".join(missing_files([task], data))
            print(f"  {task.name}" + (f"  (needs {missing})" if missing else ""))


def _prepare(args: argparse.Namespace) -> None:
    from flex_prefill.eval.data import SOURCES, DataFolder, how_to_get, put_text

    data = DataFolder(args.data)
    tasks = _chosen(args)
    if args.text is not None:
        put_text(data, read_text(args.text), f"local file {args.text.name}")
    needed = {name for task in tasks for name in task.files}
    unreachable: set[str] = set()
    left = []
    for name in dict.fromkeys(name for task in tasks for name in (*task.files, *task.may_read)):
        source = SOURCES[name]
        state = _get(data, source, args, unreachable)
        if not state and name in needed:
            left.append(how_to_get(source))
        elif not state:
            state = "not there; the task makes its prompts itself"
        print(f"{name:<40} {state or 'missing'}", flush=True)
    if left:
        raise CommandError("without data:\n  " + "\n  ".join(left))


def _get(data: Any, source: Any, args: argparse.Namespace, unreachable: set[str]) -> str:
    """Gets a file; says from where, or nothing where it cannot be had."""
    from flex_prefill.eval.data import (
        ESSAYS,
        LOCAL_TEXT,
        download,
        local_text,
        put_text,
        take_local,
    )
    from flex_prefill.eval.runner import progress_bar

    if data.has(source.name):
        return f"there ({data.origin(source.name)})"
    if args.source is not None and take_local(data, source, args.source):
        return f"taken from {args.source}"
    host = urlsplit(source.url).netloc
    if not args.offline and host not in unreachable:
        try:
            with progress_bar(transient=True) as bar:
                step = bar.add_task(source.name, total=None)
                download(data, source, lambda n, total: bar.update(step, advance=n, total=total))
            return "downloaded"
        except (OSError, ValueError) as error:
            unreachable.add(host)
            print(f"{host}: {error}", file=sys.stderr)
    if source is ESSAYS:
        put_text(data, local_text(), f"made here: {LOCAL_TEXT}")
        return f"made here, of {LOCAL_TEXT}"
    return ""


def _run(args: argparse.Namespace) -> None:
    from flex_prefill.eval import quick, runner
    from flex_prefill.eval.data import DataFolder
    from flex_prefill.eval.tasks import choose, missing_files

    check_engine(args.engine)
    is_quick = "quick" in args.suite
    if is_quick:
        if args.suite != ["quick"] or args.task:
            raise CommandError("argument --suite: quick stands alone", usage=True)
        names, configs = list(quick.PATTERNS), [json.dumps(c) for c in quick.PATTERNS.values()]
        tasks, samples = choose(["retrieval"]), dict(quick.SAMPLES)
    else:
        names, configs = args.pattern, args.config
        tasks, samples = _chosen(args), dict.fromkeys(args.length, args.samples)
    patterns = named_patterns(names, configs)
    folder = find_model(args.model)
    data = DataFolder(args.data)
    for module in ("lm_eval", "datasets", "rich", "matplotlib"):
        require(module, "plot" if module == "matplotlib" else "eval")
    if args.skip_missing:
        for name, without in missing_files(tasks, data).items():
            print(f"left out, {name} is missing: {', '.join(without)}", file=sys.stderr)
            tasks = [task for task in tasks if task.name not in without]
    plan = runner.Plan(
        patterns, tasks, samples, args.out, data, args.chat_template, args.skip_missing
    )
    runner.check(plan, _stated_context(folder))
    torch, model, tokenizer = load_engine(args, folder)
    description = run_description(torch, args.command_line)
    context = context_of(model)
    with torch.inference_mode():
        runner.check_patterns(plan, model)
    identity = runner.model_identity(folder, model)
    runner.claim(args.out, {**identity, "chat_template": args.chat_template})
    with torch.inference_mode(), runner.progress_bar() as bar:
        prompts = runner.make_prompts(plan, tokenizer, context, bar)
        made_by = {key: description[key] for key in ("date", "command", "commit")}
        rows = runner.run(plan, prompts, model, tokenizer, context, made_by, bar)
    used = {name: data.origin(name) for t in tasks for name in t.files}
    device = torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else "cpu"
    description["machine"]["device"] = device
    _write_results(args.out, {**description, **identity, "data": used})
    if is_quick:
        wrong = quick.deviations(rows)
        if wrong:
            raise CommandError("not what models/needle-7m/README.md says:\n  " + "\n  ".join(wrong))
        print("\nas models/needle-7m/README.md says, within chance (0.1 % on either side)")


def _stated_context(folder: Path) -> int | None:
    """The context that config.json states, before the weights are loaded."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        stated = config.get("text_config", config).get("max_position_embeddings")
    except (OSError, ValueError, AttributeError):
        return None
    return stated if isinstance(stated, int) else None


def _report(args: argparse.Namespace) -> None:
    if not (args.out / "results.json").is_file():
        raise CommandError(f"--out: expected results of 'flexprefill eval' in {args.out}")
    report = json.loads((args.out / "results.json").read_text(encoding="utf-8"))
    _write_results(args.out, {key: value for key, value in report.items() if key != "results"})


def _write_results(out: Path, description: dict[str, Any]) -> None:
    from flex_prefill.eval.data import write_atomically
    from flex_prefill.eval.report import markdown, plot, text_table
    from flex_prefill.eval.runner import all_rows

    rows = all_rows(out)
    report = {**description, "results": rows}
    write_atomically(out / "results.json", json.dumps(report, indent=1) + "\n")
    write_atomically(out / "table.md", markdown(rows))
    pictures = plot(rows, out)
    print(text_table(rows))
    written = ", ".join(p.name for p in (out / "results.json", out / "table.md", *pictures))
    print(f"\nin {out}{os.sep}: {written}")
