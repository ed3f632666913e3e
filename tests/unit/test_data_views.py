"""Sizes, views and what a sheet shows of them."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from atomtune.data.folder import scan
from atomtune.data.picture import fit, open_picture
from atomtune.data.sheet import LINE, contact_sheet, seen
from atomtune.data.views import WHOLE, View, kept, nearest, sizes, view_of
from atomtune.errors import UserError


@pytest.mark.parametrize(("side", "unit"), [(64, 16), (48, 16), (512, 16), (1024, 16), (1024, 64), (96, 32)])
def test_sizes_cost_no_more_than_the_square_and_come_in_both_directions(side: int, unit: int) -> None:
    found = sizes(side, unit)
    assert found[0] == (side, side)
    assert len(set(found)) == len(found)
    for width, height in found:
        assert width % unit == height % unit == 0
        assert 0.6 * side * side < width * height <= side * side
        assert max(width, height) <= 2 * min(width, height)
        assert (height, width) in found


@pytest.mark.parametrize(
    ("shape", "size"), [((4, 3), (72, 56)), ((3, 4), (56, 72)), ((5, 5), (64, 64)), ((9, 1), (88, 44))]
)
def test_a_picture_goes_where_least_is_cut_off(shape: tuple[int, int], size: tuple[int, int]) -> None:
    among = ((64, 64), (72, 56), (56, 72), (88, 44), (44, 88))
    assert nearest(*shape, among) == size
    assert kept(*shape, size) == max(kept(*shape, other) for other in among)
    assert kept(100, 50, (50, 50)) == 0.5


def test_views_are_functions_of_seed_content_and_number() -> None:
    views = [view_of("abc", number, crop=0.2, flip=True) for number in range(40)]
    assert views[0] == WHOLE
    assert [view.mirrored for view in views] == [number % 2 == 1 for number in range(40)]
    assert views == [view_of("abc", number, crop=0.2, flip=True) for number in range(40)]
    assert view_of("abc", 3, crop=0.2) != view_of("abd", 3, crop=0.2)
    assert view_of("abc", 3, crop=0.2) != view_of("abc", 3, crop=0.2, seed=1)
    for view in views:
        assert 0.8 <= view.share <= 1
        assert 0 <= view.left <= 1 - view.share
        assert 0 <= view.top <= 1 - view.share
    assert view_of("abc", 2, flip=True) == WHOLE
    with pytest.raises(UserError, match="`crop` must be a share"):
        view_of("abc", 1, crop=1.0)


def test_a_view_is_cut_from_what_fits_and_never_deformed() -> None:
    x, y = np.meshgrid(np.arange(90), np.arange(60))
    ramp = Image.fromarray((x + 100 * y).astype(np.float32))
    assert np.array_equal(np.asarray(fit(ramp, (60, 60), WHOLE)), np.asarray(fit(ramp, (60, 60))))
    part = np.asarray(fit(ramp, (30, 30), View(0.5, 0.0, 0.5)))
    true = np.asarray(ramp)[:30, 45:75]
    assert np.array_equal(part, true)
    assert np.array_equal(np.asarray(fit(ramp, (30, 30), View(0.5, 0.0, 0.5, mirrored=True))), true[:, ::-1])


def test_a_sheet_shows_what_is_encoded(tmp_path: Path) -> None:
    """Complaint: pictures deformed, and nobody could see it before training."""
    rng = np.random.RandomState(0)
    for name, shape in (("a", (64, 96)), ("b", (80, 48))):
        Image.fromarray(rng.randint(0, 255, (*shape, 3)).astype(np.uint8)).save(tmp_path / f"{name}.png")
    samples = scan(tmp_path, caption="a picture of naïve 日本").samples
    given = [(64, 64), (48, 80)]
    views = [WHOLE, View(mirrored=True)]
    sheet = contact_sheet(samples, given, views)
    assert sheet.size == (2 * 64, 80 + LINE)
    first = sheet.crop((0, 8, 64, 72))
    assert np.array_equal(np.asarray(first), np.asarray(open_picture(samples[0].path).crop((16, 0, 80, 64))))
    second = sheet.crop((64 + 8, 0, 64 + 56, 80))
    assert np.array_equal(np.asarray(second), np.asarray(seen(samples[1], (48, 80), views[1])))
    assert np.asarray(sheet.crop((0, 80, 128, 80 + LINE))).min() < 100, "there is a line under each"
