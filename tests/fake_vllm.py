"""A package `vllm` whose server has a tiny model of its own: vLLM's interface, without vLLM.

What it does wrong is told by the environment variable FAKE_VLLM.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

SERVER = """
import argparse, json, os, subprocess, sys, threading, time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

FAULT = os.environ.get("FAKE_VLLM", "")
parser = argparse.ArgumentParser()
for name in ("model", "host", "port", "dtype", "generation-config", "max-model-len", "note"):
    parser.add_argument(f"--{name}")
parser.add_argument("--enforce-eager", action="store_true")
given = parser.parse_args()
print("a first line", flush=True)
if FAULT == "dies":
    print("(EngineCore pid=7) ERROR 11-29 15:41:50 [core.py:1] ValueError: too few bytes for it")
    print("RuntimeError: Engine core initialization failed. See root cause above.", flush=True)
    sys.exit(1)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
with open(os.environ["FAKE_VLLM_LOG"], "a") as file:
    file.write(json.dumps({"pids": [os.getpid(), child.pid], "given": vars(given)}) + "\\n")
if FAULT == "never":
    time.sleep(600)
lock, loaded = threading.Lock(), []


def load():
    with lock:
        if not loaded:
            from transformers import AutoModelForCausalLM, AutoTokenizer
            model = AutoModelForCausalLM.from_pretrained(given.model, dtype=given.dtype)
            loaded.extend([model, AutoTokenizer.from_pretrained(given.model)])
    return loaded


def log_p(model, ids):
    import torch
    with lock, torch.no_grad():
        return model(torch.tensor([ids])).logits[0].log_softmax(-1)


def answer(body):
    model, tokenizer = load()
    if "messages" in body:
        turns = body["messages"]
        ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True)["input_ids"]
    else:
        ids = body["prompt"]
        ids = tokenizer(ids)["input_ids"] if isinstance(ids, str) else ids
    rows, new = None, []
    if body.get("prompt_logprobs") is not None:
        rows = [None]
        for row, token in zip(log_p(model, ids), ids[1:]):
            best = int(row.argmax())
            rows.append({str(i): {"logprob": float(row[i])} for i in (token, best)})
    stopped = False
    while len(new) < body["max_tokens"] and not stopped:
        new.append(int(log_p(model, ids + new)[-1].argmax()))
        text = tokenizer.decode(new, skip_special_tokens=True)
        ended = new[-1] == tokenizer.eos_token_id
        stopped = ended or any(stop in text for stop in body.get("stop", ()))
    reason = "stop" if stopped else "length"
    choice = {"index": 0, "finish_reason": reason, "token_ids": new, "prompt_logprobs": rows}
    choice |= {"message": {"content": text}} if "messages" in body else {"text": text}
    usage = {"completion_tokens": len(new), "prompt_tokens": len(ids)}
    return {"choices": [choice], "usage": usage}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def send(self, body, status=200):
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self):
        models = {"data": [{"id": given.model, "max_model_len": 512 if FAULT != "small" else 2}]}
        self.send({"/health": {}, "/version": {"version": "9.9"}}.get(self.path, models))

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if FAULT == "crashes":
            print("OSError: the card fell off the bus", flush=True)
            os._exit(3)
        if FAULT == "refuses":
            self.send({"error": {"message": "no such thing"}}, 400)
        elif FAULT == "parrot":
            said = {"message": {"content": "Pretty Polly."}, "finish_reason": "stop"}
            self.send({"choices": [said]})
        else:
            self.send(answer(body))


ThreadingHTTPServer.request_queue_size = 256
ThreadingHTTPServer((given.host, int(given.port)), Handler).serve_forever()
"""


def install(folder: Path, monkeypatch: pytest.MonkeyPatch, fault: str = "") -> Path:
    """Make the package, and let REGROW_VLLM_PYTHON find it; returns the file of what was started.

    A line of that file has the process ids of a server and of its child, and its options.
    """
    package = folder / "fake" / "vllm" / "entrypoints" / "openai"
    package.mkdir(parents=True, exist_ok=True)
    for parent in (package, package.parent, package.parent.parent):
        (parent / "__init__.py").touch()
    (package / "api_server.py").write_text(SERVER)
    paths = [str(folder / "fake"), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))
    monkeypatch.setenv("REGROW_VLLM_PYTHON", sys.executable)
    monkeypatch.delenv("REGROW_VLLM_OPTIONS", raising=False)
    monkeypatch.setenv("FAKE_VLLM", fault)
    monkeypatch.setenv("FAKE_VLLM_LOG", str(folder / "started"))
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    return folder / "started"
