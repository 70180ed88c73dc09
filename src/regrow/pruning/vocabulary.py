"""Choose the tokens to keep: those whose removal would lengthen the text most.

When a token is dropped, the tokenizer splits its string into other tokens, its parts. Tokens are
dropped one by one. Each step drops the token with the lowest

    cost = count · (parts − 1 + bytes)

and adds its count to the counts of its parts, which raises their cost. In a BPE vocabulary the
parts are the two sides of the token's merge. A BPE token is kept as long as a kept token is merged
from it, so that the kept merges can build every kept token. In a Unigram vocabulary the parts are
the most likely segmentation into kept pieces. parts − 1 is the number of tokens by which the text
grows, and bytes is the number of parts that are byte tokens: a digit that is written as its byte
is as short, but the model has hardly ever read that byte. Costs only grow while tokens are dropped,
so a heap can be updated lazily (as in Minoux, 1978). Among equal costs the higher id is dropped
first, because ids follow the order of training.

Special tokens, added tokens, ids in a config, byte tokens, ASCII characters and the symbol for a
space are never dropped. Other single symbols are dropped only if all byte tokens exist as a
fallback.
"""

from __future__ import annotations

import heapq
import json
import math
from collections.abc import Iterable
from typing import Protocol

from torch import Tensor

from regrow.checkpoint import Checkpoint
from regrow.errors import UserError
from regrow.pruning.tokenizer import Rules, ids_named, merge_of, product, read_rules, tokens_of

BYTES = frozenset(f"<0x{value:02X}>" for value in range(256))
UNKNOWN_PENALTY = 10.0  # log-probability below the worst piece, as in sentencepiece


class Pieces(Protocol):
    """A type of vocabulary, which defines how its tokens depend on each other."""

    def symbols(self) -> set[str]:
        """Tokens that are needed to write any text."""
        ...

    def parts(self, token: str, kept: set[str]) -> list[str]:
        """The kept tokens that replace the token when it is dropped."""
        ...

    def made_of(self, token: str) -> Iterable[str]:
        """The tokens that this token is merged from; they may be dropped after it."""
        ...

    def needed(self, token: str, kept: set[str]) -> bool:
        """Whether a kept token can only be built from this token."""
        ...


def choose_vocab(checkpoint: Checkpoint, counts_V: Tensor, size: int) -> list[int]:
    """Ids of the `size` tokens to keep, ascending; `counts_V` has each token's count in the text.

    Ids without a token (padding of the embedding) are dropped first. Raises UserError when more
    than `size` must be kept, or for a tokenizer that cannot be cut.
    """
    rules = read_rules(checkpoint)
    total = len(counts_V)
    ids = {token: i for token, i in tokens_of(rules).items() if i < total}
    always = required(checkpoint, rules)
    padding = sorted(set(range(total)) - set(ids.values()), key=lambda i: (i not in always, i))
    forced = sum(i in always for i in padding)
    room = size - len(ids)
    if room >= forced:
        return sorted([*ids.values(), *padding[:room]])
    left = shrink(pieces_of(rules), ids, always, counts_V.tolist(), size - forced)
    minimum = len(left) + forced
    if minimum > size:
        raise UserError(
            f"vocab_size {size}: {minimum} tokens of this model are always kept (special tokens, "
            f"ids named in its configs, the base alphabet); give {minimum} or more"
        )
    return sorted([*(ids[token] for token in left), *padding[:forced]])


def check_vocab_size(checkpoint: Checkpoint, size: int) -> None:
    """Raise UserError when `size` tokens are too few, or the tokenizer cannot be cut."""
    import torch

    choose_vocab(checkpoint, torch.zeros(int(checkpoint.config["vocab_size"])), size)


def required(checkpoint: Checkpoint, rules: Rules) -> set[int]:
    """Ids that are always kept."""
    tokens = tokens_of(rules)
    ids = {token["id"] for token in rules.get("added_tokens") or []}
    ids.update(checkpoint.tokenizer().all_special_ids)
    ids.update(tokens[symbol] for symbol in pieces_of(rules).symbols())
    unknown = rules["model"].get("unk_token")
    if unknown in tokens:
        ids.add(tokens[unknown])
    path = checkpoint.folder / "generation_config.json"
    generation = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    ids |= ids_named(checkpoint.config) | ids_named(generation)
    return {i for i in ids if 0 <= i < int(checkpoint.config["vocab_size"])}


def pieces_of(rules: Rules) -> Pieces:
    """The `Pieces` of a BPE or Unigram vocabulary."""
    return _Unigram(rules) if rules["model"].get("type") == "Unigram" else _Bpe(rules)


def shrink(
    pieces: Pieces, ids: dict[str, int], always: set[int], counts: list[float], size: int
) -> set[str]:
    """The `size` kept tokens, or more if more than that must be kept."""
    kept = set(ids)
    count = {token: float(counts[i]) for token, i in ids.items()}
    heap: list[tuple[float, int, str]] = []

    def push(token: str) -> None:
        if token in kept and ids[token] not in always:
            cost = count[token] * cost_of(pieces.parts(token, kept))
            heapq.heappush(heap, (cost, -ids[token], token))

    for token in ids:
        push(token)
    while len(kept) > size and heap:
        queued_cost, _, token = heapq.heappop(heap)
        if token not in kept or pieces.needed(token, kept):
            continue
        parts = pieces.parts(token, kept)
        if count[token] * cost_of(parts) > queued_cost:
            push(token)
            continue
        kept.remove(token)
        for part in parts:
            if part in count:
                count[part] += count[token]
        for part in pieces.made_of(token):
            push(part)
    return kept


