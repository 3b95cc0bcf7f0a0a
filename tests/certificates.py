"""Certificates for TLS servers on this machine, signed by an authority of the tests' own."""

import ssl
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import NamedTuple

import trustme


class Certificate(NamedTuple):
    """A certificate whose authority no system trusts."""

    server: ssl.SSLContext
    """Context of a server that shows it."""
    file: str
    """Path of the authority's certificate, for clients that trust it."""


def make_certificate(
    folder: Path, *, names: tuple[str, ...] = ("localhost", "127.0.0.1"), days: int = 2
) -> Certificate:
    """Make a certificate for *names* that expires after *days*; leaves `cert.pem` and `key.pem` in *folder*."""
    authority = trustme.CA()
    made = authority.issue_cert(*names, not_before=_in_days(-10), not_after=_in_days(days))
    file = folder / "authority.pem"
    authority.cert_pem.write_to_path(file)
    made.private_key_pem.write_to_path(folder / "key.pem")
    # The whole chain, so that a client that does not trust it says that its root is self-signed.
    made.cert_chain_pems[0].write_to_path(folder / "cert.pem")
    authority.cert_pem.write_to_path(folder / "cert.pem", append=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "cert.pem", folder / "key.pem")
    return Certificate(context, str(file))


def _in_days(days: int) -> datetime:
    return datetime.now(UTC) + timedelta(days=days)
