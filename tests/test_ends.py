"""Programs that end by cancellation at random moments: none crashes, and every checkpoint resumes to its end.

`BULKWF_PYTHONS` names the interpreters to be tried, with bulkwf's requirements beside them, as `PATH` does.
"""

import asyncio
import os
import sys
import time
from pathlib import Path

import pytest
from ending import ABRUPT, ACCOUNT, MANNERS, ROWS, WORKFLOW
from fakes import memory_folder
from torture import scaled, tally

from bulkwf.emulator import Limits, Service, Target, emulate

pytestmark = pytest.mark.slow

PYTHONS = os.environ.get("BULKWF_PYTHONS", sys.executable).split(os.pathsep)
ENDS = int(os.environ.get("BULKWF_ENDS") or scaled(10, 300))
ROOT = Path(__file__).parents[1]
LONGEST_S = 60.0
UNBEGUN = "ignore:coroutine 'Engine._work_loop' was never awaited:RuntimeWarning"
"""The warning about a task of anyio that is cancelled in the turn of the loop in which it was made."""
TARGET = Target(ACCOUNT, WORKFLOW)


counted = tally(
    "{ends:,} ends of a program by cancellation, {under way:,} of them with the run under way ({begun:,} rows begun): "
    "all resumed to their end"
)


async def run(python, *words):
    """Run the program to its end: its exit code, stdout and stderr."""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "PYTHONDONTWRITEBYTECODE": "1"}
    flags = ("-X", "faulthandler", "-W", "default", "-W", UNBEGUN)
    program = await asyncio.create_subprocess_exec(
        python,
        *flags,
        str(ROOT / "tests" / "ending.py"),
        *map(str, words),
        env=environment,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        out, err = await asyncio.wait_for(program.communicate(), LONGEST_S)
    except TimeoutError:
        program.kill()
        await program.wait()
        raise AssertionError(f"the program does not end: {words}") from None
    return program.returncode, out.decode(), err.decode()


def locks(folder):
    return list(Path(folder).glob("*.lock"))


@pytest.mark.parametrize("python", PYTHONS)
@pytest.mark.parametrize("seed", range(ENDS))
async def test_a_run_resumes_after_its_program_ended_by_cancellation(python, seed):
    manner = MANNERS[seed % len(MANNERS)]
    service = Service(Limits.none(), time.monotonic)
    with memory_folder() as folder:
        async with emulate(service) as emulator:
            code, _, err = await run(python, manner, seed, emulator.base_url, folder)
            assert code == 0, f"{manner}, seed {seed}: {code}\n{err}"
            if manner in ABRUPT:  # asyncio says that tasks were left
                assert "Fatal" not in err
            else:
                assert not err, f"{manner}, seed {seed}:\n{err}"
                assert not locks(folder), f"{manner}, seed {seed}: the lock is still there"
            begun = service.created
            code, out, err = await run(python, "resume", seed, emulator.base_url, folder)
            assert (code, out, err) == (0, f"{ROWS} complete=True", ""), f"{manner}, seed {seed}: {err}"
    assert service.created == len(service.ids(TARGET)) == ROWS, f"{manner}, seed {seed}: rows were started twice"
    counted.update({"ends": 1, "begun": begun, "under way": 0 < begun < ROWS})
