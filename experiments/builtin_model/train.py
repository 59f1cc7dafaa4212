"""Train the built-in model on one GPU.

    python experiments/builtin_model/train.py --out models/needle-7m

Training is planned in seconds of an H200, not in steps: short sequences first (with gaps in their
positions, see tasks.py), long ones last, and a second stage where every other step prefills under
FlexPrefill's selection (see "exam" in tasks.py). With `--time 4` it takes four times as long, for
slower cards. It writes a loadable model folder every minute, so it can be stopped at any time.
Training tokens are prepared first if they are missing.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import sparse
import torch
import torch.nn.functional as F
from model import Llama, export, restore
from optimizer import Muon
from tasks import ANSWER, TEXT, TaskMaker
from torch.utils.data import DataLoader, IterableDataset

HERE = Path(__file__).resolve().parent
GAMMAS = (0.8, 0.9, 0.95)  # of the sparse steps
BUDGETS = (256, 512, 1024)
TAIL = 1024  # tokens after the prompt of an exam


@dataclass(frozen=True)
class Phase:
    """A part of the training: its share of the time and the length of its sequences."""

    share: float
    length: int
    sparse: bool = False  # every other step under FlexPrefill's selection


@dataclass(frozen=True)
class Stage:
    """A run of the optimizer with a learning rate schedule of its own."""

    seconds: float
    scale: float  # on both learning rates
    decay: float  # share of the time in which they fall to 2 %
    seed: int
    phases: list[Phase]


DENSE = Stage(
    seconds=265,
    scale=1.0,
    decay=0.25,
    seed=1,
    phases=[
        Phase(0.36, 1024),
        Phase(0.07, 2048),
        Phase(0.10, 4096),
        Phase(0.14, 8192),
        Phase(0.20, 16_384),
        Phase(0.13, 20_480),
    ],
)
SPARSE = Stage(
    seconds=170,
    scale=0.5,
    decay=0.8,
    seed=2,
    phases=[
        Phase(0.32, 4096, sparse=True),
        Phase(0.18, 8192, sparse=True),
        Phase(0.50, 16_384, sparse=True),
    ],
)
STAGES = {"dense": [DENSE], "sparse": [SPARSE], "both": [DENSE, SPARSE]}


class Batches(IterableDataset):
    """Endless batches; every worker has its own seed."""

    def __init__(self, maker: TaskMaker, count: int, phase: Phase, seed: int) -> None:
        self.maker, self.count, self.phase, self.seed = maker, count, phase, seed

    def __iter__(self) -> Iterator[torch.Tensor]:
        info = torch.utils.data.get_worker_info()
        length = self.phase.length
        rng = random.Random(f"{self.seed}/{self.phase}/{info.id if info else 0}")
        while True:
            yield torch.from_numpy(self.maker.batch(rng, self.count, length))
            if self.phase.sparse:
                prompt = length - TAIL
                yield torch.from_numpy(self.maker.batch(rng, self.count, length, prompt))


def dense(layer: int, q, k, v):
    """Causal attention of q [b, s, h_q, d] over k, v [b, s, h_kv, d]."""
    group = q.shape[2] // k.shape[2]
    k, v = (t.repeat_interleave(group, 2) for t in (k, v))
    out = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)), is_causal=True)
    return out.transpose(1, 2)


class SparsePrefill:
    """Attention of an exam: the prompt under FlexPrefill's selection, what follows it dense."""

    def __init__(self, pattern: sparse.FlexPrefill, prompts: torch.Tensor, longest: int) -> None:
        self.pattern, self.prompts, self.longest = pattern, prompts, longest

    def __call__(self, layer: int, q, k, v):
        end, block = self.longest, self.pattern.block
        q_prompt, k_prompt = q[:, :end].detach(), k[:, :end].detach()
        selection = sparse.select(q_prompt, k_prompt, self.prompts, self.pattern)
        rest = (q.shape[1] - end) // block
        kept = F.pad(selection.kept, (0, rest, 0, rest))
        return sparse.attend(q, k, v, kept, block, dense_from=self.prompts)


def losses(hidden, embedding, targets, classes):
    """Mean cross-entropy of text and of answers, and the share of right answer tokens."""
    logits = F.linear(hidden, embedding.to(hidden.dtype)).float()
    loss = F.cross_entropy(logits, targets, reduction="none")
    text, answer = (classes == TEXT).float(), (classes == ANSWER).float()
    answers = answer.sum().clamp(min=1)
    right = ((logits.argmax(-1) == targets) * answer).sum() / answers
    return (loss * text).sum() / text.sum().clamp(min=1), (loss * answer).sum() / answers, right


def summary(name: str, values: list[torch.Tensor]) -> str:
    """Mean losses of the steps since the last line."""
    if not values:
        return ""
    text, answer, right = torch.stack(values).mean(0).tolist()
    return f" {name}: text {text:.3f} answer {answer:.4f} right {right:.4f}"


def schedule(progress: float, decay: float, warmup: float = 0.02) -> float:
    """Share of the full learning rate: linear up, flat, linear down to 2 %."""
    if progress < warmup:
        return progress / warmup
    return min(1.0, max(0.02, (1 - progress) / decay))


