"""`python measure.py CORE DESCRIPTOR COMMAND …` runs the command on that core, and writes its cost to the descriptor.

This is a small process of its own, because the peak memory of a command is never below that of the process that
started it.
"""

import json
import os
import sys
import time


def main() -> None:
    """Run the command and report its cost."""
    core, descriptor, *command = sys.argv[1:]
    os.sched_setaffinity(0, {int(core)})
    began = time.monotonic()
    process = os.posix_spawnp(command[0], command, os.environ)
    _, status, usage = os.wait4(process, 0)
    cost = {
        "exit_code": os.waitstatus_to_exitcode(status),
        "wall_s": time.monotonic() - began,
        "cpu_s": usage.ru_utime + usage.ru_stime,
        "peak_mb": usage.ru_maxrss / 1_024,
    }
    os.write(int(descriptor), json.dumps(cost).encode())


if __name__ == "__main__":
    main()
