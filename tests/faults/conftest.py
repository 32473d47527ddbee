import shutil

import pytest


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    if shutil.which("cc") is None:
        pytest.skip("no C compiler for the preload")
    from faults import world as worlds

    return worlds.build(tmp_path_factory.mktemp("world"))
