"""Answers from an OpenAI-compatible server: a real one on this machine, which may misbehave."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from test_generate import PROMPTS, rows_of, write_rows
from tiny_folders import data_of, write_model
from tiny_job import refused

from regrow.config import Options
from regrow.data import DataConfig
from regrow.errors import UserError
from regrow.stage_dir import read as read_manifest
from regrow.stages.generate import GenerateConfig, endpoint
from regrow.stages.generate.stage import generate
from regrow.training.answer_targets import TOP_LOGPROBS

KEY = "sk-very-secret-0123456789"
OPTIONS = Options(device="cpu", batch_size=4)


class Server(ThreadingHTTPServer):
    """Answers a prompt with `You said: PROMPT`; `plan` may replace a response by its number."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: list[dict[str, Any]] = []
        self.times: list[float] = []
        self.keys: set[str | None] = set()
        self.plan: Callable[[int, dict[str, Any]], Any] = lambda number, body: None
        self.models, self.logprobs, self.running, self.most = ["tiny"], True, 0, 0
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


class Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        if "Content-Length" not in (headers or {}):
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        models = {"data": [{"id": name} for name in self.server.models]}
        self.send(200, json.dumps(models).encode())

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server = self.server
        with server.lock:
            server.asked.append({**body, "path": self.path})
            server.times.append(time.monotonic())
            server.keys.add(self.headers.get("Authorization"))
            number = len(server.asked)
            server.running += 1
            server.most = max(server.most, server.running)
        try:
            planned = server.plan(number, body)
            if planned is None:
                self.send(200, json.dumps(good(body, server.logprobs)).encode())
            elif planned == "hang":
                time.sleep(1.5)
            elif planned == "cut":
                self.send(200, b'{"choices": [', {"Content-Length": "900"})
                self.close_connection = True
            else:
                self.send(*planned)
        finally:
            with server.lock:
                server.running -= 1


