"""Results as JSON lines and as CSV."""

import csv
import io
from collections.abc import Iterable
from dataclasses import fields
from itertools import islice
from typing import Any, BinaryIO

import orjson

from bulkwf.model import Finding, Result

__all__ = ["write_csv", "write_jsonl", "write_report"]

PAGE_RESULTS = 1_000
FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n", "\uff1d", "\uff0b", "\uff0d", "\uff20")
"""A spreadsheet evaluates a cell that begins with one of these. The full-width ones count in East Asian locales."""


def write_jsonl(results: Iterable[Result | Finding], file: BinaryIO) -> None:
    """Write one JSON object per line, with the fields of the result as keys."""
    lines = (orjson.dumps(result, option=orjson.OPT_APPEND_NEWLINE) for result in results)
    while page := b"".join(islice(lines, PAGE_RESULTS)):
        file.write(page)


def write_report(summary: Any, results: Iterable[Result | Finding], file: BinaryIO) -> None:
    """Write one JSON object: the fields of the dataclass *summary*, and the results as `problems`."""
    file.write(orjson.dumps(summary)[:-1] + b',"problems":[')
    comma = b""
    for result in results:
        file.write(comma + orjson.dumps(result))
        comma = b","
    file.write(b"]}\n")


def write_csv(results: Iterable[Result | Finding], file: BinaryIO, kind: type[Result | Finding] = Result) -> None:
    """Write a header and one record per line. Text that a spreadsheet would evaluate gets a `'` in front.

    Args:
        results: The records.
        file: Where they are written.
        kind: Their class; its fields are the columns.
    """
    columns = [field.name for field in fields(kind)]
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(columns)
    rows = ([_cell(getattr(result, name)) for name in columns] for result in results)
    while page := list(islice(rows, PAGE_RESULTS)):
        writer.writerows(page)
        file.write(text.getvalue().encode())
        text.seek(0)
        text.truncate()
    file.write(text.getvalue().encode())


def _cell(value: Any) -> Any:
    return f"'{value}" if isinstance(value, str) and value.startswith(FORMULA) else value
