"""Ollama's Modelfile: the file, the chat template in Ollama's language, parameters."""

from __future__ import annotations

import json
from typing import Any

from regrow.stages.export import chat, limits, tokenizer
from regrow.stages.export.writer import Source

MOST_CONTEXT = 8192
"""Ollama reserves memory for the whole context: a longer one is left for the user to ask for."""
SAMPLING = ("temperature", "top_p", "top_k", "repetition_penalty")


def text(source: Source, file: str) -> str:
    """The Modelfile for a GGUF file that lies beside it."""
    checkpoint = source.checkpoint
    parts = [f"FROM ./{file}"]
    own: Any = checkpoint.tokenizer()
    pieces = chat.pieces_of(own)
    if pieces is not None:
        parts.append(f'TEMPLATE """{pieces.go()}"""')
    elif own.chat_template:
        parts.append(
            "# The chat template does more than put text around messages, which is all that is\n"
            "# translated here; Ollama takes the one in the GGUF file if it knows it."
        )
    longest = limits.context(source.config, str(source.family.gguf))[0]
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


def _sampling(source: Source) -> list[str]:
    path = source.checkpoint.folder / "generation_config.json"
    given = json.loads(path.read_text()) if path.exists() else {}
    if not given.get("do_sample"):
        return []
    names = {"repetition_penalty": "repeat_penalty"}
    found = {key: given[key] for key in SAMPLING if given.get(key) is not None}
    return [f"PARAMETER {names.get(key, key)} {value}" for key, value in found.items()]
