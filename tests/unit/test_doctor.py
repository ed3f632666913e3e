"""What is told before a run: all problems of the data at once, and pictures that are the same."""

import shutil
from pathlib import Path

from PIL import Image

from atomtune.data.folder import scan, survey
from atomtune.data.twins import Twins, twins
from atomtune.training.memory import carried, tried


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


def test_what_grows_with_the_area_is_carried_on() -> None:
    assert tried(64, 16) == [16, 32, 48]
    assert carried([(1, 5), (2, 7), (3, 9)], 10) == 23
    assert carried([(1, 1), (2, 4), (3, 9)], 10, bends=True) == 100
