"""Which tokens are kept, and the tokenizer that is left: against slow versions, on hostile text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny_model
from tiny_tokenizer import BYTES, KINDS, SENTENCES, tiny_tokenizer_of
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from regrow.checkpoint import Checkpoint
from regrow.checkpoint.carried import carry
from regrow.errors import UserError
from regrow.pruning.tokenizer import cut_ids, cut_rules, read_rules, tokens_of, write_tokenizer
from regrow.pruning.vocabulary import choose_vocab, pieces_of, required, shrink

HOSTILE = [
    *SENTENCES,
    "héllo wörld 🤖🏳️‍🌈 漢字かな한국어 عربى",
    "\x00\x01\x07\x7f\t\r\n  two  spaces   \n\n\n",
    "def f(x):\n\treturn [x**2 for _ in range(10)]  # ≤ 100%",
    "e\u0301 \ufeff\u200b\u202e\ud7ff\U0010ffff ▁ Ġ <0x41> </s",
    "",
    " ",
    "a" * 300,
]
PADDING = 5


def model_folder(folder: Path, kind: str, **overrides: Any) -> Checkpoint:
    """A tiny model whose embedding has PADDING rows more than its tokenizer has tokens."""
    tokenizer = tiny_tokenizer_of(kind)
    fields = {"vocab_size": len(tokenizer) + PADDING, "num_hidden_layers": 1, **overrides}
    tiny_model("llama", torch.float32, **fields).save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))
    return Checkpoint(folder)


@pytest.fixture(scope="module")
def parents(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Checkpoint]:
    return {kind: model_folder(tmp_path_factory.mktemp("parent"), kind) for kind in KINDS}


def counts_of(checkpoint: Checkpoint) -> torch.Tensor:
    ids = [i for s in SENTENCES * 3 for i in checkpoint.tokenizer()(s)["input_ids"]]
    return torch.bincount(torch.tensor(ids), minlength=checkpoint.config["vocab_size"]).float()


def least_of(checkpoint: Checkpoint) -> int:
    rules = read_rules(checkpoint)
    ids, always = tokens_of(rules), required(checkpoint, rules)
    return len(shrink(pieces_of(rules), ids, always, [0.0] * 999, 0))


def cut(checkpoint: Checkpoint, size: int, out: Path) -> tuple[list[int], Any]:
    """The kept ids and the cut tokenizer, read again by transformers."""
    kept = choose_vocab(checkpoint, counts_of(checkpoint), size)
    out.mkdir(exist_ok=True)
    carry(checkpoint.folder, out)
    write_tokenizer(checkpoint, kept, out)
    return kept, AutoTokenizer.from_pretrained(str(out))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("share", [0.0, 0.3, 0.8])
def test_the_cut_tokenizer_on_hostile_text(
    parents: dict[str, Checkpoint], kind: str, share: float, tmp_path: Path
) -> None:
    """Ids map to the same strings, encodings mean the same text, and all ids are the model's."""
    parent, full_tokenizer = parents[kind], parents[kind].tokenizer()
    minimum, size = least_of(parent), len(full_tokenizer)
    vocab_size = minimum + round(share * (size - minimum))
    kept, cut_tokenizer = cut(parent, vocab_size, tmp_path / "cut")
    token_of = {i: token for token, i in full_tokenizer.get_vocab().items()}
    assert len(kept) == vocab_size == len(cut_tokenizer)
    assert cut_tokenizer.get_vocab() == {token_of[old]: new for new, old in enumerate(kept)}
    for text in HOSTILE:
        ids, before = cut_tokenizer(text)["input_ids"], full_tokenizer(text)["input_ids"]
        assert max(ids, default=0) < vocab_size
        assert (
            full_tokenizer.decode([kept[i] for i in ids])
            == full_tokenizer.decode(before)
            == cut_tokenizer.decode(ids)
        )
        for skip in (True, False):
            old = full_tokenizer.decode(before, skip_special_tokens=skip)
            assert cut_tokenizer.decode(ids, skip_special_tokens=skip) == old
        assert len(ids) >= len(before)
    plain = [text for text in HOSTILE if "<0x41>" not in text]  # which is a byte's token itself
    if kind != "unigram without bytes":
        for text in plain:
            back = cut_tokenizer.decode(cut_tokenizer(text)["input_ids"], skip_special_tokens=True)
            assert back == text, repr(text)
    assert cut_tokenizer.eos_token_id == kept.index(full_tokenizer.eos_token_id)
    assert cut_tokenizer.chat_template == full_tokenizer.chat_template
    if kind != "byte level":
        assert cut_tokenizer("The")["input_ids"][0] == cut_tokenizer.bos_token_id == kept.index(1)