def cost_of(parts: list[str]) -> int:
    """What one occurrence of a token costs that these parts replace: parts − 1 + bytes."""
    return len(parts) - 1 + sum(part in BYTES for part in parts)


class _Bpe:
    def __init__(self, rules: Rules) -> None:
        model = rules["model"]
        self.vocab: dict[str, int] = model["vocab"]
        self.added = {token["content"] for token in rules.get("added_tokens") or []}
        self.all_bytes = _all_bytes(model, self.vocab)
        self.spaces = stand_ins(rules) & set(self.vocab)
        prefix = model.get("continuing_subword_prefix") or ""
        suffix = model.get("end_of_word_suffix") or ""
        self._bare = lambda token: token.removeprefix(prefix).removesuffix(suffix) or token
        self.makers: dict[str, list[tuple[str, str]]] = {}
        self.uses: dict[str, list[str]] = {}
        for entry in model["merges"]:
            left, right = merge_of(entry)
            merged = product(model, left, right)
            if merged in self.vocab and left in self.vocab and right in self.vocab:
                self.makers.setdefault(merged, []).append((left, right))
                for part in {left, right}:
                    self.uses.setdefault(part, []).append(merged)

    def symbols(self) -> set[str]:
        if self.all_bytes:
            return {*BYTES, *self.spaces, *_ascii(self.vocab)}
        return {t for t in self.vocab if t not in self.makers and len(self._bare(t)) == 1}

    def parts(self, token: str, kept: set[str]) -> list[str]:
        for merge in self.makers.get(token, ()):
            if merge[0] in kept and merge[1] in kept:
                return list(merge)
        if len(token) == 1:
            return _bytes_of(token)
        return [p for c in token for p in ([c] if c in kept else _bytes_of(c))]

    def made_of(self, token: str) -> set[str]:
        return {part for merge in self.makers.get(token, ()) for part in merge}

    def needed(self, token: str, kept: set[str]) -> bool:
        for merged in self.uses.get(token, ()):
            if merged in kept and merged not in self.added:
                merges = [m for m in self.makers[merged] if m[0] in kept and m[1] in kept]
                if merges and all(token in merge for merge in merges):
                    return True
        return False


class _Unigram:
    def __init__(self, rules: Rules) -> None:
        self.scores: dict[str, float] = dict(rules["model"]["vocab"])
        self.all_bytes = _all_bytes(rules["model"], self.scores)
        self.spaces = stand_ins(rules) & set(self.scores)
        self.unknown = min(self.scores.values()) - UNKNOWN_PENALTY
        unk = rules["model"].get("unk_id")
        self.unk = None if unk is None else rules["model"]["vocab"][unk][0]

    def symbols(self) -> set[str]:
        always = set() if self.unk is None else {self.unk}
        if self.all_bytes:
            return {*always, *BYTES, *self.spaces, *_ascii(self.scores)}
        return always | {piece for piece in self.scores if len(piece) == 1}

    def parts(self, token: str, kept: set[str]) -> list[str]:
        """The likeliest segmentation, by Viterbi's algorithm (Kudo, 2018)."""
        best: list[tuple[float, list[str]]] = [(0.0, [])]
        for end in range(1, len(token) + 1):
            best_ending = (-math.inf, [""])
            for start in range(end):
                piece = token[start:end]
                score = -math.inf
                if piece != token and piece in kept and piece in self.scores:
                    score, last_parts = self.scores[piece], [piece]
                elif end - start == 1:
                    score, last_parts = self.unknown, _bytes_of(piece)
                if best[start][0] + score > best_ending[0]:
                    best_ending = (best[start][0] + score, best[start][1] + last_parts)
            best.append(best_ending)
        return best[-1][1]

    def made_of(self, token: str) -> tuple[str, ...]:
        return ()

    def needed(self, token: str, kept: set[str]) -> bool:
        return False


def stand_ins(rules: Rules) -> set[str]:
    """Tokens that a decoder replaces by another character (▁ by a space), but not their bytes."""
    decoder = rules.get("decoder") or {}
    tokens = set()
    for step in [decoder, *(decoder.get("decoders") or ())]:
        tokens.add(step.get("replacement"))
        tokens.add((step.get("pattern") or {}).get("String"))
    return {token for token in tokens if token}


def _all_bytes(model: Rules, vocab: Iterable[str]) -> bool:
    """Whether every symbol can fall back to the tokens of its UTF-8 bytes."""
    return bool(model.get("byte_fallback")) and set(vocab) >= BYTES


def _ascii(vocab: Iterable[str]) -> set[str]:
    return {token for token in vocab if len(token) == 1 and token.isascii()}


def _bytes_of(text: str) -> list[str]:
    return [f"<0x{value:02X}>" for value in text.encode("utf-8", "replace")]
