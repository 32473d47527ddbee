"""Keys and passwords do not leave the process that was given them."""

import copy
import json
import pickle

import pytest
import torch

from tipdistill import TIPConfig
from tipdistill.redact import is_secret_variable, secret_names, without_secrets

SECRET = "hf_hunter2"


@pytest.fixture
def config(tmp_path):
    return TIPConfig(
        str(tmp_path / "run"),
        use_cpu=True,
        bf16=False,
        hub_token=SECRET,
        model_init_kwargs={"token": SECRET, "dtype": "auto"},
        teacher_model_init_kwargs={"token": SECRET},
    )


def test_nothing_that_is_written_of_a_configuration_holds_a_key(config, tmp_path):
    torch.save(config, tmp_path / "training_args.bin")
    texts = [
        (tmp_path / "training_args.bin").read_bytes().decode("latin-1"),
        pickle.dumps(config).decode("latin-1"),
        repr(config),
        str(config),
        json.dumps(config.to_dict(), default=str),
        config.to_json_string(),
        json.dumps(config.to_sanitized_dict(), default=str),
    ]
    for text in texts:
        assert SECRET not in text
        assert "hunter2" not in text
    assert pickle.loads(pickle.dumps(config)).retention == config.retention


def test_the_process_itself_and_copies_in_it_keep_the_key(config):
    pickle.dumps(config)
    for kept in (config, copy.copy(config), copy.deepcopy(config)):
        assert (kept.hub_token, kept.model_init_kwargs["token"]) == (SECRET, SECRET)


@pytest.mark.parametrize("name", ["teacher_url", "vllm_server_base_url"])
def test_a_password_in_an_address_is_refused_before_it_is_shown(tmp_path, name):
    with pytest.raises(ValueError, match=name) as raised:
        TIPConfig(str(tmp_path), use_cpu=True, bf16=False, **{name: "http://me:hunter2@host:8000/v1"})
    assert "hunter2" not in str(raised.value)


def test_names_that_are_no_secrets_stay():
    kept = {"pad_token": "<pad>", "max_tokens": 4, "teacher_api_key_env": "K", "key": 1, "eos_token": "e"}
    assert without_secrets(kept) == kept
    nested = {"a": [{"api_key": "x"}], "password": None, "b": {"HF_TOKEN": "y", "use_auth_token": "z"}}
    assert secret_names(nested) == ["a.api_key", "b.HF_TOKEN", "b.use_auth_token"]
    assert without_secrets(nested) == {"a": [{"api_key": None}], "password": None, "b": dict.fromkeys(nested["b"])}


def test_json_texts_are_looked_into():
    text = json.dumps({"token": SECRET, "more": [{"api_key": SECRET, "a": 1}]})
    assert secret_names({"teacher_model_init_kwargs": text}) == [
        "teacher_model_init_kwargs.token",
        "teacher_model_init_kwargs.more.api_key",
    ]
    kept = without_secrets({"deepspeed": text, "plain": '{"dtype": "auto"}', "no JSON": "{Q}", "deep": "[" * 99_999})
    assert json.loads(kept["deepspeed"]) == {"token": None, "more": [{"api_key": None, "a": 1}]}
    assert [kept[name] for name in ("plain", "no JSON", "deep")] == ['{"dtype": "auto"}', "{Q}", "[" * 99_999]


def test_variables_that_hold_keys():
    secret = ("MY_AUTH", "AUTHORIZATION", "PROXY_AUTH_BASIC", "DB_PASS", "DB_PWD", "GPG_PASSPHRASE", "hf_token")
    assert all(map(is_secret_variable, secret))
    assert not any(map(is_secret_variable, ("GIT_AUTHOR", "AUTHOR_NAME", "TOKENIZERS_PARALLELISM", "BYPASS")))