@pytest.mark.parametrize("kind", KINDS)
def test_the_cheapest_token_goes_first(parents: dict[str, Checkpoint], kind: str) -> None:
    """The heap against looking at every token at every step."""
    parent = parents[kind]
    rules = read_rules(parent)
    pieces, ids, always = pieces_of(rules), tokens_of(rules), required(parent, rules)
    counts = counts_of(parent).tolist()
    count = {token: counts[i] for token, i in ids.items()}
    left = set(ids)
    order = []
    makers = slow_makers(rules)
    while True:
        free = [t for t in left if ids[t] not in always and not slow_needed(makers, t, left)]
        if not free:
            break
        parts = {t: pieces.parts(t, left) for t in free}
        bytes_in = {t: sum(part in BYTES for part in parts[t]) for t in free}
        cost = {t: count[t] * (len(parts[t]) - 1 + bytes_in[t]) for t in free}
        gone = min(free, key=lambda t: (cost[t], -ids[t]))
        left.remove(gone)
        order.append(gone)
        for part in pieces.parts(gone, left):
            count[part] += count[gone]
    assert len(order) > 20
    for size in range(len(left), len(ids), 7):
        expected = set(ids) - set(order[: len(ids) - size])
        assert shrink(pieces, ids, always, counts, size) == expected


def slow_makers(rules: dict[str, Any]) -> dict[str, list[tuple[str, str]]]:
    """Each token that is merged together, but for added ones, and the merges that make it."""
    added = {entry["content"] for entry in rules["added_tokens"]}
    merges = [(a, b) for a, b in rules["model"].get("merges", ())]
    products = {a + b for a, b in merges} - added
    return {token: [(a, b) for a, b in merges if a + b == token] for token in products}


def slow_needed(makers: dict[str, list[tuple[str, str]]], token: str, left: set[str]) -> bool:
    """Whether a token that is left could not be merged together without this one."""
    for other in makers.keys() & left:
        merges = [merge for merge in makers[other] if set(merge) <= left]
        if merges and all(token in merge for merge in merges):
            return True
    return False


def test_a_character_is_worth_more_than_its_bytes() -> None:
    """7 is one byte and é two: without them a text is no longer, or hardly."""
    tokens = [*BYTES, "7", "é", "ab", "a", "b"]
    vocab = {token: i for i, token in enumerate(tokens)}
    model = {"type": "BPE", "vocab": vocab, "merges": [["a", "b"]], "byte_fallback": True}
    pieces = pieces_of({"model": model})
    assert {"7", "a", "b"} <= pieces.symbols()
    assert "é" not in pieces.symbols()
    counts = [9.0 if token in ("7", "é") else 20.0 if token == "ab" else 1.0 for token in tokens]
    always = {vocab[token] for token in pieces.symbols()}
    # é costs 9 · (2 − 1 + 2) = 27, and ab 20 · (2 − 1) = 20.
    assert set(tokens) - shrink(pieces, vocab, always, counts, len(tokens) - 1) == {"ab"}


