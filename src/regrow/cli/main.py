"""The command line: parses arguments, runs commands, prints errors."""

from __future__ import annotations

import functools
import io
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import tyro
from pydantic import ValidationError
from rich.console import Console
from rich.table import Table
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

import regrow
from regrow import stage
from regrow.config import reason
from regrow.errors import UserError, unknown
from regrow.runtime import distributed
from regrow.stage_dir import is_begun, is_full_disk

WEIGHTS = ConstructorRegistry()


@WEIGHTS.primitive_rule
def _weights(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[dict[str, float]] | None:
    """Parse weights by name from `--flag NAME WEIGHT NAME WEIGHT`; they replace the default.

    By default, tyro would make one flag for each name in the default and allow no other names.
    """
    if info.type != dict[str, float]:
        return None
    return PrimitiveConstructorSpec(
        nargs="*",
        metavar="NAME WEIGHT [NAME WEIGHT ...]",
        instance_from_str=_pairs,
        is_instance=lambda value: isinstance(value, dict),
        str_from_instance=lambda weights: [str(part) for pair in weights.items() for part in pair],
    )


def _pairs(parts: list[str]) -> dict[str, float]:
    names, weights = parts[::2], parts[1::2]
    if len(names) != len(weights) or len(set(names)) != len(names):
        raise ValueError("give each name once, and a weight after it: NAME WEIGHT NAME WEIGHT")
    return dict(zip(names, map(float, weights), strict=True))


def main(arguments: list[str] | None = None) -> int:
    """Run one command; return 0 on success, and 2 with a one-line error for bad input."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments and not arguments[0].startswith("-"):  # learn-masks is learn_masks
        arguments = [arguments[0].replace("-", "_"), *arguments[1:]]
    if arguments in (["--version"], ["-V"]):
        print(f"regrow {regrow.__version__}")
        return 0
    with _Interrupt() as interrupt:
        try:
            _quiet()
            _run(arguments)
            sys.stdout.flush()
        except SystemExit:
            raise
        except BaseException as error:
            if interrupt.noted or isinstance(error, KeyboardInterrupt):
                return _stopped(arguments)
            return _explained(error, arguments)
    return 0


class _Interrupt:
    """Notes Ctrl-C in this block, because an import may turn KeyboardInterrupt into another error.

    A signal that is ignored, or handled by the program that calls regrow, is left as it is.
    """

    def __init__(self) -> None:
        self.noted = False
        self.ours = signal.getsignal(signal.SIGINT) is signal.default_int_handler
        self.ours = self.ours and threading.current_thread() is threading.main_thread()

    def _note(self, *_: object) -> None:
        self.noted = True
        raise KeyboardInterrupt

    def __enter__(self) -> _Interrupt:
        if self.ours:
            signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        if self.ours:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def _stopped(arguments: list[str]) -> int:
    """Say that the command was stopped, and how much of its work the same command would repeat."""
    flags = [part for argument in arguments for part in argument.split("=", 1)]
    out = Path(flags[flags.index("--out") + 1]) if "--out" in flags[:-1] else None
    text = "regrow: stopped"
    if out is not None:
        text += f"; the same command {'continues from here' if is_begun(out) else 'begins anew'}"
    print(f"\n{text}", file=sys.stderr)
    return 130


def _explained(error: BaseException, arguments: list[str]) -> int:
    """Print an error of the user or the machine in one line; raises every other error again."""
    if isinstance(error, UserError):
        return _refuse(str(error))
    if isinstance(error, PermissionError | NotADirectoryError):
        return _refuse(f"{error.filename}: {error.strerror}; give a place that can be written to")
    if isinstance(error, BrokenPipeError):  # the reader of the pipe, such as head, has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    if isinstance(error, OSError) and is_full_disk(error):
        return _refuse(f"no disk space left: {error.filename or error}; free some and run again")
    if isinstance(error, MemoryError | RuntimeError):
        from regrow.runtime.memory import is_out_of_memory

        if distributed.lost_peer(error):
            return _refuse("another process of this job has ended: run the same command again")
        if is_out_of_memory(error):
            return _refuse(f"memory ran out: {_less_memory(arguments[0])}, and run again")
    raise error


def _less_memory(command: str) -> str:
    """What makes a command take less memory."""
    if command in stage.names():
        return stage.find(command).less_memory
    return stage.Stage.less_memory


def entry() -> None:
    """Entry point of the console script."""
    sys.exit(main())


def commands() -> dict[str, Callable[..., None]]:
    """All commands by name, in the order in which `regrow --help` lists them."""
    from regrow.cli.commands import inspect, run, watch

    of_stages = {name: stage.find(name).command for name in stage.names()}
    return {"run": run, "inspect": inspect, **of_stages, "watch": watch}


def _command(name: str) -> Callable[..., None]:
    """Find one command without importing the others; raises UserError if it does not exist."""
    if name in stage.names():
        return stage.find(name).command
    known = commands()
    if name.startswith("-"):
        raise UserError(f"{name}: name the command first; there are: {', '.join(known)}")
    if name not in known:
        raise unknown("command", name, known)
    return known[name]


def _run(arguments: list[str]) -> None:
    """Run a command; a command whose work cannot be split runs only in process 0 of a job."""
    chosen = _parse(arguments)
    if distributed.world_size() == 1:
        chosen()
    elif _is_split(arguments):
        with distributed.together():
            chosen()
        distributed.leave()
    elif distributed.is_main():
        with distributed.alone():
            chosen()


def _is_split(arguments: list[str]) -> bool:
    """Whether all processes of a job run a command: a recipe, or a stage that splits its work."""
    command = arguments[0]
    if "--dry-run" in arguments:
        return False
    return command == "run" or (command in stage.names() and stage.find(command).ranks == "split")


def _parse(arguments: list[str]) -> Callable[[], None]:
    """Parse the arguments into a call of the command.

    Raises UserError for a value that a config rejects, and SystemExit(2), with tyro's message, for
    invalid flags.
    """
    if not arguments or arguments[0] in ("-h", "--help"):
        return _help
    name, *flags = arguments
    messages = io.StringIO()
    try:
        with redirect_stderr(messages):
            chosen: Callable[[], None] = tyro.cli(
                _later(_command(name)), prog=f"regrow {name}", args=flags, registry=WEIGHTS
            )
            return chosen
    except SystemExit as stop:
        refused = _validation_error(stop)
        if refused is None:
            distributed.leave_error_to_main()
            sys.stderr.write(messages.getvalue())
            raise
    first = refused.errors()[0]
    field, *inside = first["loc"] or ("",)
    if not field:
        raise UserError(reason(first))
    # An index in a list is left out, as the message has the value; the key of a weight is not.
    names = [f"{name}: " for name in inside if isinstance(name, str)]
    raise UserError(f"--{str(field).replace('_', '-')}: {''.join(names)}{reason(first)}")


def _help() -> None:
    """Print the usage, the description of regrow, and one line for each command."""
    table = Table(box=None, show_header=False, padding=(0, 2))
    for name, command in commands().items():
        table.add_row(f"[bold]{name}[/bold]", (command.__doc__ or "").strip().splitlines()[0])
    console = Console()
    console.print("usage: regrow COMMAND [FLAGS]    regrow COMMAND --help    regrow --version\n")
    console.print((regrow.__doc__ or "").splitlines()[0] + "\n")
    console.print(table)


def _later(command: Callable[..., None]) -> Callable[..., Callable[[], None]]:
    """Wrap `command` with the same flags and help, but return the call instead of running it."""

    @functools.wraps(command)
    def call(*args: Any, **kwargs: Any) -> Callable[[], None]:
        return functools.partial(command, *args, **kwargs)

    return call


def _validation_error(error: BaseException | None) -> ValidationError | None:
    """Return the validation error of a config that made tyro exit, if there is one."""
    while error is not None and not isinstance(error, ValidationError):
        error = error.__context__
    return error


def _refuse(message: str) -> int:
    distributed.leave_error_to_main()
    print(f"regrow: error: {' '.join(message.split())}", file=sys.stderr)
    return 2


def _quiet() -> None:
    """Disable progress bars and hints of other libraries."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("COMPRESSED_TENSORS_LOG_DISABLED", "1")
    # transformers' Trainer imports torchao if it is installed. torchao warns about CUDA kernels on
    # machines without a GPU, and about types that torch will replace.
    logging.getLogger("torchao").addFilter(_is_news)
    logging.getLogger("torch.utils._pytree").addFilter(_is_news)


def _is_news(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(("Failed to load", "<enum"))
