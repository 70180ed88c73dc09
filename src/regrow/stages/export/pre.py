r"""Which of llama.cpp's ways to split text before the merges is a byte-level BPE tokenizer's own.

llama.cpp knows each by a name, the GGUF key tokenizer.ggml.pre, and has its regular expressions in
code. Here a tokenizer is recognised by what it does: the steps of its pre-tokenizer, and whether a
word that is a token as a whole is taken without merging.
"""

from __future__ import annotations

from typing import Any

from regrow.errors import UserError

_TAIL = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SHORT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+"
_CAPITALS = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
_SLASH_TAIL = _TAIL.replace(r"[\r\n]*", r"[\r\n/]*", 1)

Step = tuple[Any, ...]
BYTES: Step = ("bytes",)
WORDS_AND_BYTES: Step = ("words and bytes",)
"""GPT-2's own expression is part of the byte-level step, if that is told to use it."""

KNOWN: dict[str, tuple[tuple[Step, ...], bool]] = {
    "gpt-2": ((WORDS_AND_BYTES,), False),
    "smollm": ((("digits", True), WORDS_AND_BYTES), False),
    "llama-bpe": ((("split", rf"{_SHORT}|{_WORD}|\p{{N}}{{1,3}}|{_TAIL}"), BYTES), True),
    "dbrx": ((("split", rf"{_SHORT}|{_WORD}|\p{{N}}{{1,3}}|{_TAIL}"), BYTES), False),
    "qwen2": ((("split", rf"{_SHORT}|{_WORD}|\p{{N}}|{_TAIL}"), BYTES), False),
    "tekken": ((("split", rf"{_CASED}|{_CAPITALS}|\p{{N}}|{_SLASH_TAIL}"), BYTES), True),
    "gpt-4o": (
        (
            (
                "split",
                rf"{_CASED}{_SHORT}?|{_CAPITALS}{_SHORT}?|\p{{N}}{{1,3}}|{_SLASH_TAIL}",
            ),
            BYTES,
        ),
        False,
    ),
}
"""Steps of the pre-tokenizer, and `ignore_merges`, by llama.cpp's name."""


def identify(rules: dict[str, Any]) -> str | None:
    """llama.cpp's name for the way of a tokenizer.json's rules; None when it is none of those."""
    steps = _steps(rules.get("pre_tokenizer"))
    whole = bool(rules["model"].get("ignore_merges"))
    for name, known in KNOWN.items():
        if (steps, whole) == known:
            return name
    return None


def name_of(rules: dict[str, Any], given: str | None) -> str:
    """The name given, else the one recognised; raises UserError when neither is there."""
    found = given or identify(rules)
    if found is None:
        steps = " + ".join(str(step[0]) for step in _steps(rules.get("pre_tokenizer"))) or "none"
        raise UserError(
            f"how this tokenizer splits text ({steps}) is none that regrow recognises "
            f"({', '.join(KNOWN)}): name llama.cpp's way with --pre (tokenizer.ggml.pre of a GGUF "
            "file of the parent model says it)"
        )
    return found


def _steps(rule: dict[str, Any] | None) -> tuple[Step, ...]:
    """A pre-tokenizer as plain steps; what is not known keeps its type, and so matches nothing."""
    if rule is None:
        return ()
    kind = rule["type"]
    if kind == "Sequence":
        return tuple(step for inner in rule["pretokenizers"] for step in _steps(inner))
    if kind == "ByteLevel" and not rule.get("add_prefix_space"):
        return (WORDS_AND_BYTES if rule.get("use_regex", True) else BYTES,)
    if kind == "Digits":
        return (("digits", rule["individual_digits"]),)
    if kind == "Split" and rule["behavior"] == "Isolated" and not rule["invert"]:
        return (("split", rule["pattern"].get("Regex")),)
    return ((kind,),)
