"""One picture file to RGB pixels: upright, on a stated matte colour, never deformed."""

import io
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image, ImageCms, ImageOps
from torch import Tensor

from atomtune.data.packed import File
from atomtune.data.views import WHOLE, Size, View
from atomtune.errors import UserError

MAX_PIXELS = 100_000_000  # width * height
SCANNED = 2**62  # no limit, for files that a scan has let through
WHITE = (255, 255, 255)

# Only these are tried, whatever a file's name says: another of Pillow's readers runs Ghostscript.
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "AVIF")

_pillow_lock = threading.RLock()


@contextmanager
def _pillow_without_limits() -> Iterator[None]:
    """Our own size check replaces Pillow's, which warns below our limit and hides the size above it.

    Both settings are global to the process, hence the lock: pictures are decoded one at a time.
    """
    with _pillow_lock, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # odd EXIF or palettes are no reason to stop: the pixels decode
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = limit


def decode(file: BinaryIO, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The first frame of an open picture file: checked, fully loaded, upright by its EXIF, in its own mode.

    The size is read from the header and refused before any pixel is decoded. Errors do not name the file:
    only the caller knows its name.
    """
    with _pillow_without_limits():
        try:
            header = Image.open(file, formats=_FORMATS)
            width, height = header.size
            if width * height <= max_pixels:
                header.verify()
                file.seek(0)
                picture = Image.open(file, formats=_FORMATS)
                picture.load()
                return ImageOps.exif_transpose(picture)
        except MemoryError:
            raise
        except Image.UnidentifiedImageError:
            message = "cannot be decoded: it is not a PNG, JPEG, WebP, BMP, GIF, TIFF or AVIF picture"
            raise UserError(message) from None
        except Exception as error:  # Pillow's readers raise anything from SyntaxError to struct.error
            raise UserError(f"cannot be decoded: {error or type(error).__name__}") from error
    raise UserError(
        f"too large: {width} x {height} = {width * height / 1e6:.1f} megapixels, the limit is "
        f"{max_pixels / 1e6:g}. Scale it down, or raise --max-pixels"
    )


def _scale_16_bit(picture: Image.Image) -> Image.Image:
    """Deep gray (16-bit, or 32-bit holding 16, or float in [0, 1]) to 8 bits by scaling, not clipping."""
    values = np.asarray(picture).astype(np.float64)
    white = 1.0 if picture.mode == "F" else 65535.0
    if not (values.min() >= 0 and values.max() <= white):
        raise UserError(
            f"cannot be decoded: its values must lie in 0 to {white:g}, "
            f"got {values.min():g} to {values.max():g}. Save it as 8 or 16 bits"
        )
    gray = Image.fromarray(np.rint(values * (255 / white)).astype(np.uint8))
    clear = picture.info.get("transparency")
    if clear is not None:
        gray.putalpha(Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8)))
    return gray


def _in_srgb(picture: Image.Image, profile: bytes) -> Image.Image:
    """A picture's colours as sRGB has them, by its ICC profile; as they are where that can't be read, or is of gray."""
    try:
        own = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if "sRGB" in ImageCms.getProfileDescription(own):
            return picture
        mode = "RGB" if picture.mode == "CMYK" else picture.mode
        return ImageCms.profileToProfile(picture, own, ImageCms.createProfile("sRGB"), outputMode=mode) or picture
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return picture


def _rgb_or_rgba(picture: Image.Image) -> Image.Image:
    """Any mode to 8-bit RGBA if it says anything about transparency, else to RGB."""
    if picture.mode.startswith("I") or picture.mode == "F":
        picture = _scale_16_bit(picture)
    clear = picture.info.get("transparency")
    if isinstance(clear, tuple) and max(clear) > 255:
        # Pillow keeps the high bytes of 16-bit colour, but the clear colour in full.
        picture = picture.copy()
        picture.info["transparency"] = tuple(value >> 8 for value in clear)
    profile = picture.info.get("icc_profile")
    try:
        if picture.mode == "CMYK" and profile:
            picture = _in_srgb(picture, profile)
            profile = None
        turned = picture.convert("RGBA" if picture.has_transparency_data else "RGB")
        return _in_srgb(turned, profile) if profile else turned
    except (ValueError, OSError) as error:  # of colours that Pillow can read but not turn, such as LAB
        raise UserError(f"cannot be decoded: {error}. Save it as RGB") from error


def on_matte(picture: Image.Image, matte: tuple[int, int, int] = WHITE) -> Image.Image:
    """Any decoded picture as RGB, its transparency composited on the `matte` colour (0-255 each)."""
    if len(matte) != 3 or not all(0 <= value <= 255 for value in matte):
        raise UserError(f"`matte` must be three numbers from 0 to 255, got {matte}. White is (255, 255, 255).")
    picture = _rgb_or_rgba(picture)
    if picture.mode == "RGB":
        return picture
    ground = Image.new("RGBA", picture.size, (*matte, 255))
    return Image.alpha_composite(ground, picture).convert("RGB")


def clear_share(picture: Image.Image) -> float:
    """How much of a decoded picture is transparent: 0 where it says nothing of it, 1 where nothing would show."""
    picture = _rgb_or_rgba(picture)
    return 0.0 if picture.mode == "RGB" else 1 - float(np.asarray(picture.getchannel("A")).mean()) / 255


def _decode_path(path: str | File, max_pixels: int) -> Image.Image:
    path = Path(path) if isinstance(path, str) else path
    try:
        with path.open("rb") as file:
            return decode(file, max_pixels=max_pixels)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from error
    except UserError as error:
        raise UserError(f"{path} {error}.") from error


def open_picture(path: str | File, *, matte: tuple[int, int, int] = WHITE, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """A picture file as upright 8-bit RGB, transparency on the `matte` colour, first frame if it moves."""
    picture = _decode_path(path, max_pixels)
    try:
        return on_matte(picture, matte)
    except UserError as error:
        raise UserError(f"{path} {error}") from error


def alpha_mask(path: str | File, *, max_pixels: int = MAX_PIXELS) -> Image.Image | None:
    """A picture file's own transparency, upright, as gray (0 clear, 255 opaque); None if it has none."""
    picture = _rgb_or_rgba(_decode_path(path, max_pixels))
    return picture.getchannel("A") if picture.mode == "RGBA" else None


def open_mask(path: str | File, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """A mask file as gray: white (255) where the subject is; clear parts count as black."""
    return open_picture(path, matte=(0, 0, 0), max_pixels=max_pixels).convert("L")


def fit(picture: Image.Image, size: Size, view: View = WHOLE) -> Image.Image:
    """Centre crop to the aspect of `size` (width, height) in pixels, cut out the view and resize, in one resampling.

    The crop box is fractional, so both directions are scaled by the same factor exactly.
    """
    width, height = size
    if width < 1 or height < 1:
        raise UserError(f"`size` must be a width and a height of at least 1 pixel, got {width} x {height}.")
    crop_width = min(picture.width, picture.height * width / height)
    crop_height = min(picture.height, picture.width * height / width)
    left = (picture.width - crop_width) / 2 + view.left * crop_width
    top = (picture.height - crop_height) / 2 + view.top * crop_height
    box = (left, top, left + view.share * crop_width, top + view.share * crop_height)
    # The last digit of a sum may lie outside.
    box = (box[0], box[1], min(box[2], picture.width), min(box[3], picture.height))
    fitted = picture.resize((width, height), Image.Resampling.LANCZOS, box=box)
    return ImageOps.mirror(fitted) if view.mirrored else fitted


def to_tensor(picture: Image.Image) -> Float[Tensor, "3 height width"]:
    """An RGB picture as float32 in [-1, 1]."""
    if picture.mode != "RGB":
        raise ValueError(f"`picture` must be RGB, got {picture.mode}. Open it with open_picture.")
    pixels = torch.from_numpy(np.array(picture))
    return pixels.permute(2, 0, 1).float().contiguous() / 127.5 - 1


def to_picture(pixels: Float[Tensor, "3 height width"]) -> Image.Image:
    """Pixels in [-1, 1] as an RGB picture; what lies outside is clipped. Undoes `to_tensor` exactly."""
    if not torch.isfinite(pixels).all():
        raise ValueError("`pixels` must be finite, got NaN or infinity.")
    levels = ((pixels.detach().float().cpu() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return Image.fromarray(levels.permute(1, 2, 0).contiguous().numpy())


def mask_shares(mask: Any, field: str = "mask") -> Float[Tensor, "height width"]:
    """A mask as numbers in [0, 1], 1 where it is white: of a picture of mode L or 1, or of an array."""
    mode = getattr(mask, "mode", None)
    if mode not in (None, "L", "1"):
        raise UserError(f"`{field}` must be a picture of mode L or 1, got {mode}. Convert it: picture.convert('L').")
    shares = torch.tensor(np.asarray(mask), dtype=torch.float32) / (255 if mode == "L" else 1)
    if shares.ndim != 2 or not shares.numel():
        raise UserError(f"`{field}` must be (height, width), got {tuple(shares.shape)}.")
    if not ((shares >= 0) & (shares <= 1)).all():
        raise UserError(f"`{field}` must lie in [0, 1], got {shares.min():g} to {shares.max():g}.")
    return shares