def train(stage: Stage, init: Path | None, options: argparse.Namespace) -> None:
    """Run the phases of a stage, from the weights in folder `init` if given; writes the model."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(stage.seed)
    model = Llama().to(device)
    if init:
        restore(model, init)
    loss_function = losses
    matrices = [p for p in model.parameters() if p.ndim == 2 and len(p) != model.config.vocab]
    others = [p for p in model.parameters() if p.ndim == 1 or len(p) == model.config.vocab]
    muon = Muon(matrices)
    adam = torch.optim.AdamW(others, lr=options.lr, betas=(0.9, 0.95), weight_decay=0.0)
    if device.type == "cuda":
        model.compile()
        loss_function = torch.compile(losses, dynamic=False)
        muon.direction = torch.compile(muon.direction, dynamic=False)
    maker = TaskMaker(options.data, options.tokenizer)

    choice = random.Random(stage.seed)
    start = saved = time.monotonic()
    step, seen, phase_end = 0, 0, 0.0
    for phase in stage.phases:
        phase_end += phase.share
        count = max(1, options.tokens // phase.length)
        batches = Batches(maker, count, phase, stage.seed)
        workers = options.workers
        loader = DataLoader(
            batches,
            batch_size=None,
            num_workers=workers,
            prefetch_factor=4 if workers else None,
            pin_memory=device.type == "cuda",
        )
        logged, log_time, first = ([], []), time.monotonic(), seen
        for batch in loader:
            progress = (time.monotonic() - start) / (stage.seconds * options.time)
            if progress >= min(phase_end, 1.0):
                break
            rate = schedule(progress, stage.decay) * stage.scale
            exam = bool(batch[3, 0, 0])
            tokens, classes, positions, prompts = batch.to(device, non_blocking=True).long()
            attend = dense
            if exam:
                gamma, budget = choice.choice(GAMMAS), choice.choice(BUDGETS)
                pattern = sparse.FlexPrefill(gamma, 0.1, budget)
                attend = SparsePrefill(pattern, prompts[:, 0], phase.length - TAIL)
            hidden = model(tokens[:, :-1], positions[:, :-1], attend)
            targets = (t[:, 1:].reshape(-1) for t in (tokens, classes))
            text, answer, right = loss_function(hidden, model.weight("embed_tokens"), *targets)
            (options.text_weight * text + answer).backward()
            muon.step(options.muon_lr * rate)
            for group in adam.param_groups:
                group["lr"] = options.lr * rate
            adam.step()
            model.zero_grad(set_to_none=True)
            step, seen = step + 1, seen + count * phase.length
            logged[exam].append(torch.stack([text, answer, right]).detach())
            now = time.monotonic()
            if now - log_time > options.log_seconds:
                speed = (seen - first) / (time.monotonic() - log_time) / 1e6
                print(
                    f"{now - start:6.1f} s  step {step:5d}  {seen / 1e6:7.1f} M tokens"
                    f"  length {phase.length:5d}  {speed:.2f} M/s",
                    *map(summary, ("dense", "sparse"), logged),
                    flush=True,
                )
                logged, log_time, first = ([], []), time.monotonic(), seen
            if now - saved > 60:
                export(model, options.out)
                saved = now
        del loader
    export(model, options.out)
    print(f"{time.monotonic() - start:.1f} s, {step} steps, {seen / 1e6:.1f} M tokens", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="model folder to write")
    parser.add_argument("--data", type=Path, default=HERE / "data", help="training tokens")
    parser.add_argument("--stage", choices=STAGES, default="both", help="what to run")
    parser.add_argument("--init", type=Path, help="model folder to start from")
    parser.add_argument("--time", type=float, default=1.0, help="on the stages' seconds")
    parser.add_argument("--tokens", type=int, default=81_920, help="tokens of a step")
    parser.add_argument("--lr", type=float, default=3e-3, help="AdamW's, for embedding and norms")
    parser.add_argument("--muon-lr", type=float, default=5e-3, help="Muon's, for the matrices")
    parser.add_argument("--text-weight", type=float, default=0.3, help="of text in the loss")
    parser.add_argument("--workers", type=int, default=max(0, (os.cpu_count() or 1) - 2))
    parser.add_argument("--log-seconds", type=float, default=10)
    options = parser.parse_args()
    options.tokenizer = options.out / "tokenizer.json"
    shipped = HERE.parents[1] / "models" / "needle-7m"
    options.out.mkdir(parents=True, exist_ok=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if (shipped / name).exists() and shipped.resolve() != options.out.resolve():
            shutil.copy(shipped / name, options.out / name)
    if not (options.data / "tokens.bin").exists() or not options.tokenizer.exists():
        command = [sys.executable, HERE / "prepare.py", "--model", options.out]
        command += ["--data", options.data]
        subprocess.run(command, check=True)
    init = options.init
    for stage in STAGES[options.stage]:
        train(stage, init, options)
        init = options.out


if __name__ == "__main__":
    main()
