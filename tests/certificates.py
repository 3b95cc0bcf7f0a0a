"""Certificates made by `openssl`, for servers of TLS on this machine."""

import ssl
import subprocess
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import NamedTuple

import pytest

_AUTHORITY = """
[ca]
default_ca = own
[own]
database = index.txt
new_certs_dir = .
default_md = sha256
rand_serial = yes
policy = any
copy_extensions = copy
[any]
commonName = supplied
"""


class Certificate(NamedTuple):
    """A self-signed certificate."""

    server: ssl.SSLContext
    """A server that shows it."""
    file: str
    """What a client that trusts it names as its authority."""


def make_certificate(folder: Path, *, names: str = "DNS:localhost,IP:127.0.0.1", days: int = 2) -> Certificate:
    """A certificate for *names*, valid since ten days ago and for so many days from now; skips without openssl."""
    (folder / "index.txt").touch()
    (folder / "authority.cnf").write_text(_AUTHORITY)
    now = datetime.now(UTC)
    since, until = (f"{now + timedelta(days=n):%Y%m%d%H%M%SZ}" for n in (-10, days))
    _openssl(
        folder,
        "req -new -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -subj /CN=localhost "
        f"-addext subjectAltName={names} -keyout key.pem -out request.pem",
    )
    _openssl(
        folder,
        f"ca -selfsign -batch -notext -config authority.cnf -keyfile key.pem -in request.pem "
        f"-startdate {since} -enddate {until} -out cert.pem",
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "cert.pem", folder / "key.pem")
    return Certificate(context, str(folder / "cert.pem"))


def _openssl(folder: Path, words: str) -> None:
    try:
        made = subprocess.run(["openssl", *words.split()], cwd=folder, capture_output=True, text=True, check=False)
    except OSError as error:
        pytest.skip(f"NOT TESTED: no certificate can be made here: {error}")
    if made.returncode:
        pytest.skip(f"NOT TESTED: no certificate can be made here: {made.stderr}")
