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
            before, after = self._text_around(message["role"])
            text += before + message["content"] + after
        return text

    def _text_around(self, role: str) -> tuple[str, str]:
        return {"system": self.system or ("", ""), "user": self.user}.get(role, ("", self.answer))

    def go(self) -> str:
        """The pieces as a Go template for Ollama."""
        first = ""
        if self.default:
            first = '{{ if ne (index .Messages 0).Role "system" }}' + self.default + "{{ end }}"
        body = ""
        for number, role in enumerate(("system", "user", "assistant")):
            before, after = self._text_around(role)
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
        pieces = _pieces(tokenizer)
        if pieces is None:
            return None
        for messages in _conversations(pieces.system is not None):
            if pieces.render(messages) != _render(tokenizer, messages):
                return None
    except (TemplateError, ValueError, TypeError, KeyError):
        return None
    bad = ("{{", '"""')  # would end the template or the string that contains it
    return None if any(mark in text for text in _texts(pieces) for mark in bad) else pieces


def _pieces(tokenizer: Any) -> TemplatePieces | None:
    talk = [_message("user", USER), _message("assistant", ANSWER), _message("user", AGAIN)]
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
        text = _render(tokenizer, [_message("system", SYSTEM), _message("user", USER)])
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


def _common_end(first: str, second: str) -> str:
    size = 0
    while size < min(len(first), len(second)) and first[-size - 1] == second[-size - 1]:
        size += 1
    return first[len(first) - size :]


def _conversations(with_system: bool) -> list[list[Message]]:
    talk = [
        _message("user", "How many?"),
        _message("assistant", "Three."),
        _message("user", "Which?"),
    ]
    conversations = [
        talk[:1],
        talk,
        [*talk, _message("assistant", "Those."), _message("user", "Why?")],
    ]
    system = _message("system", "Be brief.")
    return conversations + (
        [[system, *messages] for messages in conversations] if with_system else []
    )


def _render(tokenizer: Any, messages: list[Message]) -> str:
    text: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return text.removeprefix(tokenizer.bos_token) if _adds_bos(tokenizer) else text


def _adds_bos(tokenizer: Any) -> bool:
    bos = tokenizer.bos_token_id
    return bos is not None and tokenizer("a")["input_ids"][:1] == [bos]


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _texts(pieces: TemplatePieces) -> list[str]:
    return [pieces.default, *(pieces.system or ()), *pieces.user, pieces.answer]


MOST_CONTEXT = 8192
"""Largest default context: Ollama reserves memory for all of it; the user can set a longer one."""
SAMPLING = ("temperature", "top_p", "top_k", "repetition_penalty")


def text(source: ExportSource, file: str) -> str:
    """The Modelfile for the GGUF file `file` in the same folder."""
    checkpoint = source.checkpoint
    parts = [f"FROM ./{file}"]
    hf_tokenizer: Any = checkpoint.tokenizer()
    pieces = pieces_of(hf_tokenizer)
    if pieces is not None:
        parts.append(f'TEMPLATE """{pieces.go()}"""')
    elif hf_tokenizer.chat_template:
        parts.append(
            "# The chat template does more than put fixed text around messages: not translated.\n"
            "# Ollama uses the template in the GGUF file, if it supports that."
        )
    longest = hyperparameters.context(source.config, str(source.family.gguf))[0]
    if longest > MOST_CONTEXT:
        parts.append(f"# The model supports {longest} positions; each one costs memory.")
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
    generation_config = json.loads(path.read_text()) if path.exists() else {}
    if not generation_config.get("do_sample"):
        return []
    names = {"repetition_penalty": "repeat_penalty"}
    parameters = {
        key: generation_config[key] for key in SAMPLING if generation_config.get(key) is not None
    }
    return [f"PARAMETER {names.get(key, key)} {value}" for key, value in parameters.items()]
