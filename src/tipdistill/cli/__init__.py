"""The command line: `tipdistill COMMAND`. Each command is imported when it is asked for."""

from __future__ import annotations

import atexit
import os
import select
import shlex
import signal
import sys
import threading
import traceback
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import NoReturn

from ..signals import EXIT_FILE, Interrupted, Stopped, stopping_at_once
from ..text import nearest, printable

# command: (module, relative to this one, with `main(argv) -> int`, what it does)
COMMANDS = {
    "demo": (".demo", "distil a small student on this machine, in minutes, and picture its tokens"),
    "probe": (".probe", "say which rule and which retention suit a pair, before anything is trained"),
    "score": (".score", "roll a student out, score its tokens beside a teacher, write token records"),
    "plan": (".plan", "memory and time per GPU of a recipe on machines that are not at hand: --config F.yaml --gpus 8"),
    "init": (".init", "write a commented recipe for a student and a teacher of your own"),
    "train": (".train", "distil a student from a recipe: --config F.yaml [--field value]"),
    "sweep": (".sweep", "run rule × retention × rate × seed of a grid, and compare with intervals"),
    "prune": (".prune", "make a student of a teacher: drop the layers that matter least"),
    "eval": (".eval", "mean@k, pass@k and maj@k of a model on tasks, answers checked"),
    "report": (".report", "one page of a run or of token records: the TIP map, every token, what each rule keeps"),
    "recipes": (
        ".recipes",
        "list the packaged recipes; `show NAME` prints one, `schema` says where their JSON schema is",
    ),
    "completion": (".completion", "print what bash or zsh needs to complete commands and flags"),
}

# what a signal that ends a command at once leaves, and the flags that the same command then wants to go on
_KEPT = {
    "train": ("No step was under way, so nothing is lost: start it again with", ()),
    "demo": ("Parts that are finished are kept: go on with", ()),
    "sweep": ("Cells that are finished are kept: go on with", ()),
    "score": ("Rollouts that are written are kept: go on with", ()),
    "eval": ("Samples that are written are kept: go on with", ("--resume",)),
}


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit code: 0 done, 2 refused with one line on stderr, 128 + its number where a
    signal ended it (130: Ctrl-C), 141 where whoever read its output stopped.

    TIPDISTILL_DEBUG=1 in the environment lets errors through with their traceback.

    Args:
        argv: the arguments after the program's name; None: the process's own.

    Example:
        >>> main(["trian"])
        2
        >>> main(["recipes", "--help"])
        usage: tipdistill recipes [show NAME | schema]
        0
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_help())
        return 0
    if arguments[0] == "--version":
        from tipdistill import __version__

        print(f"tipdistill {__version__}")
        return 0
    command = arguments[0]
    if command not in COMMANDS:
        near = nearest(command, COMMANDS) or f" There are {', '.join(COMMANDS)}."
        return _refuse("tipdistill", f"there is no command {command!r}.{near}")
    module, _ = COMMANDS[command]
    try:
        with stopping_at_once():
            code = import_module(module, __name__).main(arguments[1:])
            sys.stdout.flush()  # what is still buffered would fail after the last line here
            return code
    except Interrupted:  # which has said how to go on
        return 130
    except KeyboardInterrupt:
        kept = _kept(arguments)
        if kept:
            print(printable(kept), file=sys.stderr)
        return _refuse(f"tipdistill {command}", "interrupted.", code=130)
    except Stopped as stopped:
        return _stopped(f"tipdistill {command}", stopped, _kept(arguments))
    except (ValueError, OSError, ImportError) as error:
        if isinstance(error, BrokenPipeError) and _reader_left():
            return 141
        if os.environ.get("TIPDISTILL_DEBUG"):
            traceback.print_exc()
        return _refuse(f"tipdistill {command}", str(error))


def run() -> NoReturn:
    """What the program starts: `main` on the process's own arguments, then `end_process`."""
    code = main()
    if code > 128 and EXIT_FILE in os.environ:
        Path(os.environ[EXIT_FILE]).write_text(str(code), encoding="utf-8")
        code = 0  # a launcher would call a run that was told to stop a failed one
    end_process(code)


def end_process(code: int) -> NoReturn:
    """End this process with an exit code; one process of several ends without finalizing its interpreter.

    A thread of gloo lets go of a collective's tensors some time after that collective is done, also after
    `destroy_process_group`, and needs the GIL for it. If the interpreter is finalizing by then, the process aborts and
    the launcher reports a finished run as failed. Threads are joined, exit handlers called, and standard output is
    flushed, as at any exit; what is left out is what is left to chance there: finalizers of objects that are still
    referred to, and files that were not closed. For the end of a script of one's own under torchrun or accelerate too.

    Args:
        code: 0 for success.

    Raises:
        SystemExit: with `code`, where WORLD_SIZE tells of no other process.

    Example:
        >>> end_process(0)
        Traceback (most recent call last):
        SystemExit: 0
    """
    if int(os.environ.get("WORLD_SIZE") or 1) > 1:
        try:
            # what the interpreter itself calls first; no public name does it, so the type checker knows of none
            threading._shutdown()  # type: ignore[attr-defined]
            atexit._run_exitfuncs()
            for stream in (sys.stdout, sys.stderr):
                with suppress(OSError, ValueError, AttributeError):  # its reader left, or there is none
                    stream.flush()
        except BaseException:  # told and passed over, as the interpreter does with what fails at its end
            traceback.print_exc()
        finally:
            os._exit(code)
    raise SystemExit(code)


def _stopped(who: str, stopped: Stopped, kept: str) -> int:
    assert isinstance(stopped.code, int)
    if not stopped.told:
        _refuse(who, f"stopped by {signal.Signals(stopped.code - 128).name}. {kept}")
    return stopped.code


def _kept(arguments: list[str]) -> str:
    """What a command that was stopped leaves, and the command that goes on; empty where nothing is left."""
    if arguments[0] not in _KEPT:
        return ""
    told, flags = _KEPT[arguments[0]]
    wanted = [flag for flag in flags if flag not in arguments]
    return f"{told}: {shlex.join(['tipdistill', *arguments, *wanted])}"


def _refuse(who: str, message: str, code: int = 2) -> int:
    print(printable(f"{who}: {' '.join(message.split())}"), file=sys.stderr)
    return code


def _reader_left() -> bool:
    """Whether standard output is a pipe that nobody reads any more, as after `| head`; it is silenced then."""
    try:
        output = sys.stdout.fileno()
    except OSError:  # no file: captured, or replaced
        return False
    poll = select.poll()
    poll.register(output, 0)
    if not any(event & select.POLLERR for _, event in poll.poll(0)):
        return False  # the pipe that broke was another one, of a server or a process
    os.dup2(os.open(os.devnull, os.O_WRONLY), output)
    return True


def _help() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {description}" for name, (_, description) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: tipdistill COMMAND [--help] [...]",
            "",
            "On-policy distillation on the tokens that carry signal.",
            "",
            *lines,
            "",
            "tipdistill --version prints the version.",
        ]
    )
