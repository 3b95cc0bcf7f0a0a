"""Write `airports.jsonl`: one workflow instance for each airport of the United States.

The data are `airports.csv` of the PyPI package `vega_datasets`, a subset of what https://ourairports.com/data/
publishes, in the public domain. To make the file again, in this folder:

    python -m venv /tmp/vega && /tmp/vega/bin/pip install --no-deps vega_datasets
    /tmp/vega/bin/python make_airports.py
"""

import csv
import json
import re
from importlib.util import find_spec
from pathlib import Path

INSTANCE_ID = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,99}")
JSON_NUMBER = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?")
TARGET = Path(__file__).with_name("airports.jsonl")


def instance(airport: dict[str, str]) -> str:
    """One row: the texts as JSON strings, the coordinates as numbers with the digits that the CSV has."""
    instance_id = f"airport-{airport['iata']}"
    if not INSTANCE_ID.fullmatch(instance_id):
        raise ValueError(f"{instance_id!r} is no instance id")
    for coordinate in ("latitude", "longitude"):
        if not JSON_NUMBER.fullmatch(airport[coordinate]):
            raise ValueError(f"{instance_id}: {coordinate} {airport[coordinate]!r} is no JSON number")
    texts = {key: airport[key] for key in ("iata", "name", "city", "state", "country")}
    params = json.dumps(texts, ensure_ascii=False).removesuffix("}")
    params += f', "latitude": {airport["latitude"]}, "longitude": {airport["longitude"]}}}'
    return f'{{"instance_id": "{instance_id}", "params": {params}}}\n'


def source() -> Path:
    """The CSV file in the installed package, which is not imported: that would take pandas."""
    package = find_spec("vega_datasets")
    if package is None or package.origin is None:
        raise SystemExit("vega_datasets is not installed; this script's docstring says how to")
    return Path(package.origin).with_name("_data") / "airports.csv"


def main() -> None:
    """Write the file, and say how many rows it has."""
    with source().open(encoding="utf-8", newline="") as lines:
        airports = list(csv.DictReader(lines))
    if len({airport["iata"] for airport in airports}) != len(airports):
        raise ValueError("an airport code occurs twice")
    TARGET.write_text("".join(map(instance, airports)), encoding="utf-8", newline="\n")
    print(f"{TARGET.name}: {len(airports)} rows")


if __name__ == "__main__":
    main()
