"""A thousand worlds: crashes, lost answers, full queues, late copies. Exactly once, truthfully, within the limits."""

import contextlib
import os

import pytest

from simulation.play import play, play_many

SEEDS = int(os.environ.get("BULKWF_SEEDS", "1000"))


def test_the_promises_hold_in_every_world():
    with contextlib.closing(play_many(range(SEEDS))) as played:
        for _, wrong in played:
            assert wrong is None, wrong


@pytest.mark.parametrize("seed", [3, 17, 93, 213])
def test_the_same_seed_gives_the_same_world(seed):
    assert play(seed) == play(seed)
