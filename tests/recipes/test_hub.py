"""A push that the hub would refuse is refused before the run."""

from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

from tipdistill.recipes.hub import check_hub

ACCOUNT = {"name": "ada", "orgs": [{"name": "engines"}], "auth": {"accessToken": {"role": "write"}}}


def config(**settings):
    return SimpleNamespace(**{"hub_token": "t", "hub_model_id": None, "output_dir": "runs/healed", **settings})


@pytest.fixture
def hub(monkeypatch):
    """Sets what the hub answers: an account, or what it raises."""
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)

    def answer(reply):
        def whoami(self, token):
            assert token == "t"
            if isinstance(reply, Exception):
                raise reply
            return reply

        monkeypatch.setattr(huggingface_hub.HfApi, "whoami", whoami)

    answer(ACCOUNT)
    return answer


def refusal(status):
    return HfHubHTTPError("no", response=SimpleNamespace(status_code=status, headers={}, request=None))


@pytest.mark.parametrize(
    ("name", "where"),
    [(None, "ada/healed"), ("small", "ada/small"), ("ada/small", "ada/small"), ("engines/small", "engines/small")],
)
def test_the_repository_is_told(hub, name, where):
    assert check_hub(config(hub_model_id=name)) == where


@pytest.mark.parametrize(
    ("reply", "settings", "message"),
    [
        (ACCOUNT, {"hub_token": None}, "needs a token of the hub: log in with `hf auth login`"),
        (ACCOUNT, {"hub_model_id": "else/small"}, "writes for ada, engines, and not for else"),
        ({**ACCOUNT, "auth": {"accessToken": {"role": "read"}}}, {}, "may only read"),
        (refusal(401), {}, "the hub refuses the token"),
        (OfflineModeIsEnabled("off"), {}, "HF_HUB_OFFLINE is set"),
    ],
    ids=["none", "other", "read", "unknown", "offline"],
)
def test_what_the_hub_would_refuse_is_refused(hub, reply, settings, message):
    hub(reply)
    with pytest.raises(ValueError, match=message) as error:
        check_hub(config(**settings))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("reply", [refusal(503), ConnectionError("no route")], ids=["down", "no network"])
def test_a_hub_that_is_not_reached_is_no_error_and_is_told(hub, reply):
    hub(reply)
    assert "is not checked" in check_hub(config())
