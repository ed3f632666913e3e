"""A small slice of each hazard of `benchmarks/reliability`, by its own functions: all of it survives."""

import random
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.reliability import damage, full, hostile, kills, mutants, workplace
from benchmarks.reliability.workplace import Place, Tally


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return workplace.prepare(tmp_path_factory.mktemp("reliability"), steps=4)


def survived(*tallies: Tally, least: int = 1) -> None:
    for tally in tallies:
        assert tally.failures == []
        assert tally.tried >= least


def test_killed_runs_end_as_if_nothing_had_been(place: Place) -> None:
    survived(kills.at_random_writes(place, 2, 0))


def test_a_full_disk_is_one_line_and_no_loss(place: Place) -> None:
    survived(full.disk(place, 1, 0))


def test_a_damaged_cache_and_a_cut_shard(place: Place) -> None:
    survived(damage.cache(place, random.Random(0), count=1), damage.shard(place, random.Random(0), cuts=1))


def test_a_damaged_checkpoint_and_damaged_papers(place: Place) -> None:
    survived(damage.checkpoint(place, random.Random(0), most=1), damage.papers(place, random.Random(0), most=4))


@pytest.mark.parametrize("kind", [mutants.adapters, mutants.configs, mutants.pictures])
def test_mutants(kind: Callable[[Place, int, random.Random], Tally], place: Place) -> None:
    survived(kind(place, 5, random.Random(1)), least=5)


def test_files_that_somebody_made_to_do_harm(place: Place) -> None:
    survived(*hostile.rows(place, every=6))