def test_counts_fall_to_the_parts_by_hand() -> None:
    """ab occurs 5 times, abc 4, cd 3: cd goes first, then abc whose 4 go to ab (9) and c."""
    vocab = {t: i for i, t in enumerate(["a", "b", "c", "d", "ab", "abc", "cd"])}
    merges = [["a", "b"], ["ab", "c"], ["c", "d"]]
    pieces = pieces_of({"model": {"type": "BPE", "vocab": vocab, "merges": merges}})
    counts = [1.0, 1, 1, 1, 5, 4, 3]

    def gone(size: int, counts: list[float]) -> set[str]:
        return set(vocab) - shrink(pieces, vocab, {0, 1, 2, 3}, counts, size)

    assert [gone(size, counts) for size in (6, 5, 4)] == [
        {"cd"},
        {"cd", "abc"},
        {"cd", "abc", "ab"},
    ]
    # ab alone occurs once, but abc is made of it: with abc's 4 it costs 5, more than cd.
    counts[4] = 1
    assert [gone(size, counts) for size in (6, 5)] == [{"cd"}, {"cd", "abc"}]
    counts[6] = 4.5
    assert [gone(size, counts) for size in (6, 5)] == [{"abc"}, {"abc", "cd"}]
    assert gone(0, counts) == {"ab", "abc", "cd"}


@pytest.mark.parametrize("kind", ["byte level", "byte fallback"])
def test_kept_tokens_can_be_merged_together(
    parents: dict[str, Checkpoint], kind: str, tmp_path: Path
) -> None:
    _, tokenizer = cut(parents[kind], least_of(parents[kind]) + 40, tmp_path / "cut")
    rules = json.loads((tmp_path / "cut" / "tokenizer.json").read_text())
    assert len(rules["model"]["merges"]) >= 20
    products = {a + b for a, b in rules["model"]["merges"]}
    added = {entry["content"] for entry in rules["added_tokens"]}
    left = set(rules["model"]["vocab"]) - products - added - set(BYTES)
    assert all(len(token) == 1 for token in left)
    for token in products:
        text = tokenizer.decode([tokenizer.get_vocab()[token]])
        if kind == "byte level" and "�" not in text and not text.isspace():
            assert tokenizer.convert_ids_to_tokens(tokenizer(text)["input_ids"]) == [token]


def test_tokens_save_the_text_that_was_counted(parents: dict[str, Checkpoint]) -> None:
    """On one sentence: shorter than with the tokens of lowest id, whole with few tokens."""
    parent = parents["byte level"]
    text = SENTENCES[2]
    ids = parent.tokenizer()(text)["input_ids"]
    counts = torch.bincount(torch.tensor(ids), minlength=parent.config["vocab_size"])
    size = least_of(parent) + 40

    def tokens(kept: list[int]) -> int:
        rules = cut_rules(read_rules(parent), kept)
        return len(Tokenizer.from_str(json.dumps(rules)).encode(text).ids)

    assert tokens(choose_vocab(parent, counts, size)) < 0.85 * tokens(list(range(size)))


def test_padding_of_the_vocabulary_goes_first(parents: dict[str, Checkpoint]) -> None:
    for kind, parent in parents.items():
        tokens = len(parent.tokenizer())
        for more in (0, 1, PADDING):
            kept = choose_vocab(parent, counts_of(parent), tokens + more)
            assert kept == list(range(tokens + more)), kind


def test_too_few_tokens_name_the_least(parents: dict[str, Checkpoint]) -> None:
    for kind, parent in parents.items():
        minimum = least_of(parent)
        with pytest.raises(
            UserError, match=rf"vocab_size {minimum - 1}: {minimum} .*give {minimum} or"
        ):
            choose_vocab(parent, counts_of(parent), minimum - 1)
        assert len(choose_vocab(parent, counts_of(parent), minimum)) == minimum, kind
        special = {parent.config["eos_token_id"], parent.config["pad_token_id"]}
        assert special <= set(choose_vocab(parent, counts_of(parent), minimum))


def test_a_tokenizer_of_another_type_is_refused(tmp_path: Path) -> None:
    words = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1, "b": 2}, unk_token="<unk>"))
    model_folder(tmp_path / "words", "byte level")
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(str(tmp_path / "words"))
    with pytest.raises(UserError, match="WordLevel tokenizer: only BPE and Unigram"):
        choose_vocab(Checkpoint(tmp_path / "words"), torch.zeros(389), 300)


