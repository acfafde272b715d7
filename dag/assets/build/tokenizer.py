"""Builds a CLIP tokenizer in which every word of the captions is one token; other words are split into pieces."""

import json
import re
from collections import Counter
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTokenizer

MAX_TOKENS = 24
_END = "</w>"
_START_TOKEN, _STOP_TOKEN = "<|startoftext|>", "<|endoftext|>"


def _merges(words: Iterable[str]) -> list[tuple[str, str]]:
    """Byte-pair merges, most frequent pair first, until every word is one piece."""
    pieces = {word: [*word[:-1], word[-1] + _END] for word in sorted(words)}
    merges: list[tuple[str, str]] = []
    while True:
        pairs = Counter(pair for parts in pieces.values() for pair in pairwise(parts))
        if not pairs:
            return merges
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        merges.append(best)
        pieces = {word: _merge(parts, best) for word, parts in pieces.items()}


def _merge(parts: list[str], pair: tuple[str, str]) -> list[str]:
    """The pieces of a word after one merge of byte pairs."""
    merged: list[str] = []
    for part in parts:
        if merged and (merged[-1], part) == pair:
            merged[-1] += part
        else:
            merged.append(part)
    return merged


def build(captions: Iterable[str], folder: Path) -> CLIPTokenizer:
    """Write the tokenizer of these captions to `folder`, in the old (vocab, merges) and the new format."""
    words = {word for caption in captions for word in re.findall(r"[a-z]+", caption.lower())}
    merges = _merges(words)
    alphabet = sorted(ByteLevel.alphabet())
    tokens = [*alphabet, *(letter + _END for letter in alphabet), *("".join(pair) for pair in merges)]
    tokens = [*dict.fromkeys(tokens), _START_TOKEN, _STOP_TOKEN]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=MAX_TOKENS)
    tokenizer.save_pretrained(folder)
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return CLIPTokenizer.from_pretrained(folder)
