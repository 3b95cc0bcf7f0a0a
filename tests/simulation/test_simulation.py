"""A thousand seeds: crashes, lost answers, full queues, late copies. Every promise holds in each of them."""

import os

import pytest

from simulation.play import play

pytestmark = pytest.mark.slow

SEEDS = int(os.environ.get("BULKWF_SEEDS", "1000"))
CHUNK = 10
"""Seeds that one test plays; the first chunk is the smoke test."""


@pytest.mark.parametrize("first", [pytest.param(0, marks=pytest.mark.smoke), *range(CHUNK, SEEDS, CHUNK)])
def test_the_promises_hold_for_every_seed(first):
    for seed in range(first, min(first + CHUNK, SEEDS)):
        play(seed)


@pytest.mark.parametrize("seed", [3, 17, 93, 213])
def test_the_same_seed_gives_the_same_run(seed):
    assert play(seed) == play(seed)
