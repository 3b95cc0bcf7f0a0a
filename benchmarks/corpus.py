"""Reproducible lists to submit: `python benchmarks/corpus.py 1000000 200 .` writes one into this folder."""

import json
import random
import sys
from pathlib import Path

SEED = 20261122
TAILS, TAILS_BYTES = 10_000, 20_000_000
"""Maximum number of different params, and of their bytes together. All ids are different."""
WORDS = (
    *("größer", "naïve", "東京", "Ωμέγα", "plain", "order", "Łódź", "emoji 🚀"),
    *('a "quoted" word', "back\\slash", "tab\there"),
)
SIZES = {word: len(json.dumps(word, ensure_ascii=False).encode()) + 1 for word in WORDS}
BLOCK = 50_000
ID = '{"instance_id":"order-000000000",'


def write_corpus(folder: Path, rows: int, row_bytes: int) -> Path:
    """Write *rows* rows of about *row_bytes* bytes each: ids, non-ASCII params, and a retention in each fourth.

    A complete list of an earlier call is kept.
    """
    path = folder / f"{rows}x{row_bytes}.jsonl"
    size = path.with_name(path.name + ".size")
    if path.exists() and size.exists() and size.read_text() == str(path.stat().st_size):
        return path
    tails = _tails(row_bytes)
    with path.open("wb") as file:
        for start in range(0, rows, BLOCK):
            numbers = range(start, min(start + BLOCK, rows))
            file.writelines(
                b'{"instance_id":"order-%09d",%b' % (number, tails[number % len(tails)]) for number in numbers
            )
    size.write_text(str(path.stat().st_size))
    return path


def _tails(row_bytes: int) -> list[bytes]:
    """The parts of the rows after the id."""
    chance = random.Random(SEED)  # noqa: S311 - the numbers must be the same each time
    tails = []
    for number in range(min(TAILS, TAILS_BYTES // row_bytes)):
        params = {
            "order": chance.randrange(10**9),
            "name": f"{chance.choice(WORDS[:4])} {chance.choice(WORDS)}",
            "price": round(chance.uniform(0, 1_000), 2),
            "express": chance.random() < 0.5,
            "tags": [],
            "note": "",
        }
        more = {} if number % 4 else {"instance_retention": {"success_retention": "1 day", "error_retention": "3 days"}}
        room = row_bytes - len(ID) - len(_line(params, more))
        while SIZES[word := chance.choice(WORDS)] < room:
            params["tags"].append(word)
            room -= SIZES[word]
        params["note"] = "x" * max(0, room)
        tails.append(_line(params, more))
    return tails


def _line(params: dict[str, object], more: dict[str, object]) -> bytes:
    text = json.dumps({"params": params, **more}, ensure_ascii=False, separators=(",", ":"))
    return text[1:].encode() + b"\n"


if __name__ == "__main__":
    print(write_corpus(Path(sys.argv[3]), int(sys.argv[1]), int(sys.argv[2])))
