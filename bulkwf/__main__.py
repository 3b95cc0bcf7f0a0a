"""The command: `bulkwf` and `python -m bulkwf`."""

import gc

gc.set_threshold(20_000)  # hardly any object here is part of a cycle: the default (700) costs a run 4 % of its CPU time

from bulkwf.cli.app import main  # noqa: E402 - the imports make most of the objects

if __name__ == "__main__":
    main()
