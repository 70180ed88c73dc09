"""Answers from an OpenAI-compatible endpoint: requests, retries, and what is told of failures.

The API key is read from an environment variable. It is sent in a header, and is never written to a
file, to a message or into the manifest.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import threading
from dataclasses import dataclass
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import urlsplit

from regrow.data.prompts import Prompt
from regrow.errors import UserError
from regrow.stages.generate import GenerateConfig

FIRST_WAIT = 0.5
"""Seconds before the second attempt; every further wait is twice as long."""
LONGEST_WAIT = 60.0
"""The longest wait between two attempts, unless the server's Retry-After asks for more."""
LONGEST_RETRY_AFTER = 600.0
"""A longer Retry-After ends the run, which can be continued later."""
REFUSES_PROMPT = (400, 413, 422)
"""Status codes for one request that will never be answered, such as a prompt that is too long."""
REFUSES_ALL = (401, 402, 403, 404, 405)
"""Status codes for a wrong key, address or model: no other request would be answered."""


class UnansweredError(Exception):
    """No attempt gave an answer; `final` if a later run would get none either."""

    def __init__(self, reason: str, final: bool = False) -> None:
        super().__init__(reason)
        self.final = final


@dataclass(frozen=True)
class Reply:
    """An answer of the endpoint."""

    text: str
    finished: bool
    tokens: int
    """Tokens of the answer."""
    read: int
    """Tokens of the prompt."""
    scored: list[dict[str, Any]] | None
    """Each token with its log-probability and the most likely tokens, if these were asked for."""


class Endpoint:
    """Sends prompts to an OpenAI-compatible server; can be used by several threads."""

    def __init__(self, config: GenerateConfig) -> None:
        import httpx2

        assert config.endpoint is not None
        self.config, self.url = config, check_url(config.endpoint)
        self.key = os.environ.get(config.api_key_variable, "")
        headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        self.client = httpx2.Client(
            headers=headers,
            timeout=httpx2.Timeout(config.request_timeout, connect=min(30, config.request_timeout)),
            limits=httpx2.Limits(max_connections=None),
            mounts={"all://127.0.0.1": None},  # no proxy reaches this machine's own address
        )
        self.stopped = threading.Event()
        try:
            self.model = config.served_model or self._only_model()
        except UserError:
            self.close()
            raise

    def close(self) -> None:
        """End waits between attempts, and close the connections."""
        self.stopped.set()
        self.client.close()

    def answer(self, prompt: Prompt) -> Reply:
        """Ask for an answer, again if need be.

        Raises UnansweredError if no attempt gave one, and UserError for a wrong key, address or
        model.
        """
        path, body = self._request(prompt)
        return self._ask(path, body, chat=prompt.messages is not None)

    def _request(self, prompt: Prompt) -> tuple[str, dict[str, Any]]:
        config = self.config
        digest = hashlib.sha256(f"{config.seed}/{prompt.key}".encode()).digest()
        body: dict[str, Any] = {
            "model": self.model,
            "max_tokens": config.max_new_tokens,
            "temperature": 0.0 if config.greedy else config.temperature,
            "top_p": 1.0 if config.greedy else config.top_p,
            "seed": int.from_bytes(digest[:4], "big") >> 1,
        }
        top = config.top_logprobs
        if prompt.messages is None:
            return "/completions", {
                **body,
                "prompt": prompt.text,
                **({"logprobs": top} if top else {}),
            }
        asked = {"logprobs": True, "top_logprobs": top} if top else {}
        return "/chat/completions", {**body, "messages": prompt.messages, **asked}

    def _ask(self, path: str, body: dict[str, Any] | None, chat: bool = True) -> Any:
        """POST `body`, or GET without one; returns a Reply, or the JSON of a GET."""
        import httpx2

        reason = ""
        for attempt in range(self.config.max_attempts):
            wait = min(LONGEST_WAIT, FIRST_WAIT * 2**attempt) * (1 + random.random() / 4)
            try:
                if body is None:
                    response = self.client.get(self.url + path)
                else:
                    response = self.client.post(self.url + path, json=body)
            except httpx2.TimeoutException:
                reason = f"no response within {self.config.request_timeout:g} s"
            except httpx2.InvalidURL as error:
                raise UserError(f"endpoint {self.url}: {error}") from None
            except httpx2.HTTPError as error:
                reason = f"the connection failed ({self._safe(str(error) or type(error).__name__)})"
            else:
                status = response.status_code
                if status == 200:
                    try:
                        found = json.loads(response.content)
                        return found if body is None else self._read(found, chat)
                    except UserError:  # which is a ValueError
                        raise
                    except (ValueError, LookupError, TypeError, AttributeError) as error:
                        said = self._safe(repr(error))
                        reason = f"the response is not what OpenAI's interface defines ({said})"
                else:
                    reason = self._status(response)
                    wait = max(wait, retry_after(response.headers.get("retry-after")))
            if wait > LONGEST_RETRY_AFTER:
                raise UserError(
                    f"endpoint {self.url}: {reason}, and asks to wait {wait:.0f} s: run the same "
                    "command again later, it continues"
                )
            if attempt + 1 < self.config.max_attempts and self.stopped.wait(wait):
                break
        raise UnansweredError(reason)

    def _status(self, response: Any) -> str:
        """What a status means; raises for one that no further attempt would change."""
        status = response.status_code
        said = f"status {status}: {self._said(response)}"
        if status in REFUSES_ALL or 300 <= status < 400:
            hint = "check the address, which usually ends in /v1, and served_model"
            if status in (401, 403):
                hint = f"check the key in the variable {self.config.api_key_variable}"
            raise UserError(f"endpoint {self.url}: {said}; {hint}")
        if status in REFUSES_PROMPT:
            raise UnansweredError(said, final=True)
        return said

    def _said(self, response: Any) -> str:
        """The server's own words, on one line and without the key."""
        try:
            found = json.loads(response.content)
            error = found.get("error", found) if isinstance(found, dict) else found
            text = str(error.get("message", error) if isinstance(error, dict) else error)
        except ValueError:
            text = response.content[:400].decode("utf-8", "replace")
        return self._safe(text)

    def _safe(self, text: str) -> str:
        text = " ".join(text.split())[:200]
        return text.replace(self.key, "***") if self.key else text

    def _read(self, found: dict[str, Any], chat: bool) -> Reply:
        choice = found["choices"][0]
        text = choice["message"]["content"] if chat else choice["text"]
        if not isinstance(text, str):
            raise TypeError("the answer has no text")
        usage = found.get("usage") or {}
        scored = None
        if self.config.top_logprobs:
            scored = self._scored(choice, chat)
        return Reply(
            text,
            choice.get("finish_reason") == "stop",
            int(usage.get("completion_tokens", 0)),
            int(usage.get("prompt_tokens", 0)),
            scored,
        )

    def _scored(self, choice: dict[str, Any], chat: bool) -> list[dict[str, Any]]:
        given = choice.get("logprobs") or {}
        if chat and given.get("content"):
            return [
                scored_token(
                    each["token"],
                    each["logprob"],
                    [(top["token"], top["logprob"]) for top in each["top_logprobs"]],
                )
                for each in given["content"]
            ]
        if not chat and given.get("tokens"):
            columns = zip(
                given["tokens"], given["token_logprobs"], given["top_logprobs"], strict=True
            )
            return [
                scored_token(token, own, list((top or {}).items())) for token, own, top in columns
            ]
        raise UserError(
            f"endpoint {self.url}: the answer has no top log-probabilities: set top_logprobs to "
            "0, or use a server that gives them, such as vLLM"
        )

    def _only_model(self) -> str:
        """The one model that the server has; raises UserError for none or several."""
        try:
            found = self._ask("/models", None)
            names = [str(each["id"]) for each in found["data"]]
        except UnansweredError as error:
            raise UserError(f"endpoint {self.url}: {error}; is the server running?") from None
        except (LookupError, TypeError, AttributeError):
            names = []
        if len(names) != 1:
            some = ", ".join(names[:5]) or "none"
            raise UserError(f"endpoint {self.url}: give served_model; it lists {some}")
        return names[0]


