"""A recipe is code: it runs where somebody said yes to it, and a dry run imports nothing that it names."""

import json
import sys

import pytest
import yaml

from tipdistill import dotted
from tipdistill.cli import main
from tipdistill.recipes.read import parse, read_values
from tipdistill.recipes.trust import check_environment, code_named
from tipdistill.select import resolve_rule
from tipdistill.sweep import read_grid
from tipdistill.tasks import load_task

PAIR = ["--model_name_or_path", "s", "--teacher_model_name_or_path", "t", "--dataset_name", "d", "--use_cpu", "true"]
PAIR += ["--bf16", "false"]


@pytest.fixture
def traps(tmp_path, monkeypatch):
    """A package whose every module leaves a file when it is imported; returns what was imported so far."""
    package = tmp_path / "trapped" / "inner"
    package.mkdir(parents=True)
    for path in (package.parent / "__init__.py", package / "__init__.py", package / "rules.py"):
        path.write_text(
            f"import pathlib\npathlib.Path({str(tmp_path)!r}, 'imported').touch()\n"
            "def rule(scores): return scores.entropy\n"
            "TASK = {'problems': [('1', '1')]}\n"
        )
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path / "imported"
    for name in [name for name in sys.modules if name.split(".")[0] == "trapped"]:
        del sys.modules[name]


def recipe(tmp_path, **settings):
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(settings))
    return ["--config", str(tmp_path / "r.yaml")]


NAMES_CODE = {
    "rule": {"selection_rule": "trapped.inner.rules.rule"},
    "rule with a colon": {"selection_rule": "trapped.inner.rules:rule"},
    "complement": {"selection_rule": "complement:trapped.inner.rules.rule"},
    "task": {"eval_tasks": "math500, trapped.inner.rules.TASK[:1]", "eval_steps": 1},
    "env": {"env": {"OMP_NUM_THREADS": 1}},
    "remote code": {"trust_remote_code": True},
    "remote code as a text": {"trust_remote_code": "yes"},
    "remote code of the model": {"model_init_kwargs": {"trust_remote_code": True}},
    "remote code in JSON": {"model_init_kwargs": '{"\\u0074rust_remote_code": true}'},
    "remote code of the teacher in JSON": {"teacher_model_init_kwargs": ' {"trust_remote_code": true}'},
    "kernels": {"model_init_kwargs": {"use_kernels": True}},
    "kernel of a part": {"teacher_model_init_kwargs": {"attn_implementation": {"": "someone/kernels"}}},
    "kernel in JSON": {"model_init_kwargs": '{"attn_implementation": "someone\\u002fkernels"}'},
    "kernel of experts": {"model_init_kwargs": {"experts_implementation": "someone/kernels"}},
    "proxies": {"model_init_kwargs": {"proxies": {"https": "http://h"}}},
    "launcher in capitals": {"accelerate_config": "theirs.YAML"},
    "kernel": {"attn_implementation": "someone/kernels"},
    "launcher": {"accelerate_config": "theirs.yaml"},
    "key": {"teacher_url": "http://h/v1", "teacher_api_key_env": "AWS_SECRET_ACCESS_KEY"},
}


