"""What share of the permitted rate does a run use, and is any window over it?"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import bench


def main() -> None:
    """Run against the emulator's strict sliding windows and print the share."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rate", type=int, default=100, help="instances a second (100)")
    parser.add_argument("--seconds", type=int, default=60, help="length of the run (60)")
    parser.add_argument("--row-bytes", type=int, default=200, help="size of a row (200)")
    parser.add_argument("--existing", action="store_true", help="let one id of each batch exist already")
    chosen = parser.parse_args()
    count = chosen.rate * (chosen.seconds + 1)
    with tempfile.TemporaryDirectory() as name:
        folder, rate = Path(name), ("--rate", f"{chosen.rate}/s")
        rows = bench.write_rows(folder / "rows.jsonl", range(count), chosen.row_bytes)
        with bench.service(folder, *rate) as served:
            earlier = 0
            if chosen.existing:
                some = bench.write_rows(folder / "some.jsonl", range(37, count, 100), chosen.row_bytes)
                bench.run(some, served, *rate)
                time.sleep(2)  # two runs on one workflow share its window
                earlier = len(served.log.read_text().splitlines())
            summary, _ = bench.run(rows, served, *rate)
            created = [json.loads(line) for line in served.log.read_text().splitlines()][earlier:]
        span_s = created[-1]["at"] - created[0]["at"]
        share = (summary["created"] + summary["existed"] - chosen.rate) / span_s / chosen.rate
        print(
            f"{share:.2%} of {chosen.rate}/s over {span_s:.1f} s; worst window {served.worst_window}, "
            f"{served.refused} refused; {summary['created']:,} created, {summary['existed']:,} existed, "
            f"{summary['attempts']:,} requests"
        )


if __name__ == "__main__":
    main()
