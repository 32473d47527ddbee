"""A recipe is code: what of a recipe runs code or sends keys, and who has to say yes to it.

A recipe may name functions by their dotted paths, set environment variables, and let a model bring code of its own.
Whoever wrote the recipe decides what runs. So one that does any of this is refused unless it is packaged with
tipdistill, or the user says that it is trusted.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..documents import parse_mapping
from ..http import server_url, variable_name
from ..select.registry import is_code as is_code_of_rule
from ..tasks import is_code as is_code_of_task
from ..text import printable

FLAG = "--trust_recipe"
OF_MODELS = ("model_init_kwargs", "teacher_model_init_kwargs")
# arguments of from_pretrained
_FETCHES = ("trust_remote_code", "use_kernels", "allow_all_kernels", "kernel_config", "proxies")
_VARIABLE = re.compile(r"[A-Za-z_]\w*", re.ASCII)
# variables by which programs find code, and load it before anything of ours runs
_LOADS_CODE = re.compile(
    r"PYTHON(?!HASHSEED$|UNBUFFERED$|FAULTHANDLER$|UTF8$).*|LD_.*|DYLD_.*|.*PRELOAD.*|.*PATH|.*HOME|USERPROFILE|ENV"
    r"|BASH.*|SHELL.*|IFS|PROMPT_COMMAND|.*_COMMAND|.*_ASKPASS|EDITOR|VISUAL|PAGER|BROWSER|GIT_.*|SSH_.*|NODE_.*|PERL.*"
    r"|RUBY.*|_?JAVA_.*|CC|CXX|.*_CC|.*_CXX|NVCC.*|.*PLUGIN.*|.*INJECTION.*|.*EXECUTABLE.*|.*_DIRS?|.*CACHE(?:_.*)?"
    r"|GLIBC_.*|OPENSSL_.*|MPL.*|COV(?:ERAGE)?_.*|PIP_.*|UV_.*|CONDA.*|VIRTUAL_ENV|TMPDIR|XDG_.*|.*LOGGING_CONFIG.*"
    r"|.*_LIBS?|.*LIBRAR(?:Y|IES).*|.*_(?:CONF|CONFIG|CREDENTIALS|ENV)_FILE|OCL_.*"
    r"|.*TRUST.*|.*INSECURE.*|.*WEIGHTS_ONLY.*|.*SERIALIZATION.*|.*AUTOLOAD.*|HF_HUB_ENABLE_.*|KUBE.*|DOCKER_.*",
    re.IGNORECASE,
)
# variables that send what is read, or keys, elsewhere
_SENDS_ELSEWHERE = re.compile(
    r".*PROX(?:Y|IES)|.*ENDPOINT.*|.*_UR[LI](?:_.*)?|.*_HOST|HOSTALIASES|LOCALDOMAIN|RES_OPTIONS"
    r"|SSL.*|.*_CA_.*|.*CERT.*|CURL_.*|NETRC|.*KEYLOG.*",
    re.IGNORECASE,
)
# variables by which launchers tell processes who they are
_LAUNCHES = re.compile(
    r"TIPDISTILL_.*|(?:LOCAL_|GROUP_|NODE_)?RANK|(?:LOCAL_)?WORLD_SIZE|MASTER_.*|TORCHELASTIC.*|ACCELERATE_.*"
    r"|OMPI_.*|PMI_.*|MV2_.*|SLURM_.*",
    re.IGNORECASE,
)


def check_environment(where: str, environment: Any) -> dict[str, str]:
    """The environment variables that a recipe sets, once none of them loads code or sends things elsewhere.

    Args:
        where: the recipe, as errors call it.
        environment: `env` of the recipe.

    Raises:
        ValueError: no mapping of names to texts and numbers, or a variable that no recipe may set.

    Example:
        >>> check_environment("r.yaml", {"NCCL_DEBUG": "INFO", "OMP_NUM_THREADS": 4})
        {'NCCL_DEBUG': 'INFO', 'OMP_NUM_THREADS': '4'}
        >>> check_environment("r.yaml", {"PYTHONPATH": "/tmp"})
        Traceback (most recent call last):
        ValueError: r.yaml: `env` may not set PYTHONPATH, by which programs find and load code: set it in your shell.
    """
    if environment is None:
        return {}
    if not isinstance(environment, dict):
        raise ValueError(f"{where}: `env` must map names of environment variables to values, got {environment!r:.80}.")
    for name, value in environment.items():
        if not isinstance(name, str) or not _VARIABLE.fullmatch(name):
            raise ValueError(f"{where}: `env`: {name!r:.60} is no name of an environment variable.")
        if not isinstance(value, str | int | float) or "\0" in str(value):
            raise ValueError(f"{where}: `env`: {name} must be a text or a number, got {value!r:.60}.")
        for pattern, why in (
            (_LAUNCHES, "which launchers set"),
            (_LOADS_CODE, "by which programs find and load code"),
            (_SENDS_ELSEWHERE, "by which requests go elsewhere"),
        ):
            if pattern.fullmatch(name):
                raise ValueError(f"{where}: `env` may not set {name}, {why}: set it in your shell.")
    return {name: str(value) for name, value in environment.items()}


def code_named(settings: Mapping[str, Any], where: str = "") -> list[str]:
    """What of a recipe runs code that is not tipdistill's own, or sends a key; each as it stands there.

    Args:
        settings: fields of `tipdistill train`, and `env`.
        where: what errors put before a field's name, such as the file's.

    Raises:
        ValueError: a field whose code cannot be told: no JSON, no mapping, no variable's name, no server's address.

    Example:
        >>> code_named({"selection_rule": "mine.rule", "retention": 0.5, "env": {"NCCL_DEBUG": "INFO"}})
        ['selection_rule: mine.rule', 'env: NCCL_DEBUG']
        >>> code_named({"environment": "mine.World"}), code_named({"environment": "tipdistill.tasks.trip.Trip"})
        (['environment: mine.World'], [])
        >>> code_named({"selection_rule": "soft_or", "eval_tasks": "math500,mine.jsonl"})
        []
    """
    named: list[str] = []
    rule, tasks = settings.get("selection_rule"), settings.get("eval_tasks")
    if is_code_of_rule(rule):
        named.append(f"selection_rule: {rule}")
    acted_on = settings.get("environment")
    if isinstance(acted_on, str) and not acted_on.startswith("tipdistill."):
        named.append(f"environment: {acted_on}")
    listed = ",".join(map(str, tasks)) if isinstance(tasks, list | tuple) else tasks
    names = [name.strip() for name in listed.split(",")] if isinstance(listed, str) else []
    named += [f"eval_tasks: {name}" for name in names if is_code_of_task(name)]
    environment = settings.get("env")
    if isinstance(environment, dict) and environment:
        named.append(f"env: {', '.join(map(str, environment))}")
    if str(settings.get("trust_remote_code") or "no").lower() not in ("no", "n", "false", "f", "0"):
        named.append("trust_remote_code")
    if _is_kernel(settings.get("attn_implementation")):
        named.append(f"attn_implementation: {settings['attn_implementation']}")
    for place in OF_MODELS:
        inner = parse_mapping(settings.get(place), f"{where}{place}") or {}
        named += [f"{place}.{name}" for name, value in inner.items() if _runs_code(name, value)]
    launcher = settings.get("accelerate_config")
    if isinstance(launcher, str) and (
        "/" in launcher or launcher.lower().endswith((".yaml", ".yml", ".json")) or os.path.isfile(launcher)
    ):
        named.append(f"accelerate_config: {launcher}")
    keys = [("teacher_", settings)]
    if settings.get("teachers") is not None:
        from ..teachers.named import read_teachers  # not for `tipdistill demo --help`

        several = read_teachers(settings["teachers"], f"{where}teachers") or {}
        keys += [(f"teachers.{name}.", entry) for name, entry in several.items()]
    for prefix, given in keys:
        one = prefix == "teacher_"
        variable, url = (given.get(f"teacher_{key}" if one else key) for key in ("api_key_env", "url"))
        if variable and url:
            shown = variable_name(f"{where}{prefix}api_key_env", variable)
            named.append(f"{prefix}api_key_env: {shown}, sent to {server_url(f'{where}{prefix}url', url)}")
    return named


def without_code(options: Any) -> dict[str, Any]:
    """Of `model_init_kwargs` what runs no code, for a dry run.

    Args:
        options: a mapping, or JSON text of one.

    Example:
        >>> without_code({"trust_remote_code": True, "dtype": "auto"})
        {'dtype': 'auto'}
    """
    given = parse_mapping(options, "model_init_kwargs") or {}
    return {name: value for name, value in given.items() if not _runs_code(name, value)}


def _runs_code(name: str, value: Any) -> bool:
    """Whether an argument of `from_pretrained` runs code that is fetched, or fetches from elsewhere."""
    return _is_kernel(value) if name.endswith("_implementation") else name in _FETCHES and bool(value)


def _is_kernel(implementation: Any) -> bool:
    """Whether attention is computed by a kernel of the hub; the parts of a model may each name their own."""
    if isinstance(implementation, Mapping):
        return any(map(_is_kernel, implementation.values()))
    return isinstance(implementation, str) and "/" in implementation


def confirm(path: Path, named: Sequence[str]) -> None:
    """Ask on a terminal whether a recipe may run what it names; refuse it elsewhere, and where the answer is no.

    Args:
        path: the recipe.
        named: of `code_named`; nothing is asked where it is empty.

    Raises:
        ValueError: it is not trusted; with what it names.
    """
    if not named:
        return
    what = printable(f"{path} names code ({'; '.join(named)})")
    launched = "LOCAL_RANK" in os.environ or "TIPDISTILL_LAUNCHED" in os.environ
    if sys.stdin is not None and sys.stdin.isatty() and sys.stderr.isatty() and not launched:
        print(f"{what}. It runs with your rights. Run it? [y/N] ", end="", file=sys.stderr, flush=True)
        if sys.stdin.readline().strip().lower() in ("y", "yes"):
            return
    raise ValueError(f"{what}, which would run with your rights: read it, then give {FLAG}.")
