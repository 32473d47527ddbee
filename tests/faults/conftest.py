import shutil

import pytest
from faults import world as worlds

pytest.importorskip("peft")
if shutil.which("cc") is None:
    pytest.skip("no C compiler for the preload", allow_module_level=True)


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    return worlds.build(tmp_path_factory.mktemp("world"))
