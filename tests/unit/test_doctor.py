"""What is told before a run: all problems of the data at once, pictures that are the same, and memory."""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny_runs
from PIL import Image

from atomtune.backbones import backbone_of
from atomtune.data.folder import scan, survey
from atomtune.data.twins import Twins, twins
from atomtune.training.ends import attach_atoms
from atomtune.training.memory import Trial, carried, tried
from atomtune.tuner import remove_adapter

OPTIONS = dataclasses.replace(tiny_runs.OPTIONS, sites=None)


def test_all_problems_are_told_at_once(kites: Path, tmp_path: Path) -> None:
    """Complaints 4 and 7: overlooked captions, and one bad picture, each named."""
    folder = Path(shutil.copytree(kites, tmp_path / "data"))
    (folder / "broken.png").write_bytes(b"no picture")
    shutil.copy(folder / "0.png", folder / "mute.png")
    (folder / "mute.caption").write_text("a kite")
    first, second = survey(folder).problems
    assert "broken.png" in first
    assert "mute.png" in second
    assert "mute.caption" in second


def test_equal_and_nearly_equal_pictures_are_named(kites: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(kites, tmp_path / "data"))
    assert twins(scan(folder).samples) == []
    shutil.copy(folder / "0.png", folder / "same.png")
    Image.open(folder / "1.png").save(folder / "near.jpg", quality=70)
    equal, near = twins(scan(folder, caption="a kite").samples)
    assert equal == Twins("0.png", "same.png", None)
    assert (near.first, near.second) == ("1.png", "near.jpg")
    assert near.distance is not None
    assert near.distance <= 6


def test_small_steps_foretell_what_a_step_of_full_size_holds(pipes: dict[str, Any]) -> None:
    """Complaint 40: the recipe runs out of memory. What is tried is smaller, what is told is the full size."""
    pipe = pipes["sd3"]
    attach_atoms(pipe, backbone_of(pipe), OPTIONS)
    try:
        trial = Trial(pipe, backbone_of(pipe), OPTIONS, ["a kite", "a house"])
        with trial.prepared():
            points = [(side**2, trial.step(side)) for side in tried(64, 16)]
            assert points[-1][0] < 64**2
            assert carried(points, 64**2, bends=True) == pytest.approx(trial.step(64), rel=0.15)
    finally:
        remove_adapter(pipe.transformer)


def test_what_grows_with_the_area_is_carried_on() -> None:
    assert tried(64, 16) == [16, 32, 48]
    assert carried([(1, 5), (2, 7), (3, 9)], 10) == 23
    assert carried([(1, 1), (2, 4), (3, 9)], 10, bends=True) == 100