def good(body: dict[str, Any], logprobs: bool, reason: str = "stop") -> dict[str, Any]:
    chat = "messages" in body
    said = body["messages"][-1]["content"] if chat else body["prompt"]
    text = f"You said: {said}"
    choice: dict[str, Any] = {"index": 0, "finish_reason": reason}
    choice |= {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
    if logprobs and body.get("logprobs"):
        top = [{"token": "No", "logprob": -2.5}, {"token": "You", "logprob": -0.25}]
        if chat:
            choice["logprobs"] = {"content": [{**top[1], "top_logprobs": top}]}
        else:
            rows = {"tokens": ["You"], "token_logprobs": [-0.25]}
            choice["logprobs"] = {**rows, "top_logprobs": [{"No": -2.5, "You": -0.25}]}
    return {"choices": [choice], "usage": {"completion_tokens": 7, "prompt_tokens": 3}}


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(endpoint, "FIRST_WAIT", 0.01)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    server = Server()
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("endpoint")
    write_model(place / "model", num_hidden_layers=1, hidden_size=24)
    write_rows(place / "prompts.jsonl", [{"prompt": p} for p in PROMPTS])
    return place


def config(server: Server, **fields: Any) -> GenerateConfig:
    given = {"endpoint": server.url, "split": "all", "max_new_tokens": 50, "max_attempts": 3}
    return GenerateConfig(**{**given, "request_timeout": 5.0, **fields})


def data(place: Path) -> DataConfig:
    return data_of(place / "prompts.jsonl")


def test_answers_in_order_with_what_was_asked(server: Server, place: Path, tmp_path: Path) -> None:
    """Prompts as turns, sampling settings, several at once; nothing holds the key."""
    server.plan = lambda number, body: time.sleep(0.02 * (number % 3))
    fields = {"temperature": 0.7, "top_p": 0.9, "top_logprobs": 2, "licence": "mit"}
    out = generate(
        place / "model", data(place), tmp_path / "out", config(server, **fields), OPTIONS
    )
    found = rows_of(out)
    assert [row["messages"][0]["content"] for row in found] == PROMPTS
    said = [row["messages"][1]["content"] for row in found]
    assert said == [f"You said: {p}" for p in PROMPTS]
    assert len(server.asked) == 9
    assert 1 < server.most <= 4
    assert server.keys == {f"Bearer {KEY}"}
    assert len({body["seed"] for body in server.asked}) == 9
    for body in server.asked:
        assert body["path"] == "/v1/chat/completions"
        assert (body["model"], body["max_tokens"], body["temperature"]) == ("tiny", 50, 0.7)
        assert (body["top_p"], body["logprobs"], body["top_logprobs"]) == (0.9, True, 2)
    kept = [json.loads(line) for line in (out / TOP_LOGPROBS).read_text().splitlines()]
    assert [row["id"] for row in kept] == [row["id"] for row in found]
    top = {"token": "You", "logprob": -0.25, "top": [["You", -0.25], ["No", -2.5]]}
    assert all(row["tokens"] == [top] for row in kept)
    manifest = read_manifest(out)
    assert manifest is not None
    served = {"endpoint": server.url, "model": "tiny", "licence": "mit (given)"}
    assert manifest["answered_by"] == served
    figures = {each["name"]: each["value"] for each in manifest["figures"]}
    assert (figures["tokens"], figures["prompt tokens"]) == (63, 27)
    assert KEY not in "".join(path.read_text() for path in out.iterdir())
    generate(place / "model", data(place), out, config(server, **fields), OPTIONS)
    assert len(server.asked) == 9  # complete: nothing was asked again


def test_without_a_template_prompts_are_continued(
    server: Server, place: Path, tmp_path: Path
) -> None:
    write_model(tmp_path / "base", num_hidden_layers=1, hidden_size=24)
    (tmp_path / "base" / "chat_template.jinja").unlink()
    fields = {"top_logprobs": 2, "limit": 2, "greedy": True}
    out = generate(
        tmp_path / "base", data(place), tmp_path / "out", config(server, **fields), OPTIONS
    )
    assert [row["completion"] for row in rows_of(out)] == [f"You said: {p}\n" for p in PROMPTS[:2]]
    assert {body["path"] for body in server.asked} == {"/v1/completions"}
    assert all((body["logprobs"], body["temperature"]) == (2, 0.0) for body in server.asked)
    (top,) = json.loads((out / TOP_LOGPROBS).read_text().splitlines()[0])["tokens"]
    assert top == {"token": "You", "logprob": -0.25, "top": [["You", -0.25], ["No", -2.5]]}


JUNK = [
    (200, b"<html>proxy</html>"),
    (200, b'{"choices": []}'),
    (200, b'{"choices": [{"message": {"content": null}}]}'),
    (200, b"[1, 2]"),
    (503, b"busy"),
    "cut",
    "hang",
    (429, b'{"error": {"message": "slow down"}}', {"Retry-After": "0"}),
]


@pytest.mark.parametrize("planned", JUNK, ids=[str(junk)[:24] for junk in JUNK])
def test_a_request_that_failed_is_sent_again(
    server: Server, place: Path, tmp_path: Path, planned: Any
) -> None:
    """Each prompt's first attempt fails in this way, and the second one does not."""
    first: Counter[str] = Counter()

    def plan(number: int, body: dict[str, Any]) -> Any:
        said = body["messages"][-1]["content"]
        first[said] += 1
        return planned if first[said] == 1 else None

    server.plan = plan
    asked = config(server, limit=3, request_timeout=0.5)
    out = generate(place / "model", data(place), tmp_path / "out", asked, OPTIONS)
    said = [row["messages"][1]["content"] for row in rows_of(out)]
    assert said == [f"You said: {p}" for p in PROMPTS[:3]]
    assert len(server.asked) == 6


@pytest.mark.parametrize("kind", ["seconds", "date"])
def test_retry_after_is_waited_for(server: Server, place: Path, tmp_path: Path, kind: str) -> None:
    def plan(number: int, body: Any) -> Any:
        after = "1" if kind == "seconds" else formatdate(time.time() + 2, usegmt=True)
        return (429, b"{}", {"Retry-After": after}) if number == 1 else None

    server.plan = plan
    asked = config(server, limit=1)
    generate(place / "model", data(place), tmp_path / "out", asked, OPTIONS)
    assert server.times[1] - server.times[0] >= 0.95


def test_what_was_answered_is_kept_when_the_server_breaks(
    server: Server, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """After five answers it gives errors; the same command asks only for the rest."""
    server.plan = lambda number, body: (500, b'{"error": "out of order"}') if number > 5 else None
    given = (
        place / "model",
        data(place),
        tmp_path / "out",
        config(server, max_attempts=2),
        OPTIONS,
    )
    with pytest.raises(UserError, match=r"4 of 9 prompts got no answer.*out of order.*run the"):
        generate(*given)
    assert not (tmp_path / "out").exists()
    server.asked.clear()
    server.plan = lambda number, body: None
    assert len(rows_of(generate(*given))) == 9
    assert len(server.asked) == 4


def test_a_server_that_answers_nothing_is_given_up_early(
    server: Server, place: Path, tmp_path: Path
) -> None:
    write_rows(tmp_path / "many.jsonl", [{"prompt": f"Say {n}."} for n in range(60)])
    server.plan = lambda number, body: (500, b"no")
    with pytest.raises(UserError, match="12 prompts in a row"):
        generate(
            place / "model",
            data_of(tmp_path / "many.jsonl"),
            tmp_path / "out",
            config(server, max_attempts=1),
            OPTIONS,
        )
    assert len(server.asked) < 30


def test_truncated_and_refused_prompts_are_left_out_and_counted(
    server: Server, place: Path, tmp_path: Path
) -> None:
    """An answer that the limit cut off, and a prompt that is too long for the server."""

    def plan(number: int, body: Any) -> Any:
        said = body["messages"][-1]["content"]
        if said == PROMPTS[1]:
            return (200, json.dumps(good(body, True, "length")).encode())
        if said == PROMPTS[2]:
            return (400, b'{"error": {"message": "maximum context length is 8"}}')
        return None

    server.plan = plan
    out = generate(place / "model", data(place), tmp_path / "out", config(server), OPTIONS)
    kept = [row["messages"][0]["content"] for row in rows_of(out)]
    assert kept == [p for n, p in enumerate(PROMPTS) if n not in (1, 2)]
    manifest = read_manifest(out)
    assert manifest is not None
    assert manifest["left_out"] == {"unfinished": 1, "refused by the endpoint": 1}
    assert len(server.asked) == 9  # neither was asked again


def test_junk_that_has_the_key_is_told_without_it(
    server: Server, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A server that sends the key back where a number should be."""

    def plan(number: int, body: dict[str, Any]) -> Any:
        row = {**good(body, True), "usage": {"completion_tokens": KEY}}
        return (200, json.dumps(row).encode())

    server.plan = plan
    asked = config(server, limit=1, max_attempts=1)
    with pytest.raises(UserError, match=r"interface defines \(.*\*\*\*") as error:
        generate(place / "model", data(place), tmp_path / "out", asked, OPTIONS)
    assert KEY not in str(error.value)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert KEY not in "".join(path.read_text() for path in files) + capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "plan", "told"),
    [
        ({}, (401, b'{"error": {"message": "wrong key KEY"}}'), "check the key in the variable"),
        ({}, (404, b"nothing here"), "usually ends in /v1"),
        ({"top_logprobs": 3}, None, "no top log-probabilities"),
        ({"models": ["a", "b"]}, None, "give served_model; it lists a, b"),
        ({}, (429, b"{}", {"Retry-After": "7200"}), "asks to wait 7200 s"),
    ],
)
def test_what_no_attempt_would_change_is_told_at_once(
    server: Server,
    place: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    change: dict[str, Any],
    plan: Any,
    told: str,
) -> None:
    change = dict(change)
    server.logprobs, server.models = False, change.pop("models", ["tiny"])
    if plan is not None:
        plan = (plan[0], plan[1].replace(b"KEY", KEY.encode()), *plan[2:])
    server.plan = lambda number, body: plan
    flags = [
        part for key, value in change.items() for part in (f"--{key.replace('_', '-')}", value)
    ]
    given = ["generate", place / "model", "--data", place / "prompts.jsonl", "--split", "all"]
    said = refused(
        capsys,
        *(*given, "--endpoint", server.url, "--out", tmp_path / "out", *flags),
        at_once=False,
    )
    assert told in said
    assert KEY not in said
    assert len(server.asked) <= 5


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--endpoint", "127.0.0.1:8000"], "is no address"),
        (["--endpoint", "http://me:secret@host/v1"], "api_key_variable"),
        (["--endpoint", "http://127.0.0.1:9/v1", "--self-prompts", 3], "give one of them"),
        (["--served-model", "x"], "give the endpoint that serves it"),
        (
            ["--endpoint", "http://127.0.0.1:9/v1", "--api-key-variable", "sk_secret_key"],
            "the environment has no variable of the name given",
        ),
        (["--licence", "llama3"], "set accept_licence"),
    ],
)
def test_bad_flags_are_refused(
    place: Path, tmp_path: Path, flags: Any, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["generate", place / "model", "--data", place / "prompts.jsonl", "--split", "all"]
    said = refused(capsys, *given, *flags, "--out", tmp_path / "out")
    assert told in said
    assert "secret" not in said


def test_a_server_that_is_not_there(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(endpoint, "FIRST_WAIT", 0.01)
    asked = GenerateConfig(endpoint="http://127.0.0.1:9/v1", split="all", max_attempts=2)
    with pytest.raises(UserError, match="is the server running"):
        generate(place / "model", data(place), tmp_path / "out", asked, OPTIONS)
