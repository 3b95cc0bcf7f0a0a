"""One seed, from its plan to the oracle's word."""

import tempfile
from pathlib import Path

from simulation.oracle import Oracle, trace
from simulation.plan import Plan, draw_plan
from simulation.world import World

MEMORY_DISK = Path("/dev/shm")


class Broken(AssertionError):
    """A promise was broken in a seed's world."""


def play(seed: int) -> str:
    """Play a seed's world to its end; returns all that happened. Raises `Broken` if a promise was."""
    try:
        return trace(play_plan(draw_plan(seed)))
    except AssertionError as error:
        again = f"cd tests && python -m simulation {seed}"
        raise Broken(f"seed {seed}: {error}\nTo play it again: {again}") from error


def play_plan(plan: Plan) -> World:
    """Play a plan's world to its end, and hold it against the promises."""
    with tempfile.TemporaryDirectory(dir=MEMORY_DISK if MEMORY_DISK.is_dir() else None) as folder:
        world, oracle = World(plan, Path(folder)), Oracle()
        world.watch = oracle.look
        world.play()
        oracle.judge(world)
        return world
