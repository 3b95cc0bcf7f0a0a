"""Clients that nobody here wrote drive the emulator, unchanged: Cloudflare's own SDKs.

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
"""From the batch with this id on, the token that sends it is refused."""
FAILING = "fails-"
"""Instances whose id begins so end with an error."""
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
    """How both SDKs write params: compact, in UTF-8, nothing escaped that need not be."""
    return json.dumps(params, ensure_ascii=False, separators=(",", ":")).encode()