def scored_token(token: str, logprob: float, top: list[tuple[str, float]]) -> dict[str, Any]:
    """A token of an answer, in the form of the file of log-probabilities."""
    ordered = sorted(top, key=lambda pair: -pair[1])
    return {"token": token, "logprob": logprob, "top": [list(pair) for pair in ordered]}


def check_key_variable(name: str) -> None:
    """Raise UserError for a name that no variable has; it is not repeated, as it may be the key."""
    default = GenerateConfig.model_fields["api_key_variable"].default
    if name != default and name not in os.environ:
        raise UserError(
            "api_key_variable: the environment has no variable of the name given (not shown here, "
            f"as it may be the key itself): give the variable's name, such as {default}"
        )


def check_url(url: str) -> str:
    """The address without a slash at its end; raises UserError for what is none, or has a key."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UserError(
            f"endpoint {url!r} is no address: give one such as http://127.0.0.1:8000/v1"
        )
    if parts.username or parts.password or parts.query or parts.fragment:
        raise UserError(
            "endpoint: the address has a user name, a password or a query, which would be written "
            "to files: put a key into the environment variable of api_key_variable"
        )
    return url.rstrip("/")


def retry_after(header: str | None) -> float:
    """Seconds of a Retry-After header, which is a number or a date; 0 without one."""
    if header is None:
        return 0.0
    try:
        return max(0.0, float(header))
    except ValueError:
        pass
    try:
        date = parsedate_to_datetime(header)
    except ValueError:
        return 0.0
    if date.tzinfo is None:
        date = date.replace(tzinfo=timezone.utc)
    return max(0.0, (date - datetime.now(timezone.utc)).total_seconds())