@pytest.mark.parametrize("settings", NAMES_CODE.values(), ids=NAMES_CODE)
def test_a_recipe_that_names_code_is_refused_in_a_line_that_lists_it(traps, tmp_path, capsys, settings):
    flags = PAIR if "teacher_url" not in settings else [*PAIR[:2], *PAIR[4:]]
    for command in ("train", "plan"):
        assert main([command, *recipe(tmp_path, **settings), *flags]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert "give --trust_recipe" in error
        assert code_named(settings)[0] in error
    assert not traps.exists()


def test_what_names_code_in_other_ways(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "evilacc").write_text("use_cpu: true")
    assert code_named({"accelerate_config": "evilacc"}) == ["accelerate_config: evilacc"]
    assert code_named({"accelerate_config": "zero2"}) == []
    (tmp_path / "zero2").write_text("use_cpu: true")  # TRL takes a file before its preset
    assert code_named({"accelerate_config": "zero2"}) == ["accelerate_config: zero2"]
    assert code_named({"attn_implementation": {"": "a/b"}}) == ["attn_implementation: {'': 'a/b'}"]
    assert code_named({"eval_tasks": ["mine.task"]}) == ["eval_tasks: mine.task"]
    assert code_named({"model_init_kwargs": {"trust_remote_code": "no"}})  # a text that is true
    plain = {"dtype": "auto", "trust_remote_code": False, "attn_implementation": {"": "sdpa"}, "use_kernels": False}
    for options in (plain, json.dumps(plain), None, "null"):
        assert code_named({"model_init_kwargs": options, "teacher_model_init_kwargs": options}) == []


WRONG = {
    "tasks as a list": ({"eval_tasks": ["evilmod.task"], "eval_steps": 1}, "eval_tasks must be a text"),
    "set": ({"eval_tasks": {"a"}}, "eval_tasks must be a text"),
    "set of options": ({"model_init_kwargs": {"a"}}, "model_init_kwargs must be a mapping"),
    "list": ({"model_init_kwargs": [1]}, "model_init_kwargs must be a mapping"),
    "number": ({"teacher_model_init_kwargs": 5}, "teacher_model_init_kwargs must be a mapping"),
    "JSON of a list": ({"model_init_kwargs": "[1]"}, "model_init_kwargs must be a mapping"),
    "no JSON": ({"chat_template_kwargs": "{bad"}, "chat_template_kwargs, line 1: not valid JSON"),
    "deep": ({"model_init_kwargs": '{"a":' * 100_000 + "1" + "}" * 100_000}, "model_init_kwargs .*nested too deeply"),
    "deep enough": ({"chat_template_kwargs": '{"a":' * 500 + "1" + "}" * 500}, "chat_template_kwargs .*too deeply"),
    "no JSON of deepspeed": ({"deepspeed": "{bad"}, "deepspeed, line 1: not valid JSON"),
    "text for a switch": (
        {"model_init_kwargs": {"trust_remote_code": "no"}},
        "model_init_kwargs: trust_remote_code must be true or false",
    ),
    "kernels of parts": ({"attn_implementation": {"": "a/b"}}, "attn_implementation must be a text"),
    "datasets": ({"datasets": 5}, "datasets must be a list"),
    "key": (
        {"teacher_api_key_env": "sk-hunter2", "teacher_url": "http://h/v1"},
        "teacher_api_key_env must be the name of an environment",
    ),
    "password": (
        {"teacher_api_key_env": "K", "teacher_url": "http://u:hunter2%40h/v1"},
        "teacher_url holds a user name or a password",
    ),
}


@pytest.mark.parametrize(("settings", "error"), WRONG.values(), ids=WRONG)
def test_a_value_of_another_kind_is_one_line_that_names_file_and_field(tmp_path, settings, error):
    with pytest.raises(ValueError, match=rf"r\.yaml: {error}") as raised:
        parse([*recipe(tmp_path, **settings), *PAIR])
    assert "\n" not in str(raised.value)
    assert "hunter2" not in str(raised.value)


def test_a_flag_of_another_kind_is_one_line(tmp_path):
    for text in ("{bad", "5", '{"a":' * 100_000):
        with pytest.raises(ValueError, match=r"argument --model_init_kwargs\S*: its value"):
            parse([*PAIR, "--model_init_kwargs", text])


def test_a_plain_value_of_a_text_is_what_its_flag_would_be(tmp_path):
    request = parse([*recipe(tmp_path, run_name=2024, model_init_kwargs='{"dtype": "auto"}'), *PAIR])
    assert (request.config.run_name, request.config.model_init_kwargs) == ("2024", {"dtype": "auto"})


def test_a_dry_run_takes_code_out_of_the_models_arguments(tmp_path):
    code = {"trust_remote_code": True, "use_kernels": True, "dtype": "auto"}
    settings = {"model_init_kwargs": code, "teacher_model_init_kwargs": json.dumps(code)}
    request = parse([*recipe(tmp_path, **settings), *PAIR, "--dry_run"])
    assert request.config.model_init_kwargs == request.config.teacher_model_init_kwargs == {"dtype": "auto"}
    assert request.values["model_init_kwargs"] == code  # what is shown is what was asked for
    trusted = parse([*recipe(tmp_path, **settings), *PAIR, "--dry_run", "--trust_recipe"])
    assert trusted.config.model_init_kwargs == code


def test_a_key_in_json_is_not_written_down(tmp_path):
    text = json.dumps({"token": "hunter2", "dtype": "auto"})
    for arguments in (recipe(tmp_path, teacher_model_init_kwargs=text), ["--teacher_model_init_kwargs", text]):
        request = parse([*arguments, *PAIR])
        assert request.values["teacher_model_init_kwargs"] == {"token": None, "dtype": "auto"}
        assert request.config.teacher_model_init_kwargs["token"] == "hunter2"


@pytest.mark.parametrize("settings", [NAMES_CODE["rule"], NAMES_CODE["env"]], ids=["rule", "env"])
def test_it_runs_where_somebody_vouched_for_it(traps, tmp_path, settings):
    request = parse([*recipe(tmp_path, **settings), *PAIR, "--trust_recipe"])
    assert traps.exists() == ("selection_rule" in settings)
    assert "trust_recipe" not in request.values
    assert read_values([*recipe(tmp_path, **settings), *PAIR, "--trust_recipe"]).trust_recipe


def test_nobody_is_asked_about_his_own_flags_nor_about_packaged_recipes(traps, tmp_path):
    assert parse([*recipe(tmp_path, retention=0.2), *PAIR, "--selection_rule", "trapped.inner.rules.rule"])
    assert traps.exists()
    assert parse([*recipe(tmp_path, selection_rule="trapped.inner.rules.rule"), *PAIR, "--selection_rule", "all"])
    assert parse(["--config", "laptop"])
    assert parse([*recipe(tmp_path, selection_rule="tipdistill.select.rules:entropy"), *PAIR])


def test_no_recipe_vouches_for_itself(tmp_path):
    for value in (True, "true", False):
        with pytest.raises(ValueError, match="no recipe vouches for itself"):
            parse([*recipe(tmp_path, trust_recipe=value, selection_rule="all"), *PAIR])


@pytest.mark.parametrize(("answer", "runs"), [("y\n", True), ("\n", False), ("no\n", False), ("", False)])
def test_on_a_terminal_it_is_a_question(traps, tmp_path, monkeypatch, capsys, answer, runs):
    class Terminal:
        def isatty(self):
            return True

        def readline(self):
            return answer

    monkeypatch.setattr("sys.stdin", Terminal())
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    for name in ("LOCAL_RANK", "TIPDISTILL_LAUNCHED"):
        monkeypatch.delenv(name, raising=False)
    arguments = [*recipe(tmp_path, selection_rule="trapped.inner.rules.rule"), *PAIR]
    if runs:
        assert parse(arguments).config.selection_rule == "trapped.inner.rules.rule"
    else:
        with pytest.raises(ValueError, match="--trust_recipe"):
            parse(arguments)
    assert "trapped.inner.rules.rule" in capsys.readouterr().err
    assert traps.exists() == runs


def test_a_dry_run_imports_nothing_that_the_recipe_names_and_starts_nothing(
    traps, tmp_path, tiny_model_dir, word_problems, capsys, monkeypatch
):
    monkeypatch.setattr("tipdistill.recipes.run.supervise", lambda *_, **__: pytest.fail("something was started"))
    settings = {
        "selection_rule": "trapped.inner.rules.rule",
        "eval_tasks": "trapped.inner.rules.TASK",
        "eval_steps": 1,
        "env": {"OMP_NUM_THREADS": 1},
        "model_name_or_path": str(tiny_model_dir("qwen3", "student")),
        "teacher_model_name_or_path": str(tiny_model_dir("qwen3", "teacher")),
        "dataset_name": str(word_problems),
        "max_completion_length": 64,
    }
    arguments = [*recipe(tmp_path, **settings), "--use_cpu", "true", "--bf16", "false", "--dry_run"]
    for trusted in ([], ["--trust_recipe"]):
        assert main(["train", *arguments, *trusted]) == 0
        shown = capsys.readouterr().out
        assert "selection_rule: trapped.inner.rules.rule" in shown
        assert ("# code" in shown) == (not trusted)
    assert not traps.exists()
    recipe(tmp_path, **{**settings, "selection_rule": "trapped.inner.ruels.rule"})
    assert main(["train", *arguments]) == 2
    assert "there is no module trapped.inner.ruels" in capsys.readouterr().err
    assert not traps.exists()


def test_a_models_own_code_does_not_run_in_a_dry_run(tmp_path, word_problems, tiny_model_dir, capsys):
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(
        json.dumps({"model_type": "own", "auto_map": {"AutoConfig": "configuration_own.OwnConfig"}})
    )
    (model / "configuration_own.py").write_text(
        f"import pathlib\npathlib.Path({str(tmp_path)!r}, 'ran').touch()\n"
        "from transformers import PretrainedConfig\nclass OwnConfig(PretrainedConfig):\n    model_type = 'own'\n"
    )
    settings = {"trust_remote_code": True, "model_name_or_path": str(model), "dataset_name": str(word_problems)}
    settings["teacher_model_name_or_path"] = str(tiny_model_dir("qwen3", "teacher"))
    flags = ["--use_cpu", "true", "--bf16", "false"]
    assert main(["train", *recipe(tmp_path, **settings), *flags, "--dry_run"]) == 2
    assert main(["train", *recipe(tmp_path, **settings), *flags]) == 2
    assert main(["plan", *recipe(tmp_path, **settings), "--gpus", "1", "--machine", "h100"]) == 2
    assert "--trust_recipe" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "ran").exists()


