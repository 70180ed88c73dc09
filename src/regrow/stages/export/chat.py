"""Writes Ollama's Modelfile, with the chat template translated to Ollama's language.

Ollama's templates are Go templates, not Jinja. Most chat templates only put fixed text around each
message. This module extracts these pieces of text by rendering the tokenizer's own template on
artificial messages, and keeps them only if they produce the same text on other conversations.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError

from regrow.stages.export import hyperparameters, tokenizer
from regrow.stages.export.tensors import ExportSource

MODELFILE = "Modelfile"
Message = dict[str, str]
SYSTEM, USER, ANSWER, AGAIN = "Ⓢsystem", "Ⓤuser", "Ⓐanswer", "Ⓥagain"


@dataclass(frozen=True)
class TemplatePieces:
    """The fixed text around the messages of a conversation."""

    default: str
    """Text at the beginning of a conversation without a system message."""
    system: tuple[str, str] | None
    user: tuple[str, str]
    """Text before and after a user's message; the second part ends where the answer begins."""
    answer: str
    """Text after an answer."""

    def render(self, messages: list[Message]) -> str:
        """Render a conversation that ends with a user's message."""
        text = "" if messages[0]["role"] == "system" else self.default
        for message in messages:
            before, after = self._around(message["role"])
            text += before + message["content"] + after
        return text

    def _around(self, role: str) -> tuple[str, str]:
        return {"system": self.system or ("", ""), "user": self.user}.get(role, ("", self.answer))

    def go(self) -> str:
        """The pieces as a Go template for Ollama."""
        first = ""
        if self.default:
            first = '{{ if ne (index .Messages 0).Role "system" }}' + self.default + "{{ end }}"
        body = ""
        for number, role in enumerate(("system", "user", "assistant")):
            before, after = self._around(role)
            word = "if" if number == 0 else "else if"
            body += f'{{{{ {word} eq .Role "{role}" }}}}{before}{{{{ .Content }}}}{after}'
        return f"{first}{{{{ range .Messages }}}}{body}{{{{ end }}}}{{{{ end }}}}"


def pieces_of(tokenizer: Any) -> TemplatePieces | None:
    """The pieces of a tokenizer's chat template.

    Returns None when there is no template or when it does more than put fixed text around messages.
    A leading BOS is left out: llama.cpp adds it where the tokenizer does.
    """
    if not tokenizer.chat_template:
        return None
    try:
        found = _pieces(tokenizer)
        if found is None:
            return None
        for messages in _conversations(found.system is not None):
            if found.render(messages) != _render(tokenizer, messages):
                return None
    except (TemplateError, ValueError, TypeError, KeyError):
        return None
    bad = ("{{", '"""')  # would end the template or the string that contains it
    return None if any(mark in text for text in _texts(found) for mark in bad) else found


def _pieces(tokenizer: Any) -> TemplatePieces | None:
    talk = [_said("user", USER), _said("assistant", ANSWER), _said("user", AGAIN)]
    text = _render(tokenizer, talk)
    if not all(mark in text for mark in (USER, ANSWER, AGAIN)):
        return None
    start, between = text.split(USER)
    after_user, between = between.split(ANSWER)
    after_answer, tail = between.split(AGAIN)
    if after_user != tail:
        return None
    opening, system = _opening(tokenizer, start, after_answer)
    return TemplatePieces(
        default=start.removesuffix(opening),
        system=system,
        user=(opening, tail),
        answer=after_answer.removesuffix(opening),
    )


def _opening(tokenizer: Any, start: str, later: str) -> tuple[str, tuple[str, str] | None]:
    """The text before every user's message, and the text around a system message, if supported."""
    opening = _after_end(_common_end(start, later), tokenizer.eos_token)
    try:
        text = _render(tokenizer, [_said("system", SYSTEM), _said("user", USER)])
    except (TemplateError, ValueError, TypeError):
        return opening, None
    if SYSTEM not in text:
        return opening, None
    before, rest = text.split(SYSTEM)
    middle = rest.split(USER)[0]
    opening = _common_end(opening, middle)
    return opening, (before, middle.removesuffix(opening))


def _after_end(text: str, mark: str | None) -> str:
    """The text after the token that ends a message, and after the line break that follows it."""
    if not mark or mark not in text:
        return text
    return text.rpartition(mark)[2].removeprefix("\n")


def _common_end(one: str, other: str) -> str:
    size = 0
    while size < min(len(one), len(other)) and one[-size - 1] == other[-size - 1]:
        size += 1
    return one[len(one) - size :]


def _conversations(with_system: bool) -> list[list[Message]]:
    talk = [_said("user", "How many?"), _said("assistant", "Three."), _said("user", "Which?")]
    every = [talk[:1], talk, [*talk, _said("assistant", "Those."), _said("user", "Why?")]]
    system = _said("system", "Be brief.")
    return every + ([[system, *some] for some in every] if with_system else [])


def _render(tokenizer: Any, messages: list[Message]) -> str:
    text: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return text.removeprefix(tokenizer.bos_token) if _adds_bos(tokenizer) else text


def _adds_bos(tokenizer: Any) -> bool:
    bos = tokenizer.bos_token_id
    return bos is not None and tokenizer("a")["input_ids"][:1] == [bos]


def _said(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _texts(found: TemplatePieces) -> list[str]:
    return [found.default, *(found.system or ()), *found.user, found.answer]


MOST_CONTEXT = 8192
"""Largest default context: Ollama reserves memory for all of it; the user can set a longer one."""
SAMPLING = ("temperature", "top_p", "top_k", "repetition_penalty")


def text(source: ExportSource, file: str) -> str:
    """The Modelfile for the GGUF file `file` in the same folder."""
    checkpoint = source.checkpoint
    parts = [f"FROM ./{file}"]
    own: Any = checkpoint.tokenizer()
    pieces = pieces_of(own)
    if pieces is not None:
        parts.append(f'TEMPLATE """{pieces.go()}"""')
    elif own.chat_template:
        parts.append(
            "# The chat template does more than put text around messages, which is all that is\n"
            "# translated here; Ollama takes the one in the GGUF file if it knows it."
        )
    longest = hyperparameters.context(source.config, str(source.family.gguf))[0]
    if longest > MOST_CONTEXT:
        parts.append(f"# The model takes {longest}; each position costs memory.")
    parts.append(f"PARAMETER num_ctx {min(longest, MOST_CONTEXT)}")
    tokens = source.vocabulary.tokens
    kinds = source.vocabulary.kinds
    for number in tokenizer.end_ids(checkpoint):
        if number < len(tokens) and kinds[number] == tokenizer.CONTROL:
            parts.append(f"PARAMETER stop {json.dumps(tokens[number], ensure_ascii=False)}")
    parts += _sampling(source)
    return "\n".join(parts) + "\n"


def _sampling(source: ExportSource) -> list[str]:
    path = source.checkpoint.folder / "generation_config.json"
    given = json.loads(path.read_text()) if path.exists() else {}
    if not given.get("do_sample"):
        return []
    names = {"repetition_penalty": "repeat_penalty"}
    found = {key: given[key] for key in SAMPLING if given.get(key) is not None}
    return [f"PARAMETER {names.get(key, key)} {value}" for key, value in found.items()]
