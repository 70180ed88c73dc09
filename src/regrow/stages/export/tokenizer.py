r"""Writes a tokenizer as GGUF keys: tokens, their kinds, merges or scores, special ids.

llama.cpp identifies each pre-tokenizer (the splitting of text before the merges) by a name, stored
under the key tokenizer.ggml.pre; the regular expressions themselves are in llama.cpp's code. This
module recognises a byte-level BPE tokenizer by the steps of its pre-tokenizer and by its
`ignore_merges`: whether a word that is itself a token is used without merging.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from regrow.checkpoint import Checkpoint
from regrow.errors import UserError
from regrow.runtime.progress import say

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

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
"""A byte-level step with `use_regex`: it also splits text by GPT-2's regular expression."""

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
"""The pre-tokenizer's steps and `ignore_merges` for each of llama.cpp's names."""


def identify(rules: dict[str, Any]) -> str | None:
    """llama.cpp's name of the pre-tokenizer in a tokenizer.json; None when it is not in KNOWN."""
    steps = _steps(rules.get("pre_tokenizer"))
    ignore_merges = bool(rules["model"].get("ignore_merges"))
    for name, definition in KNOWN.items():
        if (steps, ignore_merges) == definition:
            return name
    return None


def name_of(rules: dict[str, Any], name: str | None) -> str:
    """`name`, or else the recognised name; raises UserError when there is neither."""
    name = name or identify(rules)
    if name is None:
        steps = " + ".join(str(step[0]) for step in _steps(rules.get("pre_tokenizer"))) or "none"
        raise UserError(
            f"regrow does not recognise how this tokenizer splits text ({steps}); it knows "
            f"{', '.join(KNOWN)}: give llama.cpp's name with --pre (the key tokenizer.ggml.pre in "
            "a GGUF file of the parent model)"
        )
    return name


def _steps(rule: dict[str, Any] | None) -> tuple[Step, ...]:
    """A pre-tokenizer as a flat list of steps; an unknown step keeps its type and never matches."""
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


SPECIAL = {"bos": "bos", "eos": "eos", "unk": "unk", "pad": "pad"}
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""llama.cpp's numbers for the kinds of tokens."""


@dataclass(frozen=True)
class Vocabulary:
    """The data that llama.cpp needs to tokenize text as the original tokenizer does."""

    model: str
    """gpt2 for byte-level BPE, llama for BPE over characters with byte fallback, t5 for
    Unigram."""
    tokens: list[str]
    kinds: list[int]
    pre: str | None = None
    merges: list[str] | None = None
    scores: list[float] | None = None
    space_prefix: bool = False
    """Whether a space is added before the text."""


def vocabulary(checkpoint: Checkpoint, vocab_size: int, given_pre: str | None) -> Vocabulary:
    """The checkpoint's tokenizer for an embedding of `vocab_size` rows.

    Raises UserError for a tokenizer that llama.cpp cannot reproduce or that has more ids than rows.
    """
    tokenizer = checkpoint.tokenizer()
    if not tokenizer.is_fast:
        raise UserError(
            f"the tokenizer in {checkpoint.folder} has no tokenizer.json: save it with a fast "
            "tokenizer of transformers first"
        )
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    kind = _kind(rules)
    if kind == "t5" and rules["model"].get("byte_fallback"):
        say("export: llama.cpp's Unigram has no byte fallback: unknown characters become <unk>")
    tokens, kinds = _tokens(rules, vocab_size, kind)
    prefix = _puts_space(tokenizer) if kind != "gpt2" else False
    if kind == "gpt2":
        merges = [m if isinstance(m, str) else " ".join(m) for m in rules["model"]["merges"]]
        return Vocabulary(kind, tokens, kinds, name_of(rules, given_pre), merges)
    scores = _bpe_scores(rules, tokens) if kind == "llama" else _unigram_scores(rules, tokens)
    return Vocabulary(kind, tokens, kinds, "default", None, scores, prefix)


