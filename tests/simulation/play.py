"""Plays seeds, one or many."""

import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

from simulation.oracle import Oracle, trace
from simulation.plan import Plan, draw_plan
from simulation.world import World

CHUNK = 25
"""Seeds that one process plays at a time."""
MEMORY_DISK = Path("/dev/shm")


class Broken(AssertionError):
    """A promise was broken."""


def play(seed: int) -> str:
    """Play one seed; returns everything that happened, as text. Raises `Broken`."""
    try:
        return trace(play_plan(draw_plan(seed)))
    except AssertionError as error:
        again = f"cd tests && python -m simulation {seed}"
        raise Broken(f"seed {seed}: {error}\nTo play it again: {again}") from error


def play_plan(plan: Plan) -> World:
    """Play a plan until the run is complete, and check the promises."""
    with tempfile.TemporaryDirectory(dir=MEMORY_DISK if MEMORY_DISK.is_dir() else None) as folder:
        world, oracle = World(plan, Path(folder)), Oracle()
        world.watch = oracle.look
        world.play()
        oracle.judge(world)
        return world


def play_many(seeds: range) -> Iterator[tuple[int, str | None]]:
    """Play seeds on all cores; yields for each chunk the number played, and what is wrong with the last of them.

    A chunk ends with its first broken seed.
    """
    chunks = [seeds[start : start + CHUNK] for start in range(0, len(seeds), CHUNK)]
    pool = ProcessPoolExecutor(mp_context=get_context("spawn"))
    try:
        yield from pool.map(_play_all, chunks)
    finally:
        pool.shutdown(cancel_futures=True)


def _play_all(seeds: Sequence[int]) -> tuple[int, str | None]:
    for number, seed in enumerate(seeds, 1):
        try:
            play(seed)
        except Broken as error:
            return number, str(error)
        except Exception as error:  # noqa: BLE001 (any other error is a finding too)
            return number, f"seed {seed}: {error!r}"
    return len(seeds), None