def test_configs_name_the_new_ids() -> None:
    kept = [0, 2, 5, 7, 9]
    fields = {
        "eos_token_id": [2, 9],
        "bos_token_id": 5,
        "pad_token_id": None,
        "image_token_id": 100,
        "sep_token_id": -1,
        "suppress_tokens": [1, 7, 9],
        "bad_words_ids": [[5, 7], [1]],
        "num_hidden_layers": 2,
        "vocab_size": 5,
    }
    assert cut_ids(fields, kept) == {
        **fields,
        "eos_token_id": [1, 4],
        "bos_token_id": 2,
        "suppress_tokens": [3, 4],
        "bad_words_ids": [[2, 3]],
    }


def test_other_tokenizer_files_are_updated(tmp_path: Path) -> None:
    """Old forms are rewritten or gone; vocab.json and merges.txt alone give the same ids."""
    parent = model_folder(tmp_path / "parent", "byte level")
    rules = read_rules(parent)
    config_path = parent.folder / "tokenizer_config.json"
    config = json.loads(config_path.read_text())
    decoder = {str(t["id"]): {**t, "id": 0} for t in rules["added_tokens"]}
    for token in decoder.values():
        del token["id"]
    config_path.write_text(json.dumps({**config, "added_tokens_decoder": decoder}))
    out = tmp_path / "out"
    out.mkdir()
    for name, text in {
        "tokenizer_config.json": config_path.read_text(),
        "vocab.json": json.dumps(rules["model"]["vocab"]),
        "merges.txt": "\n".join(" ".join(merge) for merge in rules["model"]["merges"]),
        "added_tokens.json": json.dumps({"<|im_end|>": 3}),
        "tokenizer.model": "stale",
        "generation_config.json": json.dumps({"eos_token_id": [0, 3], "pad_token_id": 1}),
    }.items():
        (out / name).write_text(text)
    kept = [0, 3, *choose_vocab(parent, counts_of(parent), 300)[4:]]  # as a plan may have it
    write_tokenizer(parent, kept, out)
    assert not (out / "tokenizer.model").exists()
    generation = json.loads((out / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [0, 1]
    assert json.loads((out / "added_tokens.json").read_text()) == {"<|im_end|>": 1}
    decoder = json.loads((out / "tokenizer_config.json").read_text())["added_tokens_decoder"]
    assert {i: token["content"] for i, token in decoder.items()} == {
        "0": "<|endoftext|>",
        "1": "<|im_end|>",
    }
    cut_model = json.loads((out / "tokenizer.json").read_text())["model"]
    plain = models.BPE.from_file(str(out / "vocab.json"), str(out / "merges.txt"))
    model_rules = json.loads(Tokenizer(plain).to_str())["model"]
    assert model_rules["vocab"] == cut_model["vocab"]
    assert model_rules["merges"] == cut_model["merges"]


def test_special_and_config_ids_are_required(
    parents: dict[str, Checkpoint], tmp_path: Path
) -> None:
    """Special tokens, what a config names, all bytes, and ASCII: not all that bytes can spell."""
    parent = model_folder(tmp_path / "parent", "byte fallback", eos_token_id=[2, 300])
    (parent.folder / "generation_config.json").write_text('{"pad_token_id": 310}')
    rules = read_rules(parent)
    space = rules["model"]["vocab"]["▁"]  # spelled in bytes it would be read as itself
    letters = {i for t, i in rules["model"]["vocab"].items() if len(t) == 1 and t.isascii()}
    assert len(letters) > 20
    assert required(parent, rules) == {*range(3 + 256), 300, 310, space} | letters
    level = parents["byte level"]
    symbols = {i for token, i in read_rules(level)["model"]["vocab"].items() if len(token) == 1}
    assert required(level, read_rules(level)) == {0, 1, 2, 3} | symbols
    assert len(symbols) == 256
