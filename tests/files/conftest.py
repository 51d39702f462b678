"""The files that an adapter is written to."""

import pytest


@pytest.fixture(params=[".safetensors", ".pt"])
def path(request, tmp_path):
    return tmp_path / f"adapter{request.param}"
