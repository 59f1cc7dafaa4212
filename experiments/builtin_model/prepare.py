"""Train the tokenizer and turn Python's library into training tokens.

    python experiments/builtin_model/prepare.py --model models/needle-7m

The tokenizer is a byte-level BPE with Qwen2's pre-tokenizer, which llama.cpp knows; it makes every
digit a token of its own, so that a number is copied digit by digit, and the words of the names in
retrieval prompts whole tokens. Text of held-out files is not looked at.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

import numpy as np
from common import retrieval
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

VOCAB_SIZE = 4096
BOS, EOS = "<|begin_of_text|>", "<|end_of_text|>"
MAX_LENGTH = 20480
QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def training_texts() -> list[list[str]]:
    """Paragraphs of all library files that are not held out, tests and tools included."""
    files = retrieval.library_files(skipped=set())
    seen = (text for label, text in files if not retrieval.is_held_out(label))
    texts = map(retrieval.paragraphs_of, seen)
    return [paragraphs for paragraphs in texts if len(paragraphs) > 3]


def train_tokenizer(texts: list[list[str]]) -> Tokenizer:
    """Train the BPE on the library and on lines that hold every word of the names."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    rng = random.Random(0)
    names = [n for held_out in (True, False) for n in retrieval.all_names(held_out)]
    lines = [retrieval.QUESTION.format(name=name) for name in rng.sample(names, 20_000)]
    library = (paragraph for paragraphs in texts for paragraph in paragraphs)
    tokenizer.train_from_iterator((text for source in (library, lines) for text in source), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write tokenizer.json and the configuration that transformers and llama.cpp read."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": EOS,
        "add_bos_token": True,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": MAX_LENGTH,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def write_tokens(tokenizer: Tokenizer, texts: list[list[str]], folder: Path) -> int:
    """Write tokens.bin (uint16) and the start of every paragraph (uint32, with the end)."""
    folder.mkdir(parents=True, exist_ok=True)
    paragraphs = [paragraph for text in texts for paragraph in text]
    encoded = tokenizer.encode_batch(paragraphs, add_special_tokens=False)
    lengths = [len(encoding.ids) for encoding in encoded]
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.uint32)
    tokens = np.concatenate([np.array(encoding.ids, np.uint16) for encoding in encoded])
    starts.tofile(folder / "paragraphs.bin")
    tokens.tofile(folder / "tokens.bin")
    return len(tokens)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, default=Path("models/needle-7m"), help="model folder")
    parser.add_argument("--data", type=Path, default=Path(__file__).parent / "data")
    options = parser.parse_args()
    texts = training_texts()
    path = options.model / "tokenizer.json"
    if path.exists():
        tokenizer = Tokenizer.from_file(str(path))
    else:
        tokenizer = train_tokenizer(texts)
        save_tokenizer(tokenizer, options.model)
    count = write_tokens(tokenizer, texts, options.data)
    print(f"{options.data}: {count / 1e6:.2f} M tokens of {len(texts)} files")


if __name__ == "__main__":
    main()
