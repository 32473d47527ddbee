"""The JSON schema of recipes, and the help that is read from it."""

import json
import subprocess
import sys

import pytest
import yaml

from tipdistill import TIPConfig, cli
from tipdistill.recipes import recipe_names, recipe_path
from tipdistill.recipes.fields import SCHEMA, SECTIONS, check_flags, help_text, read_fields
from tipdistill.recipes.read import TYPES as DATACLASSES
from tipdistill.recipes.read import TIPScriptArguments, _Parser, parse
from tipdistill.recipes.schema import schema

TYPES = {"boolean": bool, "integer": int, "number": (int, float), "string": str, "object": dict, "array": list}


def allows(field, value):
    """Whether a field of the schema takes a value, as JSON Schema reads `type` and `enum`."""
    if "enum" in field:
        return value in field["enum"]
    kinds = [field["type"]] if isinstance(field["type"], str) else field["type"]
    if value is None:
        return "null" in kinds
    if isinstance(value, bool):
        return "boolean" in kinds
    return any(isinstance(value, TYPES[kind]) for kind in kinds if kind not in ("null", "boolean"))


def test_the_file_is_what_the_dataclasses_say():
    assert json.loads(SCHEMA.read_text(encoding="utf-8")) == schema(), "python -m tipdistill.recipes.schema writes it"


@pytest.mark.parametrize("name", recipe_names())
def test_every_packaged_recipe_is_one_by_the_schema(name):
    fields = json.loads(SCHEMA.read_text(encoding="utf-8"))["properties"]
    for field, value in yaml.safe_load(recipe_path(name).read_text(encoding="utf-8")).items():
        assert allows(fields[field], value), field


@pytest.mark.parametrize(
    ("field", "value"),
    [("retention", "half"), ("use_cpu", "yes"), ("max_steps", 1.5), ("lr_scheduler_type", "cosin"), ("datasets", {})],
)
def test_the_schema_refuses_what_a_recipe_may_not_hold(field, value):
    assert not allows(read_fields()[field], value)


def test_a_recipe_cannot_vouch_for_itself_and_holds_what_it_sets():
    properties = json.loads(SCHEMA.read_text(encoding="utf-8"))["properties"]
    assert "trust_recipe" not in properties
    assert {"env", "retention", "learning_rate"} <= properties.keys()
    assert properties["retention"]["default"] == TIPConfig.__dataclass_fields__["retention"].default


def test_every_field_of_ours_is_in_the_short_help():
    ours = [name for kind in (TIPConfig, TIPScriptArguments) for name in kind.__annotations__]
    shown = [name for names in SECTIONS.values() for name in names]
    assert len(ours) > 30
    assert set(ours) <= set(shown)
    assert len(set(shown)) == len(shown)


def test_help_begins_with_ours_and_tells_how_to_see_the_rest(capsys):
    assert cli.main(["train", "--help"]) == 0
    short = capsys.readouterr().out
    assert short.startswith("usage: tipdistill train --config RECIPE")
    assert "--retention\n      Share of the completion tokens that is trained on, in (0, 1]. [0.5]" in short
    assert "--adam_beta2" not in short
    assert "tipdistill train --help all" in short
    assert max(map(len, short.splitlines())) <= 100
    assert cli.main(["train", "--help", "all"]) == 0
    everything = capsys.readouterr().out
    listed = [line.strip().partition(",")[0] for line in everything.splitlines() if line.startswith("  --")]
    assert sorted(listed) == sorted(f"--{name}" for name in read_fields() if name != "env")
    assert "  --model_name_or_path, --model\n" in short
    assert everything.index("--retention") < everything.index("--adam_beta2")


def test_help_needs_no_library_of_training():
    import subprocess
    import sys

    code = (
        "import sys; from tipdistill.cli import main; main(['train', '--help']); "
        "assert not {'transformers', 'trl', 'datasets', 'accelerate'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_the_path_of_the_schema_is_printed(capsys):
    assert cli.main(["recipes", "schema"]) == 0
    assert capsys.readouterr().out.strip() == str(SCHEMA)


def test_a_help_text_needs_no_recipe():
    assert "one of: a, b." in help_text(False, ["a", "b"])


@pytest.mark.parametrize("form", ["--{}", "--{}="])
def test_the_other_commands_names_are_flags_of_train_too(form):
    pairs = {"model": "s", "teacher": "t", "dataset": "d"}
    flags = [
        text
        for name, value in pairs.items()
        for text in ([form.format(name) + value] if form.endswith("=") else [form.format(name), value])
    ]
    request = parse([*flags, "--use_cpu", "--max_completion_length", "9"])
    assert (request.model.model_name_or_path, request.config.teacher_model_name_or_path) == ("s", "t")
    assert (request.script.dataset_name, request.config.max_completion_length) == ("d", 9)


def test_a_default_of_the_schema_is_that_of_a_run():
    config = parse(
        ["--model_name_or_path", "s", "--teacher_model_name_or_path", "t", "--dataset_name", "d", "--use_cpu"]
    )
    for name in ("retention", "selection_rule", "drift_factor", "record_rollouts", "eval_num_samples"):
        assert getattr(config.config, name) == read_fields()[name]["default"]


def test_every_flag_that_the_parser_takes_passes_the_early_look():
    flags = [flag for action in _Parser(DATACLASSES)._actions for flag in action.option_strings]
    assert len(flags) > 300
    check_flags([flag for flag in flags if flag not in ("-h", "--help")])


def test_a_flag_that_is_none_is_refused_before_anything_is_loaded():
    command = "from tipdistill.cli import main; code = main(['train', '--retension', '1']); import sys; "
    command += "print(code, 'torch' in sys.modules, 'transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.split() == ["2", "False", "False"]
    assert "Did you mean --retention" in done.stderr
