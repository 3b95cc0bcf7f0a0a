"""The requests of the Workflows API that bulkwf sends, as values. Pure."""

from collections.abc import Mapping
from urllib.parse import quote

from bulkwf.attempt import Request, RequestKind
from bulkwf.options import Target

__all__ = ["create_batch", "get_instance", "list_instances"]


def create_batch(target: Target, body: bytes, *, fresh: bool = False) -> Request:
    """Create the instances that *body*, a JSON array of at most 100, describes. *fresh*: see `Request`."""
    path = target.instances_path + "/batch"
    return Request(kind=RequestKind.CREATE, method="POST", path=path, body=body, fresh=fresh)


def get_instance(target: Target, instance_id: str, *, fresh: bool = False) -> Request:
    """Look up one instance: its status, without its steps. *fresh*: see `Request`."""
    path = f"{target.instances_path}/{quote(instance_id, safe='')}"
    return Request(kind=RequestKind.LOOK_UP, method="GET", path=path, query={"simple": "true"}, fresh=fresh)


def list_instances(target: Target, query: Mapping[str, str]) -> Request:
    """Read a page of the workflow's instances; *query* holds its size, cursor and dates."""
    return Request(kind=RequestKind.LIST, method="GET", path=target.instances_path, query=query)
