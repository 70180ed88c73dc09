"""A vLLM server for a model folder, on this machine, for as long as it is needed.

vLLM fixes its own version of PyTorch, so it may live in another Python than regrow.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regrow.errors import UserError
from regrow.runtime import distributed
from regrow.runtime.progress import say

if TYPE_CHECKING:
    import torch

PYTHON = "REGROW_VLLM_PYTHON"
"""Environment variable: the Python that has vLLM, if it is not this one."""
OPTIONS = "REGROW_VLLM_OPTIONS"
"""Environment variable: further options of vLLM's server, such as --tensor-parallel-size 4."""
AT_ONCE = 128
"""Requests that wait at the server at the same time; it makes its own batches of them."""
REQUEST_TIMEOUT = 3600.0
"""Seconds for one request, most of which it waits for others."""
LONGEST_START = 1800.0
"""Seconds after which a server that does not answer has failed to start."""
NEWS = 30.0
"""Seconds between two lines about a server that is still starting."""
LOOK = 0.5
"""Seconds between two looks at a server that is starting."""
LONGEST_STOP = 20.0
"""Seconds that a server gets to end by itself."""
SHARE = 0.9
"""Share of the free memory of a GPU that the server may use."""
LAUNCH = """
import ctypes, os, sys
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, 15)  # SIGTERM when the process that started this one has died
server = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
os.execv(sys.executable, [*server, *sys.argv[1:]])
"""


@dataclass(frozen=True)
class Server:
    """A running server."""

    address: str
    """Such as http://127.0.0.1:8000."""
    version: str
    """The version of vLLM."""
    model: str
    """The server's name of its model."""
    room: int
    """The maximum number of tokens of a prompt and its answer together."""
    client: Any

    @property
    def url(self) -> str:
        """The address of OpenAI's interface."""
        return f"{self.address}/v1"

    def complete(self, ids: list[int], **fields: Any) -> dict[str, Any]:
        """The choice that continues `ids`; can be used by several threads.

        Raises UserError, with the server's words, if it gives none.
        """
        import httpx2

        body = {"model": self.model, "prompt": ids, **fields}
        try:
            response = self.client.post(f"{self.url}/completions", json=body)
        except httpx2.HTTPError as error:
            raise UserError(f"vLLM: {error or type(error).__name__}") from None
        if response.status_code != 200:
            said = " ".join(response.text.split())[:300]
            raise UserError(f"vLLM refuses a request of {len(ids)} tokens: {said}")
        choice: dict[str, Any] = response.json()["choices"][0]
        return choice


def check() -> None:
    """Raise UserError if no Python has vLLM, and in a job of several processes."""
    if distributed.world_size() > 1:
        raise UserError(
            f"backend vllm with {distributed.world_size()} processes: start one process; vLLM uses "
            f"several GPUs by itself with {OPTIONS}='--tensor-parallel-size "
            f"{distributed.world_size()}'"
        )
    options()
    python()


def python() -> str:
    """The Python that runs vLLM; raises UserError if there is none."""
    given = os.environ.get(PYTHON)
    if not given:
        if find_spec("vllm") is None:
            raise UserError(
                "backend vllm: vLLM is not installed: install it in an environment of its own "
                f"(python -m venv, pip install vllm), and set {PYTHON} to the Python in it"
            )
        return sys.executable
    found = shutil.which(os.path.expanduser(given))  # "python" is looked up, "./python" is not
    if found is None:
        raise UserError(f"{PYTHON}={given}: there is no such Python")
    found = str(Path(found).absolute())  # not resolved: the Python of an environment is a link
    code = "import importlib.util as u, sys; sys.exit(u.find_spec('vllm') is None)"
    with tempfile.TemporaryDirectory() as folder:  # a folder here may have the name of a package
        if subprocess.run([found, "-c", code], cwd=folder, check=False).returncode:
            raise UserError(f"{PYTHON}={given}: this Python has no vLLM: pip install vllm there")
    return found


def options() -> list[str]:
    """The further options of the server; raises UserError if a quotation mark is not closed."""
    given = os.environ.get(OPTIONS, "")
    try:
        return shlex.split(given)
    except ValueError as error:
        raise UserError(f"{OPTIONS}={given}: {str(error).lower()}") from None


