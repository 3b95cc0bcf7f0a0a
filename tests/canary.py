"""Two secrets that every test uses, and the search for them where they must not be.

The token is that of `command.py` and of the simulation. The params of a row stand for personal data.
"""

import base64
import traceback
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

TOKEN = "t0psecret-Zm9vYmFy/+"
PARAMS = "c4nary, 1 Infinite Loop"
HERE = str(Path(__file__).parent)


def _forms(secret: str) -> Iterator[bytes]:
    """A secret itself, quoted for a URL, and in base64 at each offset of a text."""
    yield secret.encode()
    yield quote(secret, safe="").encode()
    for before in range(3):
        whole = base64.b64encode(b"\0" * before + secret.encode())
        yield whole[4 * bool(before) : len(whole) // 4 * 4 - 4]  # without groups that share bytes with the text around


FORMS = {form: name for name in ("TOKEN", "PARAMS") for form in _forms(globals()[name])}


def assert_silent(output: bytes | str, where: object) -> None:
    """Neither secret is in *output*."""
    data = output.encode("utf-8", "surrogateescape") if isinstance(output, str) else output
    for form, name in FORMS.items():
        at = data.find(form)
        assert at < 0, f"{where} holds the canary {name}: …{data[max(0, at - 200) : at + 80]!r}"


def assert_silent_files(folder: Path, pattern: str = "*.bulkwf*") -> None:
    """Neither secret is in a checkpoint, nor in anything beside it."""
    for file in folder.glob(pattern):
        if file.is_file():
            assert_silent(file.read_bytes(), file)


def report(error: BaseException) -> str:
    """An error in full: traceback, causes, and the locals of every frame, as error trackers store it.

    The frames of the tests are left out, because they may hold the secrets.
    """
    lines: list[str] = []
    seen: set[int] = set()
    waiting = [error]
    while waiting:
        one = waiting.pop()
        if id(one) in seen:
            continue
        seen.add(id(one))
        shown = traceback.TracebackException.from_exception(one, capture_locals=True)
        shown.stack = traceback.StackSummary.from_list(
            [frame for frame in shown.stack if not frame.filename.startswith(HERE)]
        )
        shown.__cause__ = shown.__context__ = None
        shown.exceptions = None
        lines += [repr(one), *shown.format(chain=False)]
        waiting += [other for other in (one.__cause__, one.__context__) if other is not None]
        waiting += getattr(one, "exceptions", ())
    return "\n".join(lines)
