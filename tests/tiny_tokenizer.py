"""A real fast tokenizer, trained in milliseconds, for tests that must not need the network."""

from __future__ import annotations

import json
from functools import cache

from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

SENTENCES = [
    "The quick brown fox jumps over the lazy dog.",
    "What is the capital of France? The capital of France is Paris.",
    "A model is pruned, then distilled, then it answers questions again.",
    "One, two, three, four; 1 2 3 4 5 6 7 8 9 0. Hello there!",
    "Paragraphs end with a blank line.\n\nThe next one begins here.\n",
]

# The same turns as ChatML, once without and once with the markers of the assistant's words.
PLAIN_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
GENERATION_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ m['content'] }}<|im_end|>{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tiny_tokenizer(
    vocab_size: int = 384, chat_template: str | None = PLAIN_TEMPLATE
) -> PreTrainedTokenizerFast:
    """A byte-level BPE of at most `vocab_size` tokens with eos, pad and ChatML marks; adds no BOS.

    Ids: `<|endoftext|>` (eos) 0, `<|pad|>` 1, `<|im_start|>` 2, `<|im_end|>` 3; any text
    round-trips, because all 256 bytes are in the vocabulary.
    """
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_trained(vocab_size)),
        eos_token="<|endoftext|>",
        pad_token="<|pad|>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
        model_max_length=4096,
    )
    tokenizer.chat_template = chat_template
    return tokenizer


@cache
def _trained(vocab_size: int) -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|endoftext|>", "<|pad|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES * 4, trainer)
    return tokenizer.to_str()


KINDS = ("byte level", "byte fallback", "unigram", "unigram without bytes")
"""Kinds of tokenizers whose vocabulary can be cut."""
BYTES = [f"<0x{value:02X}>" for value in range(256)]


def tiny_tokenizer_of(kind: str) -> PreTrainedTokenizerFast:
    """A tokenizer of one of KINDS; all but the first have `<unk>` 0, `<s>` 1 (put first), `</s>` 2.

    Without bytes what was not trained on is unknown; the others round-trip any text.
    """
    if kind == "byte level":
        return tiny_tokenizer()
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_sentencepiece(kind)),
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        model_max_length=4096,
    )


@cache
def _sentencepiece(kind: str) -> str:
    special = ["<unk>", "<s>", "</s>"]
    if kind == "byte fallback":
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
        trainer: trainers.Trainer = trainers.BpeTrainer(
            vocab_size=440, special_tokens=special + BYTES, show_progress=False
        )
    else:
        tokenizer = Tokenizer(models.Unigram())
        trainer = trainers.UnigramTrainer(
            vocab_size=160, special_tokens=special, unk_token="<unk>", show_progress=False
        )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    if kind != "byte fallback":
        tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    tokenizer.train_from_iterator(SENTENCES * 4, trainer)
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    rules = json.loads(tokenizer.to_str())
    rules["added_tokens"] = rules["added_tokens"][: len(special)]  # bytes are no added tokens
    if kind == "unigram":
        scores = [score for _, score in rules["model"]["vocab"]]
        rules["model"]["vocab"][3:3] = [[byte, min(scores) - 1] for byte in BYTES]
        rules["model"]["byte_fallback"] = True
    return json.dumps(rules)
