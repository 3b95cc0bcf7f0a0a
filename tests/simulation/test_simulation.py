"""A thousand worlds: crashes, lost answers, full queues, late copies. Exactly once, truthfully, within the limits."""

import os

import pytest

from simulation.play import CHUNK, play

pytestmark = pytest.mark.slow

SEEDS = int(os.environ.get("BULKWF_SEEDS", "1000"))


@pytest.mark.parametrize("first", [pytest.param(0, marks=pytest.mark.smoke), *range(CHUNK, SEEDS, CHUNK)])
def test_the_promises_hold_in_every_world(first):
    for seed in range(first, min(first + CHUNK, SEEDS)):
        play(seed)


@pytest.mark.parametrize("seed", [3, 17, 93, 213])
def test_the_same_seed_gives_the_same_world(seed):
    assert play(seed) == play(seed)
