"""Answers in the API's envelope: `{success, errors: [{code, message}], messages, result}`."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import orjson

# Error codes of the API, from public reports.
BODY_REFUSED = 10002
INTERNAL_ERROR = 10001
WORKFLOW_NOT_FOUND = 10200
INSTANCE_NOT_FOUND = 10400
ALREADY_EXISTS = 10405
DUPLICATE_IN_BATCH = 10415
CREATING_TOO_FAST = 10429  # unknown; our choice: no report of a creation rate that was exceeded gives its code
THROTTLED = 971
NOT_AUTHENTICATED = 10000
NOT_AUTHORIZED = 9109
HEADERS_REFUSED = 6003
NO_ROUTE = 7003


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer of the service. `headers` lacks Content-Type, Date and the headers of the connection."""

    status: int
    body: bytes
    headers: Mapping[str, str] = field(default_factory=dict)

    def json(self) -> Any:
        """The body, decoded."""
        return orjson.loads(self.body)


def success(result: str, result_info: str = "") -> Answer:
    """A 200 with `result` and `result_info`, both JSON text."""
    info = f',"result_info":{result_info}' if result_info else ""
    return Answer(200, f'{{"success":true,"errors":[],"messages":[],"result":{result}{info}}}'.encode())


def refusal(status: int, code: int, message: str, headers: Mapping[str, str] | None = None) -> Answer:
    """An error answer. Documented: `result` is null, and `errors` gives the reason."""
    errors = [{"code": code, "message": message}]
    envelope = {"success": False, "errors": errors, "messages": [], "result": None}
    return Answer(status, orjson.dumps(envelope), headers or {})
