"""Prompts of flex_prefill.retrieval: deterministic, of the asked length, with one answer."""

from __future__ import annotations

import random

import pytest
from flex_prefill import retrieval


def count(text: str) -> int:
    """A stand-in for a tokenizer."""
    return len(text) // 3 + 1


@pytest.mark.parametrize("kind", retrieval.KINDS)
def test_answer_stands_in_the_prompt_once(kind: str) -> None:
    prompt, answer = retrieval.make_prompt(kind, 4096, 0, count)
    document, _, question = prompt.rpartition("Question: ")
    name = question.split("access code of ")[1].split("?")[0]
    lines = [line for line in document.splitlines() if name in line]
    assert len(lines) == 1
    assert answer in lines[0]
    assert answer not in question
    assert len(answer) == 6
    assert 3600 < len(prompt) / 3 <= 4096


@pytest.mark.parametrize("kind", retrieval.KINDS)
def test_same_seed_same_prompt(kind: str) -> None:
    first, again, other = (retrieval.make_prompt(kind, 2048, seed, count) for seed in (7, 7, 8))
    assert first == again
    assert first != other


def test_names_do_not_cross_the_split() -> None:
    training = set(retrieval.random_names(random.Random(0), 2000, held_out=False))
    held_out = set(retrieval.random_names(random.Random(0), 2000, held_out=True))
    assert len(training) == len(held_out) == 2000
    assert not training & held_out


@pytest.mark.parametrize(
    ("reply", "right"),
    [("123456.\n", True), (" 123456", True), ("1234567", False), ("12345", False), ("", False)],
)
def test_is_correct(reply: str, right: bool) -> None:
    assert retrieval.is_correct(reply, "123456") is right


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="kind: expected one of single"):
        retrieval.make_prompt("double", 4096, 0, count)
    with pytest.raises(ValueError, match="n_tokens: expected at least"):
        retrieval.make_prompt("single", 64, 0, count)
