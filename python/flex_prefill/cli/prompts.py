"""The prompt that demo and inspect put to a model: one that hides an answer, or the user's own."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flex_prefill import retrieval
from flex_prefill.cli.common import CommandError, positive, read_text

DEFAULT_TOKENS = 16384


@dataclass(frozen=True)
class Prompt:
    """token_ids: ``[n]``; answer: what is expected, if that is known; answer_depth: where in the
    prompt it stands, in tokens, if it was hidden there."""

    token_ids: list[int]
    question: str
    answer: str | None = None
    answer_depth: int | None = None

    def is_right(self, reply: str) -> bool | None:
        """None where no answer is known."""
        if self.answer is None:
            return None
        if self.answer_depth is not None:
            return retrieval.is_correct(reply, self.answer)
        return self.answer.casefold() in reply.casefold()


def add_prompt_arguments(parser: argparse.ArgumentParser, tokens: int | None = None) -> None:
    """tokens: of every prompt unless said; without it a document of the user is read whole."""
    group = parser.add_argument_group("prompt")
    group.add_argument(
        "--tokens",
        type=positive,
        default=tokens,
        help=f"length of the prompt (default {tokens or DEFAULT_TOKENS}"
        + ("" if tokens else ", or all of your own document")
        + "); your own document is cut to it",
    )
    group.add_argument(
        "--kind",
        choices=retrieval.KINDS,
        default="single",
        help="one statement hidden in a document, one of many, or a list of nothing else "
        "(default %(default)s)",
    )
    group.add_argument("--seed", type=int, default=0, help="another seed, another document")
    group.add_argument("--prompt-file", type=Path, metavar="FILE", help="a document of your own")
    group.add_argument("--question", help="asked after that document; without one it is continued")


def check_prompt_arguments(args: argparse.Namespace) -> None:
    """Refuses what needs a document of the user's own where none is given."""
    for name in ("question", "expect"):
        if getattr(args, name, None) is not None and args.prompt_file is None:
            raise CommandError(f"argument --{name}: needs --prompt-file", usage=True)


def make_prompt(args: argparse.Namespace, tokenizer: Any) -> Prompt:
    """What the arguments ask for."""
    if args.prompt_file is not None:
        return _own_prompt(args, tokenizer)

    def count(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False)["input_ids"])

    try:
        text, answer = retrieval.make_prompt(
            args.kind, args.tokens or DEFAULT_TOKENS, args.seed, count
        )
    except ValueError as error:
        raise CommandError(str(error), usage=True) from None
    question = text[text.rindex("Question: ") + len("Question: ") :].partition("?")[0] + "?"
    depth = count(text[: text.index(answer)])
    return Prompt(tokenizer(text)["input_ids"], question, answer, depth)


def _own_prompt(args: argparse.Namespace, tokenizer: Any) -> Prompt:
    document = read_text(args.prompt_file).strip()
    if not document:
        raise CommandError(f"--prompt-file: {args.prompt_file} is empty")
    token_ids = _encode(tokenizer, document, args.question)
    if args.tokens is not None and len(token_ids) > args.tokens:
        ids = tokenizer(document, add_special_tokens=False)["input_ids"]
        left = len(ids) - (len(token_ids) - args.tokens)
        if left < 1:
            raise CommandError(
                f"argument --tokens: the question alone has {len(token_ids) - len(ids)}",
                usage=True,
            )
        token_ids = _encode(tokenizer, tokenizer.decode(ids[:left]), args.question)
    question = args.question or "(none: the document is continued)"
    return Prompt(token_ids, question, getattr(args, "expect", None))


def _encode(tokenizer: Any, document: str, question: str | None) -> list[int]:
    if question is None:
        ids: list[int] = tokenizer(document)["input_ids"]
    elif tokenizer.chat_template:
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": f"{document}\n\n{question}"}],
            add_generation_prompt=True,
            return_dict=True,
        )["input_ids"]
    else:
        ids = tokenizer(f"{document}\n\nQuestion: {question}\nAnswer:")["input_ids"]
    return ids
