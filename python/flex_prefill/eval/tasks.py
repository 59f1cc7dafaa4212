"""The tasks by name and suite: how their samples are made and scored."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from flex_prefill import retrieval
from flex_prefill.cli.common import CommandError
from flex_prefill.eval import infinitebench, ruler
from flex_prefill.eval.data import DataFolder
from flex_prefill.patch import _suggestion as nearest

Sample = dict[str, Any]
# tokenizer, length, count, room, data -> samples
MakeSamples = Callable[[Any, int, int, int, DataFolder], list[Sample]]


@dataclass(frozen=True)
class Task:
    """One task.

    max_new_tokens: of an answer, part of the length.
    make: samples with `input`, `outputs` and perhaps `gen_prefix`, how the answer begins.
    score: a sample and a reply -> [0, 1].
    until: where a reply ends before `max_new_tokens`.
    files: of the data folder, which `make` cannot do without.
    may_read: files that are read instead of making the samples here.
    """

    name: str
    suite: str
    max_new_tokens: int
    make: MakeSamples
    score: Callable[[Sample, str], float]
    until: tuple[str, ...] = ()
    files: tuple[str, ...] = ()
    may_read: tuple[str, ...] = ()
    delimiter: str = " "
    least_tokens: int = 512


def _retrieval_samples(
    kind: str, tokenizer: Any, length: int, count: int, room: int, data: DataFolder
) -> list[Sample]:
    def tokens(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False)["input_ids"])

    prompts = (retrieval.make_prompt(kind, length - room, seed, tokens) for seed in range(count))
    return [{"input": prompt, "outputs": [answer]} for prompt, answer in prompts]


def _ruler_task(name: str) -> Task:
    max_new_tokens, delimiter, files = ruler.TASKS[name]
    return Task(
        name,
        "ruler",
        max_new_tokens,
        partial(ruler.make_samples, name),
        lambda sample, reply: ruler.score(name, sample["outputs"], reply),
        files=files,
        delimiter=delimiter,
        least_tokens=ruler.LEAST_TOKENS,
    )


def _infinitebench_task(split: str) -> Task:
    synthetic = split in infinitebench.SYNTHETIC
    return Task(
        f"infinitebench_{split}",
        "infinitebench",
        infinitebench.TASKS[split][0],
        partial(infinitebench.make_samples, split),
        lambda sample, reply: infinitebench.score(
            split, sample["outputs"], sample["options"], reply
        ),
        files=() if synthetic else (infinitebench.file_of(split),),
        may_read=(infinitebench.file_of(split),) if synthetic else (),
        least_tokens=infinitebench.TASKS[split][0] + 1024,
    )


def _retrieval_task(kind: str) -> Task:
    return Task(
        f"retrieval_{kind}",
        "retrieval",
        8,
        partial(_retrieval_samples, kind),
        lambda sample, reply: float(retrieval.is_correct(reply, sample["outputs"][0])),
        until=("\n",),
    )


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        *map(_retrieval_task, retrieval.KINDS),
        *map(_ruler_task, ruler.TASKS),
        *map(_infinitebench_task, infinitebench.TASKS),
    )
}
SUITES: dict[str, list[Task]] = {
    suite: [task for task in TASKS.values() if task.suite == suite]
    for suite in ("retrieval", "ruler", "infinitebench")
}


def choose(names: Sequence[str]) -> list[Task]:
    """The tasks of these names, a suite's standing for all of its own; each once."""
    chosen: dict[str, Task] = {}
    for name in names:
        if name in SUITES:
            chosen.update({task.name: task for task in SUITES[name]})
        elif name in TASKS:
            chosen[name] = TASKS[name]
        else:
            raise CommandError(
                f"argument --task: no task or suite {name!r}"
                + nearest(name, [*SUITES, *TASKS], "tasks"),
                usage=True,
            )
    return list(chosen.values())


def missing_files(tasks: Iterable[Task], data: DataFolder) -> dict[str, list[str]]:
    """The files that are not there, each with the tasks that need it."""
    missing: dict[str, list[str]] = {}
    for task in tasks:
        for name in task.files:
            if not data.has(name):
                missing.setdefault(name, []).append(task.name)
    return missing
