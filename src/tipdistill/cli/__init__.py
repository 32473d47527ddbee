"""The command line: `tipdistill COMMAND`. Each command is imported when it is asked for."""

from __future__ import annotations

import difflib
import os
import sys
import traceback
from importlib import import_module

# command: (module, relative to this one, with `main(argv) -> int`, what it does)
COMMANDS = {
    "demo": (".demo", "distil a small student on this machine, in minutes, and picture its tokens"),
    "probe": (".probe", "say which rule and which retention suit a pair, before anything is trained"),
    "score": (".score", "roll a student out, score its tokens beside a teacher, write token records"),
    "plan": (".plan", "memory and time per GPU of a recipe on machines that are not at hand: --config F.yaml --gpus 8"),
    "train": (".train", "distil a student from a recipe: --config F.yaml [--field value]"),
    "sweep": (".sweep", "run rule × retention × rate × seed of a grid, and compare with intervals"),
    "bench": (".bench", "measure the engine beside its peers: head, step or select; `bench table` writes the tables"),
    "eval": (".eval", "mean@k, pass@k and maj@k of a model on tasks, answers checked"),
    "report": (".report", "one page of a run or of token records: the TIP map, every token, what each rule keeps"),
    "recipes": (".recipes", "list the packaged recipes; `recipes show NAME` prints one"),
}


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit code: 0 done, 2 refused with one line on stderr, 130 interrupted.

    TIPDISTILL_DEBUG=1 in the environment lets errors through with their traceback.

    Args:
        argv: the arguments after the program's name; None: the process's own.

    Example:
        >>> main(["trian"])
        2
        >>> main(["recipes", "--help"])
        usage: tipdistill recipes [show NAME]
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
        near = difflib.get_close_matches(command, COMMANDS, n=2) or list(COMMANDS)
        return _refuse("tipdistill", f"there is no command {command!r}. Did you mean {' or '.join(near)}?")
    module, _ = COMMANDS[command]
    try:
        return import_module(module, __name__).main(arguments[1:])
    except KeyboardInterrupt:
        return _refuse(f"tipdistill {command}", "interrupted.", code=130)
    except (ValueError, OSError, ImportError) as error:
        if os.environ.get("TIPDISTILL_DEBUG"):
            traceback.print_exc()
        return _refuse(f"tipdistill {command}", str(error))


def _refuse(who: str, message: str, code: int = 2) -> int:
    print(f"{who}: {' '.join(message.split())}", file=sys.stderr)
    return code


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