def grid(tmp_path, **settings):
    path = tmp_path / "grid.yaml"
    plain = {"base": "laptop", "cells": {"all": 1.0}, "learning_rates": 1e-3, "seeds": [0], "test": "arithmetic[:4]"}
    path.write_text(yaml.safe_dump({**plain, **settings}, sort_keys=False))
    return path


@pytest.mark.parametrize(
    "settings",
    [
        {"cells": {"trapped.inner.rules.rule": 0.5}},
        {"cells": {"mine": {"rule": "trapped.inner.rules.rule", "retentions": 0.5}}},
        {"test": ["trapped.inner.rules.TASK[:1]"]},
        {"validation": {"task": "trapped.inner.rules.TASK", "seeds": [0]}},
        {"overrides": {"trust_remote_code": True}},
        {"cells": {"mine": {"rule": "all", "retentions": 1.0, "overrides": {"env": {"OMP_NUM_THREADS": 1}}}}},
        {"base": "BASE"},
    ],
    ids=["rule", "named rule", "test", "validation", "overrides", "overrides of a row", "base"],
)
def test_a_grid_is_a_recipe_too(traps, tmp_path, capsys, settings):
    if "base" in settings:
        recipe(tmp_path, selection_rule="trapped.inner.rules.rule")
        settings = {"base": str(tmp_path / "r.yaml")}
    assert main(["sweep", str(grid(tmp_path, **settings)), "--output_dir", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "names code" in error
    assert "--trust_recipe" in error
    assert not traps.exists()
    assert not (tmp_path / "out").exists()


def test_a_dry_run_of_a_grid_imports_nothing(traps, tmp_path, capsys, tiny_model_dir, word_problems):
    base = {"model_name_or_path": str(tiny_model_dir("qwen3", "student")), "dataset_name": str(word_problems)}
    base |= {"teacher_model_name_or_path": str(tiny_model_dir("qwen3", "teacher")), "use_cpu": True, "bf16": False}
    base["max_completion_length"] = 64
    recipe(tmp_path, **base)
    cells = {"mine": {"rule": "trapped.inner.rules:rule", "retentions": [0.5, 0.2]}}
    tests = ["trapped.inner.rules.TASK[:1]", "trapped.inner.rules.TASK[1:]"]
    path = grid(tmp_path, base=str(tmp_path / "r.yaml"), cells=cells, test=tests)
    assert main(["sweep", str(path), "--dry_run", "--output_dir", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr().out
    assert "2 cells in 2 rows, 0 finished; nothing was run." in shown
    assert "selection_rule: trapped.inner.rules:rule" in shown
    assert not traps.exists()


@pytest.mark.parametrize(
    "name",
    [
        *("PYTHONPATH", "PYTHONHOME", "PYTHONSTARTUP", "PYTHONWARNINGS", "PYTHONBREAKPOINT", "PYTHONINSPECT"),
        *("LD_PRELOAD", "LD_LIBRARY_PATH", "LD_AUDIT", "DYLD_INSERT_LIBRARIES", "PATH", "BASH_ENV", "ENV", "SHELL"),
        *("HOME", "CUDA_HOME", "CC", "CXX", "NCCL_NET_PLUGIN", "VLLM_PLUGINS", "CUDA_INJECTION64_PATH", "MPLBACKEND"),
        *("TRITON_CACHE_DIR", "TORCH_EXTENSIONS_DIR", "TORCHINDUCTOR_CACHE_DIR", "HF_MODULES_CACHE", "OPENSSL_CONF"),
        *("VLLM_ALLOW_INSECURE_SERIALIZATION", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "HF_HUB_TRUST_REMOTE_CODE"),
        *("http_proxy", "HTTPS_PROXY", "HF_ENDPOINT", "WANDB_BASE_URL", "SSL_CERT_FILE", "REQUESTS_CA_BUNDLE"),
        *("OMP_TOOL_LIBRARIES", "KMP_TOOL_LIBRARIES", "HSA_TOOLS_LIB", "HF_HOME", "AWS_ENDPOINT_URL_S3", "HOSTALIASES"),
        *("COMET_URL_OVERRIDE", "AWS_CONFIG_FILE", "NCCL_CONF_FILE", "OCL_ICD_FILENAMES"),
        *("TIPDISTILL_LAUNCHED", "LOCAL_RANK", "WORLD_SIZE", "Path", "pythonpath", "GIT_SSH_COMMAND", "BROWSER"),
    ],
)
def test_variables_that_load_code_or_send_things_elsewhere_are_refused(tmp_path, name):
    with pytest.raises(ValueError, match=f"`env` may not set {name}, .*: set it in your shell"):
        parse([*recipe(tmp_path, env={name: "x"}), *PAIR, "--trust_recipe", "--dry_run"])


@pytest.mark.parametrize(
    "name",
    [
        *("CUDA_VISIBLE_DEVICES", "NCCL_DEBUG", "NCCL_SOCKET_IFNAME", "OMP_NUM_THREADS", "TOKENIZERS_PARALLELISM"),
        *("PYTORCH_CUDA_ALLOC_CONF", "VLLM_USE_V1", "WANDB_PROJECT", "HF_HUB_OFFLINE", "PYTHONHASHSEED"),
        *("TORCH_LOGS", "MY_OWN_SWITCH", "TRANSFORMERS_VERBOSITY"),
    ],
)
def test_variables_that_tune_a_run_are_set(name):
    assert check_environment("r.yaml", {name: 1}) == {name: "1"}


@pytest.mark.parametrize(
    "environment", [["A"], {"A=B": 1}, {"": 1}, {1: 1}, {"A": None}, {"A": [1]}, {"A": "a\0b"}, "A"]
)
def test_what_is_no_environment_is_refused(environment):
    with pytest.raises(ValueError, match="`env`"):
        check_environment("r.yaml", environment)


@pytest.mark.parametrize(
    "settings",
    [{"hub_token": "x"}, {"model_init_kwargs": {"token": "x"}}, {"env": {"HF_TOKEN": "x"}}],
    ids=["hub_token", "token", "env"],
)
def test_a_sweep_writes_no_key_down(tmp_path, settings, capsys):
    path = grid(tmp_path, overrides=settings)
    assert main(["sweep", str(path), "--trust_recipe", "--output_dir", str(tmp_path / "out")]) == 2
    assert "no key may stand in them" in capsys.readouterr().err


def test_names_alone_are_looked_up_without_importing_parents(traps):
    with dotted.names_only():
        assert resolve_rule("trapped.inner.rules.rule").fields is None
        assert load_task("trapped.inner.rules.TASK[:3]").problems
        for path in ("trapped.nothing.rule", "trapped.inner.rules.deeper.rule", "nowhere_at_all.rule"):
            with pytest.raises(ValueError, match="there is no module"):
                resolve_rule(path)
    assert not traps.exists()
    assert resolve_rule("trapped.inner.rules.rule")
    assert traps.exists()


@pytest.mark.parametrize("source", ["raise SystemError('no')", "1/0", "def :", "raise KeyError('x')"])
def test_a_module_that_fails_is_one_line(tmp_path, monkeypatch, source):
    (tmp_path / "failing_module.py").write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    sys.modules.pop("failing_module", None)
    with pytest.raises(ValueError, match=r"unknown rule 'failing_module\.rule'"):
        resolve_rule("failing_module.rule")


def test_a_packaged_grid_needs_no_word():
    from tipdistill.cli.sweep import _is_packaged
    from tipdistill.demo import GRIDS

    assert _is_packaged(GRIDS / "demo.yaml")
    assert read_grid(GRIDS / "demo.yaml").rows
