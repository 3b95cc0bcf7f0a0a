"""Cloudflare's own SDKs, unchanged, as clients of the emulator.

They speak to one emulator per module, each test about a workflow of its own.
"""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

from command import Service, emulator

WORKFLOWS = [f"w{number}" for number in range(60)]
UNKNOWN_WORKFLOW = "never-deployed"
INTRUDER = "intruder"
"""A batch with this id revokes the token that it is sent with."""
FAILING = "fails-"
"""Instances whose ids have this prefix end with an error."""
WRONG_TOKEN = "of-somebody-else"
FAULTS = [{"contains_id": INTRUDER, "revoke_token": True}, {"fail": f"{FAILING}.*"}]
PARAMS = {"größe": "日本語 😀", 'quote"d': ["\u2028", "é", None, 1.5, {"": ""}]}


@contextlib.contextmanager
def emulated(folder: Path) -> Iterator[Service]:
    """The emulator for the tests of one module."""
    workflows = (word for name in WORKFLOWS for word in ("--workflow", name))
    with contextlib.chdir(folder), emulator(*workflows, faults=FAULTS) as service:
        yield service


def as_sent(params: object) -> bytes:
    """Params as both SDKs encode them: compact, in UTF-8, with no unnecessary escapes."""
    return json.dumps(params, ensure_ascii=False, separators=(",", ":")).encode()
