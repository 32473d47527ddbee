"""Keys and passwords, kept out of everything that is written down: configurations, checkpoints, sweeps, logs."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

# names of what is a secret; pad_token, max_tokens and teacher_api_key_env (the name of a variable) are none
_SECRET = re.compile(
    r"(?:.*_)?(?:hub|hf|auth|access|api|secret|private|bearer)_?(?:token|key)|token|.*(?:password|passwd|secret)",
    re.IGNORECASE,
)
_SECRET_VARIABLE = re.compile(
    r"TOKEN(?!IZERS)|KEY|SECRET|PASSW|PASSPHRASE|PWD|(?:^|_)PASS(?:_|$)|CREDENTIAL|AUTH(?!ORS?(?:_|$))|BEARER|COOKIE",
    re.IGNORECASE,
)


def is_secret(name: Any) -> bool:
    """Whether a field of this name holds a key or a password.

    Example:
        >>> [is_secret(name) for name in ("hub_token", "api_key", "pad_token", "teacher_api_key_env")]
        [True, True, False, False]
    """
    return isinstance(name, str) and _SECRET.fullmatch(name) is not None


def is_secret_variable(name: str) -> bool:
    """Whether an environment variable of this name holds a key or a password.

    Example:
        >>> [is_secret_variable(name) for name in ("HF_TOKEN", "WANDB_API_KEY", "TOKENIZERS_PARALLELISM")]
        [True, True, False]
    """
    return _SECRET_VARIABLE.search(name) is not None


def secret_names(value: Any, prefix: str = "") -> list[str]:
    """Where secrets stand in nested mappings, and in those that JSON texts hold, as dotted names.

    Example:
        >>> secret_names({"seed": 1, "hub_token": "x", "model_init_kwargs": {"token": "y"}})
        ['hub_token', 'model_init_kwargs.token']
    """
    names = []
    value = _of_json(value)
    if isinstance(value, Mapping):
        for name, inside in value.items():
            if is_secret(name):
                names += [f"{prefix}{name}"] if inside is not None else []
            else:
                names += secret_names(inside, f"{prefix}{name}.")
    elif isinstance(value, list | tuple):
        for inside in value:
            names += secret_names(inside, prefix)
    return names


def without_secrets(value: Any) -> Any:
    """Nested mappings and lists, and JSON texts of them, without what `is_secret`: None in its place.

    Example:
        >>> without_secrets({"seed": 1, "hub_token": "x", "model_init_kwargs": {"token": "y", "dtype": "auto"}})
        {'seed': 1, 'hub_token': None, 'model_init_kwargs': {'token': None, 'dtype': 'auto'}}
    """
    if isinstance(value, str) and secret_names(value):
        return json.dumps(without_secrets(_of_json(value)))
    if isinstance(value, Mapping) and secret_names(value):
        return {name: None if is_secret(name) else without_secrets(inside) for name, inside in value.items()}
    if isinstance(value, list | tuple) and secret_names(value):
        return type(value)(without_secrets(inside) for inside in value)
    return value


def _of_json(value: Any) -> Any:
    """What a JSON text of a mapping or a list holds; anything else as it is."""
    if isinstance(value, str) and value.lstrip().startswith(("{", "[")):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value
