"""The two sides, each started once, and only when a test needs it."""

import pytest

from contract.sides import EngineSide, emulator_side


@pytest.fixture(scope="session")
def emulated(tmp_path_factory):
    with emulator_side(tmp_path_factory.mktemp("emulator")) as side:
        yield side


@pytest.fixture(scope="session")
def real(real_engine):
    return EngineSide(real_engine)


@pytest.fixture(scope="session", params=["emulator", "engine"])
def side(request):
    return request.getfixturevalue({"emulator": "emulated", "engine": "real"}[request.param])
