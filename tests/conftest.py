"""What holds for every test: nothing of the machine's environment reaches it."""

import os

import pytest
from hypothesis import settings

settings.register_profile("bulkwf", deadline=None, print_blob=True)
settings.load_profile("bulkwf")

_PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY")


@pytest.fixture(autouse=True)
def hermetic(monkeypatch):
    """No credential, account, address or proxy of whoever runs the tests."""
    for name in list(os.environ):
        if name.startswith(("CLOUDFLARE_", "BULKWF_")) or name.upper() in _PROXIES:
            monkeypatch.delenv(name)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder, which is also the working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path