def write(writer: Any, checkpoint: Checkpoint, vocabulary: Vocabulary) -> None:
    """Add the tokenizer's keys to a GGUFWriter: vocabulary, special ids, chat template."""
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.kinds)
    if vocabulary.scores is not None:
        writer.add_token_scores(vocabulary.scores)
    if vocabulary.merges is not None:
        writer.add_token_merges(vocabulary.merges)
    writer.add_add_space_prefix(vocabulary.space_prefix)
    if vocabulary.model == "t5":
        writer.add_remove_extra_whitespaces(False)
    tokenizer: Any = checkpoint.tokenizer()
    ids = {name: getattr(tokenizer, f"{name}_token_id") for name in SPECIAL}
    for name, number in ids.items():
        if number is not None and number < len(vocabulary.tokens):
            getattr(writer, f"add_{name}_token_id")(number)
    for number in end_ids(checkpoint):
        if number != ids["eos"]:
            writer.add_eot_token_id(number)
            break
    encoded = tokenizer("a")["input_ids"]
    writer.add_add_bos_token(bool(encoded) and encoded[0] == ids["bos"])
    writer.add_add_eos_token(len(encoded) > 1 and encoded[-1] == ids["eos"])
    if template := chat_template(tokenizer):
        writer.add_chat_template(template)


def chat_template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The tokenizer's chat template; the default one when there are several."""
    template: Any = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default") or next(iter(template.values()), None)
    return template or None


def end_ids(checkpoint: Checkpoint) -> list[int]:
    """Ids that end an answer: the tokenizer's EOS, then the EOS ids of the generation config."""
    path = checkpoint.folder / "generation_config.json"
    ids = [checkpoint.tokenizer().eos_token_id, checkpoint.config.get("eos_token_id")]
    if path.exists():
        ids.append(json.loads(path.read_text()).get("eos_token_id"))
    flat = [n for value in ids for n in (value if isinstance(value, list) else [value])]
    return list(dict.fromkeys(int(n) for n in flat if n is not None))


def _kind(rules: dict[str, Any]) -> str:
    model = rules["model"]
    text = json.dumps([rules.get("pre_tokenizer"), rules.get("normalizer")])
    if model["type"] == "BPE":
        if '"ByteLevel"' in text:
            return "gpt2"
        if model.get("byte_fallback"):
            return "llama"
    if model["type"] == "Unigram":
        return "t5"
    raise UserError(
        f"a tokenizer of type {model['type']} that is neither byte-level nor falls back to bytes: "
        "llama.cpp cannot reproduce it, so this model cannot be exported"
    )


def _tokens(rules: dict[str, Any], size: int, kind: str) -> tuple[list[str], list[int]]:
    """Text and kind of every id; embedding rows that the tokenizer does not use get kind UNUSED."""
    listed = rules["model"]["vocab"]
    if isinstance(listed, dict):
        of_id = {number: token for token, number in listed.items()}
    else:
        of_id = {number: token for number, (token, _) in enumerate(listed)}
    unknown = rules["model"].get("unk_token")
    if unknown is None and rules["model"].get("unk_id") is not None:
        unknown = of_id[rules["model"]["unk_id"]]
    kinds = dict.fromkeys(of_id, NORMAL)
    for number, token in of_id.items():
        if token == unknown:
            kinds[number] = UNKNOWN
        elif kind != "gpt2" and len(token) == 6 and token.startswith("<0x"):
            kinds[number] = BYTE
    for added in rules["added_tokens"]:
        number = added["id"]
        of_id[number] = added["content"]
        if kinds.get(number) not in (UNKNOWN, BYTE):
            kinds[number] = CONTROL if added["special"] else USER_DEFINED
    if of_id and max(of_id) >= size:
        raise UserError(
            f"the tokenizer has ids up to {max(of_id)}, but the embedding has only {size} rows: "
            "use the tokenizer that belongs to this model"
        )
    tokens = [of_id.get(number, f"[PAD{number}]") for number in range(size)]
    return tokens, [kinds.get(number, UNUSED) for number in range(size)]


def _bpe_scores(rules: dict[str, Any], tokens: list[str]) -> list[float]:
    """Token scores with which llama.cpp applies the merges in the order of the list of merges.

    The token of the first merge has the highest score; a token that no merge produces has the
    lowest.
    """
    merges = rules["model"]["merges"]
    rank: dict[str, int] = {}
    for number, merge in enumerate(merges):
        pair = merge.split(" ", 1) if isinstance(merge, str) else merge
        rank.setdefault("".join(pair), number)
    return [-float(rank.get(token, len(merges))) for token in tokens]


def _unigram_scores(rules: dict[str, Any], tokens: list[str]) -> list[float]:
    scores = dict(rules["model"]["vocab"])
    return [float(scores.get(token, 0.0)) for token in tokens]


def _puts_space(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer adds a space before the first token of a text."""
    first = tokenizer.backend_tokenizer.encode("a", add_special_tokens=False).tokens
    return bool(first) and first[0].startswith("▁")
