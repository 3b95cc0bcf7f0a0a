"""Installs the npm packages that tests need: once for each package.json, in a cache outside the tree."""

import functools
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

LEAST_NODE = 20
NOT_TESTED = "NOT TESTED"
REQUIRED = os.environ.get("BULKWF_REQUIRE_REAL_ENGINE") == "1"
"""Where it is set, a test without Node and npm fails instead of being skipped."""
_CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bulkwf-tests"
_INSTALL = ("npm", "install", "--ignore-scripts", "--no-audit", "--no-fund", "--no-package-lock", "--loglevel=error")


@functools.cache
def installed(manifest: Path) -> Path:
    """The folder whose `node_modules` has the packages of the package.json *manifest*; skips the test without Node."""
    trouble = _trouble()
    if trouble:
        text = f"Node {LEAST_NODE} and npm are needed to run Cloudflare's own code: {trouble}"
        pytest.fail(text, pytrace=False) if REQUIRED else pytest.skip(f"{NOT_TESTED}. {text}")
    text = manifest.read_bytes()
    place = _CACHE / f"{manifest.parent.name}-{hashlib.sha256(text).hexdigest()[:16]}"
    if not place.is_dir():
        _CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=_CACHE) as folder:
            fresh = Path(folder) / "new"
            fresh.mkdir()
            (fresh / "package.json").write_bytes(text)
            done = subprocess.run(_INSTALL, cwd=fresh, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr
            try:
                fresh.rename(place)
            except OSError:  # another test run has installed it meanwhile
                assert place.is_dir()
    return place


def _trouble() -> str:
    for program in ("node", "npm"):
        if shutil.which(program) is None:
            return f"there is no {program} here"
    said = subprocess.run(["node", "--version"], capture_output=True, text=True, check=True).stdout.strip()
    version = re.match(r"v([0-9]+)\.", said)
    return "" if version and int(version[1]) >= LEAST_NODE else f"this is Node {said}"