@contextmanager
def serve(folder: Path, dtype: torch.dtype, device: torch.device) -> Iterator[Server]:
    """A server for the model in `folder`, which computes in `dtype`; it ends with the block.

    It answers on this machine only, asks no hub, and runs no code of the model's folder. Raises
    UserError, with the reason and the place of the log, if it does not start or dies in the block.
    """
    import httpx2

    work = Path(tempfile.mkdtemp(prefix="regrow-vllm-"))
    log, port = work / "vllm.log", _free_port()
    command = [python(), "-c", LAUNCH, *_arguments(folder, port, dtype, device), *options()]
    # Without the environment's proxies, which could not reach this machine.
    # The server closes a connection that was idle for 5 s, so none is used again after 2 s.
    limits = httpx2.Limits(max_connections=None, keepalive_expiry=2.0)
    client = httpx2.Client(trust_env=False, timeout=REQUEST_TIMEOUT, limits=limits)
    say(f"vLLM: starting a server for {folder}")
    with log.open("wb") as file:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            cwd=work,  # where no folder has the name of a package
            env=_environment(device),
            start_new_session=True,
        )
    try:
        with client:
            yield _started(process, client, f"http://127.0.0.1:{port}", log)
    except Exception:
        # A dying server closes its connections shortly before it ends.
        with suppress(subprocess.TimeoutExpired):
            process.wait(2 * LOOK)
        if process.returncode is None:
            raise
        kept = _kept(log)
        raise UserError(f"vLLM ended: {_reason(kept)} (its log: {kept})") from None
    finally:
        _stop(process)
        shutil.rmtree(work, ignore_errors=True)


def _arguments(folder: Path, port: int, dtype: torch.dtype, device: torch.device) -> list[str]:
    """Options of the server. Only the model's end marks are taken from its generation settings."""
    arguments = {
        "--model": str(folder.resolve()),
        "--host": "127.0.0.1",
        "--port": str(port),
        "--dtype": str(dtype).removeprefix("torch."),
        "--generation-config": "vllm",
        "--max-model-len": "auto",
    }
    if device.type == "cuda":
        import torch

        free, total = torch.cuda.mem_get_info(device)
        arguments["--gpu-memory-utilization"] = f"{SHARE * free / total:.3f}"
    # Compilation takes longer than what it gains on a CPU.
    eager = [] if device.type == "cuda" else ["--enforce-eager"]
    return [text for pair in arguments.items() for text in pair] + eager


def _environment(device: torch.device) -> dict[str, str]:
    import psutil

    variables = {**os.environ, "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    variables.pop("VLLM_API_KEY", None)  # which the server would ask for
    if device.type == "cuda":
        if device.index is not None:
            visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
            named = visible[device.index] if len(visible) > device.index else ""
            variables["CUDA_VISIBLE_DEVICES"] = named or str(device.index)
        return variables
    # vLLM would take nearly all memory for keys and values, and needs a C++ compiler for Dynamo.
    quarter = psutil.virtual_memory().available // 2**32
    defaults = {"VLLM_CPU_KVCACHE_SPACE": str(max(1, quarter)), "TORCHDYNAMO_DISABLE": "1"}
    return {**defaults, **variables}


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _started(process: subprocess.Popen[bytes], client: Any, address: str, log: Path) -> Server:
    """The server, when it answers; raises UserError after too long a time."""
    import httpx2

    start = news = time.monotonic()
    while True:
        process.poll()
        if process.returncode is not None:
            raise UserError("vLLM ended")  # `serve` gives the reason
        with suppress(httpx2.HTTPError):
            if client.get(f"{address}/health", timeout=5.0).status_code == 200:
                break
        seconds = time.monotonic() - start
        if seconds > LONGEST_START:
            raise UserError(
                f"vLLM did not start within {LONGEST_START:g} s; the last line of its log, "
                f"{_kept(log)}: {_last(log)}"
            )
        if time.monotonic() - news > NEWS:
            news = time.monotonic()
            say(f"vLLM: still starting after {seconds:.0f} s: {_last(log)}")
        time.sleep(LOOK)
    version = client.get(f"{address}/version").json()["version"]
    (model,) = client.get(f"{address}/v1/models").json()["data"]
    server = Server(address, str(version), model["id"], int(model["max_model_len"]), client)
    seconds = time.monotonic() - start
    say(f"vLLM {version}: answers after {seconds:.0f} s, up to {server.room:,} tokens each")
    return server


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End the server and all processes that it started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    with suppress(subprocess.TimeoutExpired):
        process.wait(LONGEST_STOP)
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _kept(log: Path) -> Path:
    """The log at a place that stays."""
    kept = log.parent.with_suffix(".log")
    return kept if kept.exists() else Path(shutil.copy(log, kept))


def _lines(log: Path) -> list[str]:
    """The lines of a log, without process, time and place in the code."""
    text = log.read_text(encoding="utf-8", errors="replace")
    prefix = r"^(\([^)]*pid=\d+\) ?)?([A-Z]+ [\d-]+ [\d:]+ \[[^\]]*\] ?)?"
    return [line for each in text.splitlines() if (line := re.sub(prefix, "", each)).strip()]


def _last(log: Path) -> str:
    lines = _lines(log)
    return lines[-1].strip()[:200] if lines else "nothing"


def _reason(log: Path) -> str:
    """The first error in a log, which is the cause of the others; else its last line."""
    lines = _lines(log)
    for line, following in zip(lines, lines[1:] + lines[-1:], strict=True):
        if re.match(r"[\w.]*ValidationError: ", line):
            return following.strip()[:300]
        if re.match(r"[\w.]*(Error|Exception): \S|[\w.]+: error: ", line):
            return line.strip()[:300]
    return _last(log)
