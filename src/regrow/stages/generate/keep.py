"""Which answers are kept: filters, duplicates, and a choice of rows that differ.

Shapes: N rows, D features.
"""

from __future__ import annotations

import re
import zlib
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from regrow.runtime.rows import Row
from regrow.stages.generate import GenerateConfig
from regrow.stages.generate.language import is_other

FEATURES = 512
"""The number of hashed features of a text."""
WORD = re.compile(r"\w+|[^\w\s]")
GRAM = 3
"""Words in a row that count as a repetition when they occur again."""


def fault(row: Row, config: GenerateConfig, perplexity: float | None) -> str | None:
    """Why an answer is left out; None if it is kept."""
    if row.get("error"):
        return "refused by the endpoint"
    if not row["answer"].strip():
        return "empty"
    if not row["finished"] and not config.keep_unfinished:
        return "unfinished"
    if row["tokens"] < config.min_new_tokens:
        return "too short"
    if config.max_repetition is not None and repetition(row["answer"]) > config.max_repetition:
        return "repeats itself"
    if is_other(row["answer"], config.languages):
        return "in another language"
    limit = config.max_perplexity
    if limit is not None and perplexity is not None and not perplexity <= limit:
        return "too unlikely"
    return None


def repetition(text: str) -> float:
    """The share of the runs of three words that occurred in the text before; 0 for short texts."""
    words = text.split()
    runs = [tuple(words[at : at + GRAM]) for at in range(len(words) - GRAM + 1)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


def plain(text: str) -> str:
    """The text as duplicates are compared: without case, and with single spaces."""
    return " ".join(text.casefold().split())


def diverse(texts: Sequence[str], count: int) -> list[int]:
    """The numbers, in order, of `count` texts that differ from each other.

    The first text is the one nearest to the mean. Then comes, each time, the text whose nearest
    chosen one is furthest (k-center; Gonzalez, 1985, doi:10.1016/0304-3975(85)90224-5). Texts are
    compared by the cosine of their words and pairs of words, weighted by rarity.
    """
    if count >= len(texts):
        return list(range(len(texts)))
    vectors_ND = _vectors(texts)
    chosen = [int((vectors_ND @ vectors_ND.mean(0)).argmax())]
    nearest_N = vectors_ND @ vectors_ND[chosen[0]]
    while len(chosen) < count:
        nearest_N[chosen[-1]] = np.inf
        chosen.append(int(nearest_N.argmin()))
        nearest_N = np.maximum(nearest_N, vectors_ND @ vectors_ND[chosen[-1]])
    return sorted(chosen)


def _vectors(texts: Sequence[str]) -> NDArray[np.float32]:
    """Unit vectors [N, D] of hashed words and pairs, with weights log(N ÷ rows that have it)."""
    counted = [Counter(_terms(text)) for text in texts]
    rows_with = Counter(term for terms in counted for term in terms)
    vectors_ND = np.zeros((len(texts), FEATURES), dtype=np.float32)
    for number, terms in enumerate(counted):
        for term, times in terms.items():
            code = zlib.crc32(term.encode())
            sign = 1 if code & 1 else -1
            weight = np.log(len(texts) / rows_with[term]) * np.sqrt(times)
            vectors_ND[number, (code >> 1) % FEATURES] += sign * weight
    norms_N1 = np.linalg.norm(vectors_ND, axis=1, keepdims=True)
    return vectors_ND / np.maximum(norms_N1, 1e-9)


def _terms(text: str) -> list[str]:
    words = WORD.findall(text.casefold())
    return words + [f"{a} {b}" for a, b in pairwise(words)]
