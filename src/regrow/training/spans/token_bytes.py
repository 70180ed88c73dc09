"""The bytes of text that each token of a tokenizer stands for."""

from __future__ import annotations

import json
import re
from typing import Any

from transformers import PreTrainedTokenizerBase

from regrow.errors import UserError

BYTE = re.compile(r"<0x([0-9A-F]{2})>")
SPACE = "▁"


def token_bytes(tokenizer: PreTrainedTokenizerBase, name: str) -> list[bytes | None]:
    """The bytes of each token id; None for special tokens and for ids without a token.

    Byte-level tokens are spelled in 256 characters that stand for bytes; others in text, with ▁
    for a space and <0xAB> for a byte. Raises UserError, naming the model, for another spelling.
    """
    if not tokenizer.is_fast:
        raise UserError(f"{name} has a slow tokenizer only: spans need a tokenizer.json")
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    steps = list(_flat(rules["decoder"]))
    kinds = {step["type"] for step in steps}
    spaced = "Metaspace" in kinds or any(
        step["type"] == "Replace" and step["pattern"] == {"String": SPACE} for step in steps
    )
    if "ByteLevel" not in kinds and not spaced:
        raise UserError(
            f"{name} has a tokenizer whose tokens do not say their bytes (decoder: "
            f"{', '.join(sorted(kinds)) or 'none'}): spans need a byte-level or SentencePiece one"
        )
    byte_of = _byte_level() if "ByteLevel" in kinds else None
    added = {token["content"]: token["special"] for token in rules["added_tokens"]}
    vocab = tokenizer.get_vocab()
    found: list[bytes | None] = [None] * (max(vocab.values()) + 1)
    for token, i in vocab.items():
        if token in added:
            found[i] = None if added[token] else token.encode()
        elif byte_of is not None:
            found[i] = b"".join(byte_of.get(c, c.encode()) for c in token)
        else:
            byte = BYTE.fullmatch(token) if "ByteFallback" in kinds else None
            text = token.replace(SPACE, " ").encode()
            found[i] = bytes.fromhex(byte[1]) if byte else text
    return found


def _flat(decoder: Any) -> list[dict[str, Any]]:
    if decoder is None:
        return []
    if decoder["type"] != "Sequence":
        return [decoder]
    return [step for inner in decoder["decoders"] for step in _flat(inner)]


def _byte_level() -> dict[str, bytes]:
    """The byte of each character in GPT-2's spelling: printable ones are themselves.

    The others, in order, are the characters from 256 on (Radford et al., 2019).
    """
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [value for value in range(256) if value not in plain]
    spelled = {chr(value): bytes([value]) for value in plain}
    return spelled | {chr(256 + n): bytes([value]) for n, value in enumerate(others)}
