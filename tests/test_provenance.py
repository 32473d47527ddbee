import json
import os

from tipdistill.provenance import environment


def test_the_environment_names_no_path_and_no_host():
    text = json.dumps(environment("cpu", 1))
    assert "/work" not in text
    assert os.uname().nodename not in text
