"""`python measure.py CORE DESCRIPTOR COMMAND …`: runs the command on that core, and writes down what it took.

A process of its own, and a small one: the peak of a command's memory is never less than that of the process which
started it.
"""

import json
import os
import sys
import time


def main() -> None:
    """Run and tell."""
    core, descriptor, *words = sys.argv[1:]
    os.sched_setaffinity(0, {int(core)})
    began = time.monotonic()
    process = os.posix_spawnp(words[0], words, os.environ)
    _, status, usage = os.wait4(process, 0)
    told = {
        "exit_code": os.waitstatus_to_exitcode(status),
        "wall_s": time.monotonic() - began,
        "cpu_s": usage.ru_utime + usage.ru_stime,
        "peak_mb": usage.ru_maxrss / 1_024,
    }
    os.write(int(descriptor), json.dumps(told).encode())


if __name__ == "__main__":
    main()
