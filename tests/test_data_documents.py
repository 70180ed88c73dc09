"""Row kinds → ids and masks, by hand-made expectations on a real tokenizer."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from tiny_tokenizer import GENERATION_TEMPLATE, PLAIN_TEMPLATE, tiny_tokenizer
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from regrow.data.config import DataConfig, SourceConfig
from regrow.data.documents import (
    Document,
    Passage,
    chat_prompt_ids,
    pieces,
    read_row,
    split_of,
    tokenize,
)
from regrow.errors import UserError

TOKENIZER = tiny_tokenizer()
EOS = "<|endoftext|>"


def document(row: dict[str, Any], tokenizer: PreTrainedTokenizerFast = TOKENIZER) -> Document:
    return tokenize([read_row(row, "here")], tokenizer)[0]


def scored_text(document: Document, tokenizer: PreTrainedTokenizerFast = TOKENIZER) -> str:
    kept = [i for i, scored in zip(document.ids, document.scored, strict=True) if scored]
    return str(tokenizer.decode(kept))


def test_plain_text_is_scored_completely_and_ends_with_eos() -> None:
    tokenized = document({"text": "The capital of France", "title": "x"})
    assert tokenized.ids == [*TOKENIZER("The capital of France")["input_ids"], 0]
    assert tokenized.scored == [True] * len(tokenized.ids)


@pytest.mark.parametrize(
    ("row", "full_text", "scored"),
    [
        ({"prompt": "Capital?", "completion": "Paris"}, "Capital? Paris", " Paris"),
        ({"prompt": "Capital?\n", "completion": "Paris"}, "Capital?\nParis", "Paris"),
        ({"prompt": "Capital?", "completion": " Paris"}, "Capital? Paris", " Paris"),
        ({"prompt": "", "completion": "Paris"}, "Paris", "Paris"),
        ({"question": "One and two?", "answer": "three 3"}, "One and two?\nthree 3", "three 3"),
        ({"prompt": "Größe", "completion": "12 µm"}, "Größe 12 µm", " 12 µm"),
    ],
)
def test_prompts_are_not_scored(row: dict[str, str], full_text: str, scored: str) -> None:
    tokenized = document(row)
    assert tokenized.ids == [*TOKENIZER(full_text)["input_ids"], 0]
    # A completion after a space: the space belongs to its first token, or is a token of its own.
    assert scored_text(tokenized).removesuffix(EOS).strip() == scored.strip()
    assert tokenized.scored[-1]
    assert scored_text(tokenized).endswith(EOS)
    assert tokenized.scored == sorted(tokenized.scored)  # False … True


def test_a_token_across_prompt_and_answer_is_scored() -> None:
    passage = Passage("The quick brown fox", prompt=len("The quick br"))
    joint = tokenize([passage], TOKENIZER)[0]
    assert joint.ids == [*TOKENIZER("The quick brown fox")["input_ids"], 0]
    assert scored_text(joint) == " brown fox" + EOS  # one token: " brown"


def test_without_offsets_the_common_prefix_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [
        {"prompt": "What is the capital of France?", "completion": "Paris."},
        {"question": "What is", "answer": "again 1 2"},
        {"text": "Hello there!"},
    ]
    passages = [read_row(row, "here") for row in rows]
    expected = tokenize(passages, TOKENIZER)
    monkeypatch.setattr(PreTrainedTokenizerFast, "is_fast", False)
    assert tokenize(passages, TOKENIZER) == expected


def test_tokenizer_that_adds_bos_and_eos_itself() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A <|endoftext|>",
        special_tokens=[("<|im_start|>", 2), ("<|endoftext|>", 0)],
    )
    plain = TOKENIZER("What is the answer")["input_ids"]
    tokenized = document({"prompt": "What is", "completion": "the answer"}, tokenizer)
    assert tokenized.ids == [2, *plain, 0]  # one end, not two
    assert tokenized.scored == [False, False, False] + [True] * (len(plain) - 2) + [True]
    plain_text = document({"text": "What is the answer"}, tokenizer)
    assert plain_text.ids == [2, *plain, 0]
    assert plain_text.scored == [False] + [True] * (len(plain) + 1)


TURNS = [
    {"role": "system", "content": "Paris and then 1"},
    {"role": "user", "content": "What is it?"},
    {"role": "assistant", "content": "The dog."},
    {"role": "user", "content": "Again The dog."},
    {"role": "assistant", "content": "A fox"},
]
RENDERED = (
    "<|im_start|>system\nParis and then 1<|im_end|>\n<|im_start|>user\nWhat is it?<|im_end|>\n"
    "<|im_start|>assistant\nThe dog.<|im_end|>\n<|im_start|>user\nAgain The dog.<|im_end|>\n"
    "<|im_start|>assistant\nA fox<|im_end|>\n"
)


@pytest.mark.parametrize("template", [PLAIN_TEMPLATE, GENERATION_TEMPLATE])
def test_only_the_assistant_is_scored(template: str) -> None:
    tokenizer = tiny_tokenizer(chat_template=template)
    tokenized = document({"messages": TURNS, "text": "not this"}, tokenizer)
    assert tokenized.ids == tokenizer(RENDERED)["input_ids"]
    assert scored_text(tokenized) == "The dog.<|im_end|>A fox<|im_end|>"


def test_generation_marks_of_a_template_decide_what_is_scored() -> None:
    template = GENERATION_TEMPLATE.replace(
        "{{ m['content'] }}<|im_end|>{% endgeneration %}",
        "{{ m['content'] }}{% endgeneration %}<|im_end|>",
    )
    tokenizer = tiny_tokenizer(chat_template=template)
    tokenized = document({"messages": TURNS}, tokenizer)
    assert tokenized.ids == tokenizer(RENDERED)["input_ids"]
    assert scored_text(tokenized) == "The dog.A fox"


def test_a_template_that_drops_earlier_thoughts_is_supported() -> None:
    template = PLAIN_TEMPLATE.replace(
        "{{ m['content'] }}",
        "{% if loop.last and m['role'] == 'assistant' %}<think></think>{% endif %}"
        "{{ m['content'].split('</think>')[-1] }}",
    )
    assert template != PLAIN_TEMPLATE
    tokenizer = tiny_tokenizer(chat_template=template)
    turns = [dict(turn) for turn in TURNS]
    turns[2]["content"] = "<think>so</think>The dog."
    tokenized = document({"messages": turns}, tokenizer)
    assert scored_text(tokenized) == "The dog.<|im_end|><think></think>A fox<|im_end|>"


def test_conversation_without_an_assistant_scores_nothing() -> None:
    assert not any(document({"messages": TURNS[:2]}).scored)


def test_templates_that_cannot_be_used_are_refused() -> None:
    with pytest.raises(UserError, match="has no chat template"):
        document({"messages": TURNS}, tiny_tokenizer(chat_template=None))
    strict = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    with pytest.raises(UserError, match=r"refuses turns by system, user.*no system"):
        document({"messages": TURNS}, tiny_tokenizer(chat_template=strict))
    shouting = PLAIN_TEMPLATE.replace("m['content']", "(m['content'] | upper if loop.last else '')")
    with pytest.raises(UserError, match="changes the text of the assistant"):
        document({"messages": TURNS}, tiny_tokenizer(chat_template=shouting))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"body": 1, "titel": 2}, "the row has the keys body, titel; it needs `text`"),
        ({}, "has the keys none"),
        ({"prompt": "only"}, "has the keys prompt;"),
        ({"text": None}, "`text` is null"),
        ({"question": "a", "answer": 4}, "`answer` is of type int"),
        ({"messages": "hello"}, "`messages` must be a list"),
        ({"messages": []}, "`messages` must be a list"),
        ({"messages": [{"from": "human"}]}, "`messages` must be a list"),
    ],
)
def test_rows_without_known_keys_are_refused(row: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=r"^a file, row 3: ") as caught:
        read_row(row, "a file, row 3")
    assert message in str(caught.value)


def test_long_text_is_cut_in_pieces_and_only_the_last_ends() -> None:
    text = "\n\n".join(f"Paragraph {n} " + "word " * 20 for n in range(50))
    cut = list(pieces(Passage(text), 1_000))
    assert [piece.ends for piece in cut] == [False] * (len(cut) - 1) + [True]
    assert re.sub(r"\s+", " ", " ".join(piece.text for piece in cut)) == re.sub(r"\s+", " ", text)
    ends = [tokenized.ids[-1] == 0 for tokenized in tokenize(cut, TOKENIZER)]
    assert ends == [piece.ends for piece in cut]
    with_prompt = Passage(text, prompt=5)
    assert list(pieces(with_prompt, 1_000)) == [with_prompt]
    assert list(pieces(Passage(text[:2_000]), 1_000)) == [Passage(text[:2_000])]


def test_splits_have_their_shares_and_do_not_change() -> None:
    data = DataConfig(sources=[SourceConfig(source="x")])
    splits = [split_of(f"document {n}", data) for n in range(20_000)]
    assert abs(splits.count("heldout") / 20_000 - 0.05) < 0.005
    assert abs(splits.count("calibration") / 20_000 - 0.15) < 0.008
    assert abs(splits.count("validation") / 20_000 - 0.05) < 0.005
    # Written down: a changed hash would put a user's training text into his held-out text.
    assert splits[:12] == FIRST
    other = data.model_copy(update={"seed": 1})
    assert [split_of(f"document {n}", other) for n in range(200)] != splits[:200]
    # A larger held-out share takes what it had and more.
    wider = data.model_copy(update={"heldout_fraction": 0.3})
    assert all(
        split_of(f"document {n}", wider) == "heldout"
        for n, split in enumerate(splits)
        if split == "heldout"
    )


FIRST = [
    "train",
    "calibration",
    "validation",
    "train",
    "train",
    "heldout",
    "train",
    "train",
    "train",
    "train",
    "train",
    "train",
]


def conversation(content: Any, **fields: Any) -> dict[str, Any]:
    turns = [{"role": "user", "content": content}, {"role": "assistant", "content": "A fox"}]
    return {"messages": [{**turns[0], **fields}, turns[1]]}


def test_text_parts_are_read_as_text() -> None:
    parts = [{"type": "text", "text": "What is"}, {"type": "text", "text": "it?"}]
    assert document(conversation(parts)) == document(conversation("What is\nit?"))
    assert document(conversation(parts[:1])) == document(conversation("What is"))
    assert document(conversation(["What is", "it?"])) == document(conversation("What is\nit?"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([{"type": "image", "url": "x.png"}], "has a part of type image"),
        ([{"type": "text", "text": "Who?"}, {"type": "image", "text": "x"}], "of type image"),
        ([7], "has a part of type int"),
        (7, "is of type int; it must be text"),
        ({"text": "x"}, "is of type dict; it must be text"),
    ],
)
def test_other_content_is_refused(content: Any, message: str) -> None:
    with pytest.raises(UserError, match=rf"^here: .*{message}"):
        read_row(conversation(content), "here")


def test_a_turn_that_only_calls_tools_is_rendered() -> None:
    calls = [{"type": "function", "function": {"name": "f", "arguments": {"city": "Paris"}}}]
    template = (
        "{% for m in messages %}{% if m.tool_calls %}<|im_start|>{{ m.tool_calls | tojson }}"
        "<|im_end|>{% else %}{{ m.content }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>{% endif %}"
    )
    tokenizer = tiny_tokenizer(chat_template=template)
    for content in ({"content": None}, {}):
        turns = [TURNS[1], {"role": "assistant", **content, "tool_calls": calls}]
        tokenized = document({"messages": turns}, tokenizer)
        assert '"city": "Paris"' in scored_text(tokenized, tokenizer)
    with pytest.raises(UserError, match="must be a list of objects with `role` and `content`"):
        read_row({"messages": [{"role": "user"}]}, "here")


def test_half_a_surrogate_pair_becomes_a_question_mark() -> None:
    assert read_row({"text": "a\ud800b"}, "here").text == "a?b"
    half = json.loads('"half \\ud83d of it"')
    assert document(conversation(half)) == document(conversation("half ? of it"))
    assert document({"text": half}) == document({"text": "half ? of it"})
    extra = {"tools": [{half: [half]}]}
    (turn, _) = read_row(conversation("Who?", **extra), "here").messages or []
    assert turn["tools"] == [{"half ? of it": ["half ? of it"]}]


def test_a_deep_turn_is_refused() -> None:
    deep: Any = "x"
    for _ in range(900):
        deep = [deep]
    with pytest.raises(UserError, match=r"^here: lists and objects are nested more than 64 deep"):
        read_row(conversation("Who?", tools=deep), "here")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "has no chat template"),
        ("{{ raise_exception('no system') }}", "refuses turns by user, assistant: no system"),
        ("{{ messages[0].content + 1 }}", "refuses turns by user, assistant: can only concatenate"),
        ("{{ messages[0].content.x.y }}", "refuses turns by user, assistant: .*no attribute"),
        (
            PLAIN_TEMPLATE.replace("m['content']", "(m['content'] | upper if loop.last else '')"),
            "changes the text of the assistant",
        ),
    ],
)
def test_refusals_name_the_row(template: str | None, message: str) -> None:
    tokenizer = tiny_tokenizer(chat_template=template)
    row = conversation("Who?")
    if message.startswith("changes"):
        row["messages"] += row["messages"]
    with pytest.raises(UserError, match=rf"^data\.jsonl, row 3: .*{message}"):
        tokenize([read_row(row, "data.jsonl, row 3")], tokenizer)
    if "raise" in str(template) or template is None:
        with pytest.raises(UserError, match=rf"^data\.jsonl, row 3: .*{message}"):
            chat_prompt_ids(row["messages"], tokenizer, "data.jsonl, row 3")
