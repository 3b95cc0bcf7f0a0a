"""How much memory does a run take, and does it grow with the list?"""

import tempfile
from pathlib import Path

import bench

NO_LIMITS = ("--rate", "unlimited", "--request-rate", "unlimited")


def main() -> None:
    """Submit lists of growing length without limits and print the peak memory of each run."""
    for count in (20_000, 200_000):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            rows = bench.write_rows(folder / "rows.jsonl", range(count), 200)
            with bench.service(folder, *NO_LIMITS) as served:
                summary, peak_kib = bench.run(rows, served, *NO_LIMITS)
            print(
                f"{count:>9,} rows: {summary['created']:,} created, peak {peak_kib / 1024:.1f} MiB, "
                f"{summary['elapsed_s']:.2f} s"
            )


if __name__ == "__main__":
    main()
