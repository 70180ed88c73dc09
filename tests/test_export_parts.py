"""Parts of an export by themselves: how a tokenizer splits, a chat template, a licence."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_folders import set_config
from tiny_gguf import exported, write_case
from tiny_tokenizer import GENERATION_TEMPLATE, tiny_tokenizer
from tokenizers import Regex, pre_tokenizers

from regrow import UserError
from regrow.checkpoint import Checkpoint
from regrow.checkpoint.licence import Licence, licence_of
from regrow.llama_cpp import GgufModel
from regrow.stages.export import chat, tokenizer


def rules_of(splitter: Any, ignore_merges: bool = False) -> dict[str, Any]:
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = splitter
    rules: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    rules["model"]["ignore_merges"] = ignore_merges
    return rules


def test_the_pre_tokenizer_is_recognised_by_its_steps() -> None:
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False)
    digits = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), plain])
    assert tokenizer.identify(rules_of(plain)) == "gpt-2"
    assert tokenizer.identify(rules_of(digits)) == "smollm"
    assert tokenizer.identify(rules_of(pre_tokenizers.ByteLevel(add_prefix_space=True))) is None
    odd = rules_of(pre_tokenizers.Sequence([pre_tokenizers.Punctuation(), plain]))
    with pytest.raises(UserError, match=r"splits text \(Punctuation \+ words and bytes\)"):
        tokenizer.name_of(odd, None)
    assert tokenizer.name_of(odd, "gpt-2") == "gpt-2"


@pytest.mark.parametrize("name", tokenizer.KNOWN)
def test_llama_cpp_tokenizes_like_each_known_pre_tokenizer(name: str, tmp_path: Path) -> None:
    """The same expressions, by their effect: llama.cpp's tokens are those of the tokenizer."""
    steps, ignore_merges = tokenizer.KNOWN[name]
    splitters: list[Any] = []
    for step in steps:
        if step[0] == "split":
            splitters.append(pre_tokenizers.Split(Regex(step[1]), "isolated"))
        elif step[0] == "digits":
            splitters.append(pre_tokenizers.Digits(individual_digits=step[1]))
        else:
            regex = step[0] != "bytes"
            splitters.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=regex))
    checkpoint = write_case(tmp_path / "m", "llama")
    loaded = copy.deepcopy(checkpoint.tokenizer())
    loaded.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(splitters)
    path = tmp_path / "m" / "tokenizer.json"
    rules = json.loads(loaded.backend_tokenizer.to_str())
    rules["model"]["ignore_merges"] = ignore_merges
    # Merges across what some ways keep apart, so that a wrong way shows.
    for pair in ("1 2", "12 3", "Ġ 1", "1 9", ". Ċ", "Ċ Ċ", "Ġ Ġ", "' S", "a B"):
        left, right = pair.split(" ")
        rules["model"]["vocab"].setdefault(left + right, len(rules["model"]["vocab"]))
        rules["model"]["merges"].insert(0, [left, right])
    path.write_text(json.dumps(rules))
    set_config(tmp_path / "m", vocab_size=len(rules["model"]["vocab"]))
    _widen(tmp_path / "m", len(rules["model"]["vocab"]))
    widened = Checkpoint(tmp_path / "m")
    assert tokenizer.identify(json.loads(widened.tokenizer().backend_tokenizer.to_str())) == name
    file = exported(widened, tmp_path / "out", "F32", verify="never")
    with GgufModel(file) as opened:
        for text in ("In 1907 12345 ships;  it'S\n\n\nHe'll aBc.\n\n x", "naïve  東京 ÄÖ १२३"):
            expected = widened.tokenizer()(text, add_special_tokens=False)["input_ids"]
            assert opened.tokenize(text) == expected, text


def _widen(folder: Path, size: int) -> None:
    tensors = load_file(folder / "model.safetensors")
    old = tensors["model.embed_tokens.weight"]
    tensors["model.embed_tokens.weight"] = torch.cat([old, old[: size - len(old)]]).contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_chat_template_in_ollamas_language(tmp_path: Path) -> None:
    pieces = chat.pieces_of(tiny_tokenizer())
    assert pieces is not None
    assert pieces.system == ("<|im_start|>system\n", "<|im_end|>\n")
    assert pieces.user == ("<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n")
    assert pieces.answer == "<|im_end|>\n"
    assert pieces.default == ""
    assert pieces.go() == (
        '{{ range .Messages }}{{ if eq .Role "system" }}<|im_start|>system\n{{ .Content }}'
        '<|im_end|>\n{{ else if eq .Role "user" }}<|im_start|>user\n{{ .Content }}<|im_end|>\n'
        '<|im_start|>assistant\n{{ else if eq .Role "assistant" }}{{ .Content }}<|im_end|>\n'
        "{{ end }}{{ end }}"
    )
    assert chat.pieces_of(tiny_tokenizer(chat_template=None)) is None
    assert chat.pieces_of(tiny_tokenizer(chat_template="{{ messages | length }}")) is None
    shouts = GENERATION_TEMPLATE.replace("m['content']", "m['content'] | upper")
    assert chat.pieces_of(tiny_tokenizer(chat_template=shouts)) is None


def test_a_licence_is_not_guessed(tmp_path: Path) -> None:
    assert licence_of(str(tmp_path)) == Licence()
    assert str(licence_of(str(tmp_path))) == "unknown"
    assert licence_of("someone/some-model").id is None
    (tmp_path / "LICENSE").write_text("You may do what you like, mostly.")
    assert licence_of(str(tmp_path)).id is None
    (tmp_path / "LICENSE.txt").write_text("   Apache License\n   Version 2.0, January 2004")
    assert licence_of(str(tmp_path)).id == "apache-2.0"
    (tmp_path / "README.md").write_text("---\nlicense: cc-by-nc-4.0\n---\n# A model\n")
    assert "non-commercial" in licence_of(str(tmp_path)).terms
