"""Whether the hub will take what a run pushes, asked before the run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub.errors import HfHubHTTPError, HTTPError, OfflineModeIsEnabled

_LOG_IN = "log in with `hf auth login`, set HF_TOKEN, or leave push_to_hub out"


def check_hub(config: Any) -> str:
    """Refuse a push that the hub would refuse; a line on where it will go.

    Args:
        config: a TIPConfig with push_to_hub.

    Returns:
        The repository, or that the hub could not be asked.

    Raises:
        ValueError: there is no token, the hub knows none such, it may only read, or the owner is somebody else.
    """
    token = config.hub_token or huggingface_hub.get_token()
    if not token:
        raise ValueError(f"push_to_hub needs a token of the hub: {_LOG_IN}.")
    name = config.hub_model_id or Path(config.output_dir).absolute().name
    try:
        account = huggingface_hub.HfApi().whoami(token)
    except OfflineModeIsEnabled:
        raise ValueError("push_to_hub needs the hub, and HF_HUB_OFFLINE is set: unset it, or leave it out.") from None
    except HfHubHTTPError as error:
        if error.response is not None and error.response.status_code in (401, 403):
            raise ValueError(f"the hub refuses the token that push_to_hub would use: {_LOG_IN}.") from None
        return f"{name} (the hub did not answer, so the right to write to it is not checked)"
    except (HTTPError, OSError):
        return f"{name} (the hub was not reached, so the right to write to it is not checked)"
    owner, _, repository = name.rpartition("/")
    owners = [account["name"], *(organization["name"] for organization in account.get("orgs") or [])]
    if owner and owner not in owners:
        raise ValueError(f"hub_model_id = {name}: this token writes for {', '.join(owners)}, and not for {owner}.")
    role = ((account.get("auth") or {}).get("accessToken") or {}).get("role")
    if role == "read":
        raise ValueError("the token that push_to_hub would use may only read: take one that may write.")
    return f"{owner or account['name']}/{repository}"
