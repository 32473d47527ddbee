"""Commands, recipes and arguments: what is refused, and how plainly."""

import importlib.util
import os
import signal
import subprocess
import sys

import pytest
import yaml

from tipdistill.cli import COMMANDS, end_process, main
from tipdistill.recipes import recipe_head, recipe_names, recipe_path
from tipdistill.recipes.read import parse

MODELS = ["--model_name_or_path", "student", "--teacher_model_name_or_path", "teacher", "--dataset_name", "prompts"]
CPU = ["--use_cpu", "--bf16", "false"]


def write(path, settings):
    path.write_text(settings if isinstance(settings, str) else yaml.safe_dump(settings))
    return ["--config", str(path)]


def test_help_lists_every_command_and_each_has_a_module(capsys):
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    for name, (module, _) in COMMANDS.items():
        assert f"\n  {name} " in shown
        assert importlib.util.find_spec(module, "tipdistill.cli") is not None


@pytest.mark.parametrize(
    "arguments", [["--help"], ["train", "--help"], ["train", "--help", "all"], ["recipes"]], ids=str
)
def test_the_command_line_itself_imports_nothing_heavy(arguments):
    """It answers in a tenth of a second: torch, TRL and the like wait until a command needs them."""
    check = (
        f"import sys, tipdistill.cli as cli; cli.main({arguments});"
        "print([name for name in ('torch', 'trl', 'transformers', 'datasets', 'numpy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("tipdistill ")


def test_unknown_command(capsys):
    assert main(["trian"]) == 2
    assert "no command 'trian'. Did you mean 'train'?" in capsys.readouterr().err
    assert main(["zzz"]) == 2
    assert "no command 'zzz'. There are demo, probe, score, " in capsys.readouterr().err
    assert main(["recipes", "show", "zzz"]) == 2
    assert "no recipe 'zzz'. There are laptop, " in capsys.readouterr().err


def test_an_error_is_one_line_and_its_traceback_is_there_on_request(capsys, monkeypatch):
    assert main(["train", "--config", "no/such.yaml"]) == 2
    error = capsys.readouterr().err
    assert error == "tipdistill train: there is no file no/such.yaml.\n"
    monkeypatch.setenv("TIPDISTILL_DEBUG", "1")
    assert main(["train", "--config", "no/such.yaml"]) == 2
    assert "Traceback" in capsys.readouterr().err


# What gloo's threads do now and then, done for certain: a thread in C++ asks for the GIL of a finalizing interpreter.
ENDS_LATE = """
import atexit, threading, time
from datetime import timedelta
from torch.distributed import DistStoreError, HashStore
from tipdistill.cli import end_process

class Slow:
    def __del__(self, sleep=time.sleep):
        print("finalizing", flush=True)
        sleep(6)

def wait():
    try:
        HashStore().wait(["never"], timedelta(seconds=3))
    except DistStoreError:
        pass

slow = Slow()
threading.Thread(target=wait, daemon=True).start()
threading.Thread(target=lambda: (time.sleep(0.2), print("joined"))).start()
atexit.register(print, "exit handler")
end_process(3)
"""


def test_one_process_of_several_ends_with_its_code_whatever_a_thread_still_holds():
    def run(**environment):
        command = [sys.executable, "-c", ENDS_LATE]
        return subprocess.run(command, capture_output=True, text=True, timeout=120, env={**os.environ, **environment})

    if sys.platform == "linux" and sys.version_info < (3, 14):  # others end the thread otherwise, or leave it waiting
        assert run(WORLD_SIZE="1").returncode == -signal.SIGABRT
    done = run(WORLD_SIZE="2")
    assert (done.returncode, done.stdout.split("\n")) == (3, ["joined", "exit handler", ""])


def test_a_process_alone_ends_as_any_other(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(SystemExit) as ended:
        end_process(3)
    assert ended.value.code == 3


def test_interruption(capsys, monkeypatch):
    def interrupt(argv):
        raise KeyboardInterrupt

    monkeypatch.setattr("tipdistill.cli.recipes.main", interrupt)
    assert main(["recipes"]) == 130
    assert "interrupted" in capsys.readouterr().err


def test_recipes_are_listed_with_hardware_and_command_and_shown_in_full(capsys):
    assert main(["recipes"]) == 0
    listed = capsys.readouterr().out
    for name in recipe_names():
        assert f"command: tipdistill train --config {name}" in listed
    assert "hardware: 8 × H200" in listed
    assert main(["recipes", "show", "qwen3-8b-4b"]) == 0
    assert capsys.readouterr().out == recipe_path("qwen3-8b-4b").read_text(encoding="utf-8")
    assert main(["recipes", "show", "qwen3"]) == 2
    assert "Did you mean 'qwen3-8b-4b'" in capsys.readouterr().err
    assert main(["recipes", "shwo", "laptop"]) == 2


def test_the_head_of_a_recipe_continues_by_indent(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(
        "# One line.\n#\n# Command: a\n# Expected: b\n#   and c\n# Loose: words\n\nretention: 1\n# Not: this\n"
    )
    summary, notes = recipe_head(path)
    assert summary == "One line."
    assert notes == {"Command": "a", "Expected": "b and c", "Loose": "words"}


# Arguments.


def test_yaml_sets_and_flags_override(tmp_path):
    config = write(tmp_path / "r.yaml", {"retention": 0.2, "learning_rate": "1e-4", "use_cpu": True, "lora_r": 3})
    request = parse([*config, *MODELS, "--retention", "0.4"])
    assert (request.config.retention, request.config.learning_rate, request.model.lora_r) == (0.4, 1e-4, 3)
    assert parse([f"--config={config[1]}", *MODELS]).config.retention == 0.2
    assert request.values["retention"] == 0.4


def test_a_packaged_recipe_is_found_by_name():
    request = parse(["--config", "qwen3-8b-4b", "--use_vllm", "false", *CPU])
    assert request.model.model_name_or_path == "Qwen/Qwen3-4B"
    assert request.config.num_generations == 16


def test_environment_of_a_recipe_is_set_and_its_secrets_are_not_written_down(tmp_path, monkeypatch):
    monkeypatch.delenv("TIP_TEST_MODE", raising=False)
    config = write(tmp_path / "r.yaml", {"env": {"TIP_TEST_MODE": 1, "TIP_API_KEY": "x"}, "hub_token": "y"})
    config.append("--trust_recipe")
    request = parse([*config, *MODELS, *CPU])
    assert request.values["env"] == {"TIP_TEST_MODE": "1"}
    assert "hub_token" not in request.values
    assert request.config.hub_token == "y"

    # libraries read it when they are imported, so the run starts in a process of its own
    started = []

    def start(command, environment):
        started.append((command, environment))
        return 0

    monkeypatch.setattr("tipdistill.recipes.run.supervise", start)
    assert main(["train", *config, *MODELS, *CPU]) == 0
    ((command, environment),) = started
    assert command[1:5] == ["-m", "tipdistill.cli", "train", "--config"]
    assert "--trust_recipe" in command
    assert environment["TIP_TEST_MODE"] == "1"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"retension": 0.5}, "there is no field 'retension'. Did you mean 'retention'"),
        ({"retention": "half"}, "retention must be of type float, got 'half'"),
        ({"retention": True}, "retention must be of type float, got True"),
        ({"retention": [0.5]}, "retention must be of type float, got [0.5]"),
        ({"retention": None}, "retention must be of type float, got None"),
        ({"top_p": True}, "top_p must be of type float, got True"),  # True == 1.0, the default
        ({"max_steps": 5.5}, "max_steps must be of type int, got 5.5"),
        ({"use_peft": "maybe"}, "use_peft must be true or false, got 'maybe'"),
        ({"lr_scheduler_type": "cosin"}, "lr_scheduler_type must be one of"),
        ({"datasets": [{"path": "d", "spilt": "train"}]}, "datasets: there is no field 'spilt'. Did you mean 'split'"),
        ({"env": ["A"]}, "`env` must map names"),
        ("- retention\n", "must hold a mapping of fields to values, got list"),
        ("retention: [0.5\n", "is not valid YAML"),
    ],
    ids=str,
)
def test_bad_yaml_is_refused(tmp_path, capsys, settings, message):
    assert main(["train", *write(tmp_path / "r.yaml", settings), *MODELS]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--retension", "0.5"], "there is no flag --retension. Did you mean --retention"),
        (["--max-stepz=3"], "there is no flag --max-stepz. Did you mean --max_steps"),
        # argparse would take a prefix for the flag itself
        (["--max_step", "3"], "there is no flag --max_step. Did you mean --max_steps"),
        (["recipe.yaml"], "a recipe is given as --config recipe.yaml"),
        (["--retention", "half"], "invalid float value: 'half'"),
        (["--retention", "1.5"], "retention must be in (0, 1], got 1.5"),
        (["--selection_rule", "softor"], "soft_or"),
        (["--max_prompt_length", "0"], "max_prompt_length must be at least 1, got 0"),
        (["--dataset_streaming", "true", "--num_generations", "2"], "num_generations = 2 repeats prompts"),
        (["--streaming", "true", "--num_generations", "2"], "num_generations = 2 repeats prompts"),
        (["--teacher_model_name_or_path", ""], "no teacher given: name it with --teacher_model_name_or_path"),
        (["--model_name_or_path", ""], "no student given: name it with --model_name_or_path"),
        (["--dataset_name", ""], "prompts come from --dataset_name"),
        (["--config", "a", "--config", "b"], "--config takes one YAML file"),
        (["--config", "qwen3-8b.yaml"], "there is no file qwen3-8b.yaml. Did you mean 'qwen3-8b-4b'"),
        (["--config", "qwen3-8b"], "there is no recipe 'qwen3-8b'. Did you mean 'qwen3-8b-4b'"),
        (["--report_to", "wandbd"], "Did you mean 'wandb' or"),
        (["--attn_implementation", "flash_attn_2"], "Did you mean 'flash_attention_2' or"),
    ],
    ids=str,
)
def test_bad_flags_are_refused(capsys, flags, message):
    assert main(["train", *MODELS, *CPU, *flags]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("flags", "package", "command"),
    [
        (["--use_peft"], "peft", 'pip install "tipdistill[peft]"'),
        (["--use_vllm"], "vllm", 'pip install "tipdistill[vllm]"'),
        (["--deepspeed", "zero.json"], "deepspeed", 'pip install "tipdistill[deepspeed]"'),
        (["--accelerate_config", "zero3"], "deepspeed", 'pip install "tipdistill[deepspeed]"'),
        (["--load_in_4bit"], "bitsandbytes", "pip install bitsandbytes"),
        (["--report_to", "wandb"], "wandb", "pip install wandb"),
        (["--report_to", "trackio"], "trackio", "pip install trackio"),
        (["--optim", "adamw_bnb_8bit"], "bitsandbytes", "pip install bitsandbytes"),
        (["--optim", "galore_adamw"], "galore_torch", "pip install galore-torch"),
        (["--use_liger_kernel"], "liger_kernel", "pip install liger-kernel"),
        (
            ["--attn_implementation", "flash_attention_2"],
            "flash_attn",
            "pip install flash-attn, or pip install kernels",
        ),
        (["--attn_implementation", "kernels-community/flash-attn2"], "kernels", "pip install kernels"),
    ],
)
def test_a_missing_package_is_named_with_its_command(capsys, monkeypatch, flags, package, command):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name, *rest: None if name in (package, "kernels") else find_spec(name, *rest)
    )
    assert main(["train", *MODELS, *CPU, *flags]) == 2
    assert f"needs the package {package}, which is not installed: {command}" in capsys.readouterr().err


def test_prompts_come_from_one_place(tmp_path, capsys):
    config = write(tmp_path / "r.yaml", {"datasets": [{"path": "d"}]})
    assert main(["train", *config, *MODELS]) == 2
    assert "give one of the two" in capsys.readouterr().err


def test_remote_code_is_trusted_only_when_asked():
    assert parse([*MODELS, *CPU]).config.trust_remote_code is False
    assert parse([*MODELS, *CPU, "--trust_remote_code"]).config.trust_remote_code is True


def test_a_reader_that_stops_is_no_error():
    """As in `tipdistill recipes | head -1`, where head may be gone before anything is written."""
    running = subprocess.Popen(
        [sys.executable, "-m", "tipdistill.cli", "recipes", "show", "laptop"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    running.stdout.close()
    assert running.stderr.read() == ""
    assert running.wait() == 141
