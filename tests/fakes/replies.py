"""Replies and faults, as a transport returns them."""

import json
from collections.abc import Iterable
from typing import Any

from bulkwf.attempt import Fault, FaultKind, Reply
from fakes.virtual_time import wall


def reply(status: int, body: Any = b"", credential: int = 0, **headers: str) -> Reply:
    """A reply with this status; a body that is not bytes is encoded as JSON."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    return Reply(status=status, headers=named, body=raw, received_at=wall(), credential=credential)


def envelope(result: Any, *errors: tuple[int, str]) -> dict[str, Any]:
    """The API's envelope."""
    listed = [{"code": code, "message": message} for code, message in errors]
    return {"success": not errors, "errors": listed, "messages": [], "result": result}


def created(ids: Iterable[str], status: str = "queued") -> Reply:
    """The reply that all of *ids* are created."""
    shared = {"status": status, "version_id": "v1", "workflow_id": "w1"}
    return reply(200, envelope([{"id": one, **shared} for one in ids]))


def found(ids: Iterable[str] = ()) -> Reply:
    """The reply to a look-up: the instance exists."""
    return reply(200, envelope({"status": "running"}))


def absent(ids: Iterable[str] = ()) -> Reply:
    """The reply to a look-up: there is no such instance."""
    return reply(404, envelope(None, (10400, "instance.not_found")))


def error(status: int, code: int = 10001, message: str = "it went wrong", **more: Any) -> Reply:
    """A reply with an error in the envelope."""
    return reply(status, envelope(None, (code, message)), **more)


def fault(kind: FaultKind = FaultKind.IN_DOUBT, message: str = "the connection broke") -> Fault:
    """A fault: no reply."""
    return Fault(kind=kind, message=message)
