"""What a model is shown, to be looked at before anything is trained."""

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from atomtune.data.folder import Sample
from atomtune.data.picture import SCANNED, fit, open_picture
from atomtune.data.views import WHOLE, Size, View

TILE = 256
"""Largest side of a picture on a sheet, in pixels."""
LINE = 14
"""Height of the line under it."""


def seen(sample: Sample, size: Size, view: View = WHOLE) -> Image.Image:
    """The picture that is encoded: upright, on white where it is clear, cut to the shape of `size`."""
    return fit(open_picture(sample.path, max_pixels=SCANNED), size, view)


def contact_sheet(samples: Sequence[Sample], sizes: Sequence[Size], views: Sequence[View] | None = None) -> Image.Image:
    """All samples as they are encoded, each at its size, its number and caption under it."""
    shown = []
    for given in zip(samples, sizes, views or [WHOLE] * len(samples), strict=True):
        picture = seen(*given)
        picture.thumbnail((TILE, TILE))  # one after the other: whole ones would fill the memory
        shown.append(picture)
    width, height = (max(picture.size[side] for picture in shown) for side in (0, 1))
    font = ImageFont.load_default(LINE - 3)
    columns = min(len(shown), max(1, 4 * TILE // width))
    sheet = Image.new("RGB", (columns * width, -(-len(shown) // columns) * (height + LINE)), "white")
    for number, (sample, picture) in enumerate(zip(samples, shown, strict=True)):
        # One tile after the other, so that a long caption ends at its tile's edge.
        tile = Image.new("RGB", (width, height + LINE), "white")
        tile.paste(picture, ((width - picture.width) // 2, (height - picture.height) // 2))
        ImageDraw.Draw(tile).text((2, height + 1), f"{number} {sample.caption}", fill="black", font=font)
        sheet.paste(tile, (number % columns * width, number // columns * (height + LINE)))
    return sheet
