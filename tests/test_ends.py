"""Programs that end by cancelling, at random moments: none dies of it, and every checkpoint resumes to its end.

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
"""anyio's own word on a task that is cancelled in the turn in which it was made."""
TARGET = Target(ACCOUNT, WORKFLOW)


counted = tally(
    "{ends:,} ends of a program by cancellation, {under way:,} of them with the run under way ({begun:,} rows begun): "
    "all resumed to their end"
)


async def run(python, *words):
    """Run the program to its end; its exit code and what it has printed."""
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
        raise AssertionError(f"it never ends: {words}") from None
    return program.returncode, out.decode(), err.decode()


def locks(folder):
    return list(Path(folder).glob("*.lock"))


@pytest.mark.parametrize("python", PYTHONS)
@pytest.mark.parametrize("seed", range(ENDS))
async def test_a_program_that_ends_by_cancelling_lives_until_then_and_its_run_resumes(python, seed):
    manner = MANNERS[seed % len(MANNERS)]
    service = Service(Limits.none(), time.monotonic)
    with memory_folder() as folder:
        async with emulate(service) as emulator:
            code, _, told = await run(python, manner, seed, emulator.base_url, folder)
            assert code == 0, f"{manner}, seed {seed}: {code}\n{told}"
            if manner in ABRUPT:  # asyncio says that tasks were left
                assert "Fatal" not in told
            else:
                assert not told, f"{manner}, seed {seed}:\n{told}"
                assert not locks(folder), f"{manner}, seed {seed}: the lock is still there"
            begun = service.created
            code, out, told = await run(python, "resume", seed, emulator.base_url, folder)
            assert (code, out, told) == (0, f"{ROWS} complete=True", ""), f"{manner}, seed {seed}: {told}"
    assert service.created == len(service.ids(TARGET)) == ROWS, f"{manner}, seed {seed}: rows were started twice"
    counted.update({"ends": 1, "begun": begun, "under way": 0 < begun < ROWS})
