"""Cut a tokenizer to the kept token ids, in tokenizer.json and in the related files.

The new ids are 0 to n − 1, in the order of the old ids. Files with the same content in an older
format (tokenizer.model, vocab.txt) are not written, because they would be out of date.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from regrow.checkpoint import Checkpoint
from regrow.errors import UserError
from regrow.stage_dir import write_json

KINDS = ("BPE", "Unigram")
FAST = "tokenizer.json"
OTHER_FORMS = ("tokenizer.model", "vocab.txt", "spiece.model", "tekken.json")
Rules = dict[str, Any]
"""The content of a tokenizer.json."""


def read_rules(checkpoint: Checkpoint) -> Rules:
    """The tokenizer.json of a checkpoint; raises UserError for a type that cannot be cut."""
    tokenizer = checkpoint.tokenizer()
    path = checkpoint.folder / FAST
    if path.exists():
        rules: Rules = json.loads(path.read_text(encoding="utf-8"))
    elif tokenizer.is_fast:
        rules = json.loads(tokenizer.backend_tokenizer.to_str())
    else:
        raise UserError(
            f"{checkpoint.folder} has a slow tokenizer only: its vocabulary cannot be cut; convert "
            "it to a tokenizer.json first, or leave vocab_size out"
        )
    kind = rules["model"].get("type", "BPE")
    if kind not in KINDS:
        raise UserError(
            f"{checkpoint.folder} has a {kind} tokenizer: only {' and '.join(KINDS)} vocabularies "
            "can be cut; leave vocab_size out"
        )
    return rules


def tokens_of(rules: Rules) -> dict[str, int]:
    """The id of every token, including added tokens."""
    model = rules["model"]
    if isinstance(model["vocab"], list):
        ids = {piece: number for number, (piece, _) in enumerate(model["vocab"])}
    else:
        ids = dict(model["vocab"])
    return ids | {token["content"]: token["id"] for token in rules.get("added_tokens") or []}


def merge_of(entry: str | list[str]) -> tuple[str, str]:
    """The two parts of a merge, in either of the notations that tokenizer.json allows."""
    left, right = entry.split(" ") if isinstance(entry, str) else entry
    return left, right


def product(model: Rules, left: str, right: str) -> str:
    """The token that a merge produces."""
    return left + right.removeprefix(model.get("continuing_subword_prefix") or "")


def new_ids(kept: list[int]) -> dict[int, int]:
    """Map each old id to its new id."""
    return {old: new for new, old in enumerate(kept)}


def cut_rules(rules: Rules, kept: list[int]) -> Rules:
    """The content of tokenizer.json for the tokens `kept`, with their new ids."""
    new = copy.deepcopy(rules)
    ids = new_ids(kept)
    added = [token for token in new.get("added_tokens") or [] if token["id"] in ids]
    new["added_tokens"] = [{**token, "id": ids[token["id"]]} for token in added]
    _cut_model(new["model"], ids)
    names = tokens_of(new)
    if new.get("padding"):
        new["padding"]["pad_id"] = names.get(new["padding"]["pad_token"], 0)
    if new.get("post_processor"):
        _cut_post_processor(new["post_processor"], names)
    return new


def _cut_model(model: Rules, ids: dict[int, int]) -> None:
    if isinstance(model["vocab"], list):
        if model.get("unk_id") is not None:
            model["unk_id"] = ids.get(model["unk_id"])
        model["vocab"] = [entry for old, entry in enumerate(model["vocab"]) if old in ids]
        return
    model["vocab"] = {token: ids[i] for token, i in model["vocab"].items() if i in ids}
    vocab = model["vocab"]

    def stays(entry: str | list[str]) -> bool:
        left, right = merge_of(entry)
        return left in vocab and right in vocab and product(model, left, right) in vocab

    model["merges"] = [entry for entry in model["merges"] if stays(entry)]


def _cut_post_processor(processor: Rules, names: dict[str, int]) -> None:
    for inner in processor.get("processors", ()):
        _cut_post_processor(inner, names)
    for special in (processor.get("special_tokens") or {}).values():
        special["ids"] = [names[token] for token in special["tokens"]]
    for key in ("sep", "cls"):
        if isinstance(processor.get(key), list):
            processor[key][1] = names[processor[key][0]]


def cut_ids(fields: dict[str, Any], kept: list[int]) -> dict[str, Any]:
    """A config with the new token ids; ids of dropped tokens are removed from lists."""
    ids = new_ids(kept)

    def renumber(value: Any) -> Any:
        if isinstance(value, list):
            inner = [renumber(item) for item in value if not isinstance(item, int) or item in ids]
            return [item for item in inner if item != []]
        # An id outside the vocabulary (−1, a placeholder) is not changed.
        return ids.get(value, value) if isinstance(value, int) else value

    return {key: renumber(value) if names_ids(key) else value for key, value in fields.items()}


def names_ids(key: str) -> bool:
    """Whether the value of a config key is a token id or a list of them."""
    return key.endswith(("_token_id", "_token_ids", "suppress_tokens", "bad_words_ids"))


def ids_named(config: dict[str, Any]) -> set[int]:
    """The token ids in the `…_token_id` fields of a config, single or in lists."""
    ids: set[int] = set()
    for key, value in config.items():
        if names_ids(key) and "token_id" in key:
            values = value if isinstance(value, list) else [value]
            ids.update(item for item in values if isinstance(item, int))
    return ids


def write_tokenizer(checkpoint: Checkpoint, kept: list[int], folder: Path) -> None:
    """Replace the tokenizer, and the configs with token ids, in `folder` by the cut versions.

    Raises UserError for a tokenizer that cannot be cut.
    """
    generation = folder / "generation_config.json"
    if generation.exists():
        write_json(generation, cut_ids(json.loads(generation.read_text(encoding="utf-8")), kept))
    if not checkpoint.has_tokenizer:
        return
    rules = read_rules(checkpoint)
    new = cut_rules(rules, kept)
    text = json.dumps(new, ensure_ascii=False)
    ids = new_ids(kept)
    expected = {token: ids[i] for token, i in tokens_of(rules).items() if i in ids}
    written = Tokenizer.from_str(text).get_vocab(with_added_tokens=True)
    assert written == expected, "the cut tokenizer reads other ids than were written"
    (folder / FAST).write_text(text, encoding="utf-8")
    for name in OTHER_FORMS:
        (folder / name).unlink(missing_ok=True)
    _write_older_forms(folder, new, ids)


def _write_older_forms(folder: Path, rules: Rules, ids: dict[int, int]) -> None:
    """Write the other files that list tokens or ids, if the dense model has them."""
    path = folder / "tokenizer_config.json"
    if path.exists():
        config = json.loads(path.read_text(encoding="utf-8"))
        if decoder := config.get("added_tokens_decoder"):
            kept_tokens = {int(old): token for old, token in decoder.items() if int(old) in ids}
            config["added_tokens_decoder"] = {str(ids[old]): t for old, t in kept_tokens.items()}
            write_json(path, config)
    path = folder / "added_tokens.json"
    if path.exists():
        names = {token["content"]: token["id"] for token in rules["added_tokens"]}
        old = json.loads(path.read_text(encoding="utf-8"))
        write_json(path, {token: names[token] for token in old if token in names})
    model = rules["model"]
    if isinstance(model["vocab"], list):
        return
    if (folder / "vocab.json").exists():
        text = json.dumps(model["vocab"], ensure_ascii=False)
        (folder / "vocab.json").write_text(text, encoding="utf-8")
    if (folder / "merges.txt").exists():
        lines = [" ".join(merge_of(entry)) for entry in model["merges"]]
        text = "\n".join(["#version: 0.2", *lines]) + "\n"
        (folder / "merges.txt").write_text(text, encoding="utf-8")
