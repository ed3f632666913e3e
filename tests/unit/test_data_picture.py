"""Pictures load upright, on a stated matte, at their full range, and are never deformed."""

import io
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms, ImageOps

from atomtune.data.picture import (
    MAX_PIXELS,
    alpha_mask,
    decode,
    fit,
    on_matte,
    open_mask,
    open_picture,
    to_picture,
    to_tensor,
)
from atomtune.errors import UserError

# How a camera stores an upright picture under each orientation: the inverse of what a viewer must do.
STORED = {
    1: lambda picture: picture,
    2: ImageOps.mirror,
    3: lambda picture: picture.rotate(180),
    4: ImageOps.flip,
    5: lambda picture: picture.transpose(Image.Transpose.TRANSPOSE),
    6: lambda picture: picture.transpose(Image.Transpose.ROTATE_90),
    7: lambda picture: picture.transpose(Image.Transpose.TRANSVERSE),
    8: lambda picture: picture.transpose(Image.Transpose.ROTATE_270),
}


def blocks(mode: str = "RGB") -> Image.Image:
    """48 x 32 pixels in flat 16 x 16 blocks, all different: JPEG keeps them apart."""
    levels = np.random.RandomState(0).randint(0, 256, (2, 3, 3)).astype(np.uint8)
    return Image.fromarray(levels.repeat(16, 0).repeat(16, 1)).convert(mode)


@pytest.mark.parametrize("extension", ["png", "jpg", "webp", "tif"])
def test_all_orientations_load_to_equal_pixels(tmp_path: Path, extension: str) -> None:
    """Complaint: phone photos learned sideways, EXIF ignored."""
    settings = {"jpg": {"quality": 100, "subsampling": 0}, "webp": {"lossless": True}}.get(extension, {})
    loaded = []
    for orientation, store in STORED.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        path = tmp_path / f"{orientation}.{extension}"
        store(blocks()).save(path, exif=exif, **settings)
        loaded.append(np.asarray(open_picture(path)))
    assert loaded[0].shape == (32, 48, 3)
    if extension != "jpg":
        assert np.array_equal(loaded[0], np.asarray(blocks()))
    for pixels in loaded:
        assert np.array_equal(pixels, loaded[0])


def half_clear() -> Image.Image:
    picture = Image.new("RGBA", (4, 2), (200, 0, 0, 255))
    picture.paste((0, 0, 0, 0), (0, 0, 2, 2))
    return picture


def test_transparency_is_composited_on_the_stated_matte(tmp_path: Path) -> None:
    """Complaint: transparent background becomes a colour that nobody chose."""
    half_clear().save(tmp_path / "a.png")
    assert open_picture(tmp_path / "a.png").getpixel((0, 0)) == (255, 255, 255)
    green = open_picture(tmp_path / "a.png", matte=(0, 255, 0))
    assert (green.getpixel((0, 0)), green.getpixel((3, 1))) == ((0, 255, 0), (200, 0, 0))
    Image.new("RGBA", (1, 1), (255, 0, 0, 128)).save(tmp_path / "half.png")
    assert open_picture(tmp_path / "half.png", matte=(0, 0, 255)).getpixel((0, 0)) == (128, 0, 127)


def test_alpha_mask_is_the_transparency_or_none(tmp_path: Path) -> None:
    half_clear().save(tmp_path / "a.png")
    blocks().save(tmp_path / "b.png")
    mask = alpha_mask(tmp_path / "a.png")
    assert mask is not None
    assert (mask.mode, mask.getpixel((0, 0)), mask.getpixel((3, 0))) == ("L", 0, 255)
    assert alpha_mask(tmp_path / "b.png") is None


def test_every_kind_of_transparency_shows_the_matte(tmp_path: Path) -> None:
    palette = Image.new("P", (2, 1), 0)
    palette.putpalette([10, 20, 30, 200, 0, 0])
    palette.putpixel((1, 0), 1)
    gray = Image.new("L", (2, 1), 7)
    gray.putpixel((1, 0), 99)
    deep = Image.fromarray(np.array([[500, 40000]], dtype=np.uint16))
    color = Image.new("RGB", (2, 1), (1, 2, 3))
    color.putpixel((1, 0), (200, 0, 0))
    bits = Image.new("1", (2, 1), 0)
    bits.putpixel((1, 0), 1)
    palette.save(tmp_path / "index.png", transparency=0)
    palette.save(tmp_path / "bytes.png", transparency=b"\x00\xff")
    palette.save(tmp_path / "moving.gif", transparency=0)
    gray.save(tmp_path / "gray.png", transparency=7)
    deep.save(tmp_path / "deep.png", transparency=500)
    color.save(tmp_path / "color.png", transparency=(1, 2, 3))
    bits.save(tmp_path / "bits.png", transparency=0)
    gray_alpha = gray.convert("LA")
    gray_alpha.putalpha(Image.fromarray(np.array([[0, 255]], dtype=np.uint8)))
    gray_alpha.save(tmp_path / "la.png")
    paths = sorted(tmp_path.iterdir())
    assert len(paths) == 8
    for path in paths:
        picture = open_picture(path, matte=(0, 255, 0))
        assert picture.getpixel((0, 0)) == (0, 255, 0), path.name
        assert picture.getpixel((1, 0)) != (0, 255, 0), path.name


def test_a_clear_colour_in_sixteen_bits_shows_the_matte() -> None:
    """Written by hand: Pillow reads such files and cannot write them."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + name + data + zlib.crc32(name + data).to_bytes(4, "big")

    pixels = np.array([[1000, 2000, 3000], [60000, 50000, 40000]], dtype=">u2")
    header = (2).to_bytes(4, "big") + (1).to_bytes(4, "big") + bytes([16, 2, 0, 0, 0])
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"tRNS", pixels[0].tobytes())
    data += chunk(b"IDAT", zlib.compress(b"\0" + pixels.tobytes())) + chunk(b"IEND", b"")
    picture = on_matte(decode(io.BytesIO(data)), (0, 255, 0))
    assert picture.getpixel((0, 0)) == (0, 255, 0)
    assert picture.getpixel((1, 0)) == (60000 >> 8, 50000 >> 8, 40000 >> 8)


def test_sixteen_bit_gray_is_scaled_not_clipped(tmp_path: Path) -> None:
    ramp = np.array([[0, 257, 32768, 65535]], dtype=np.uint16)
    Image.fromarray(ramp).save(tmp_path / "a.png")
    Image.fromarray(ramp).save(tmp_path / "a.tif")
    Image.fromarray(ramp.astype(np.int32)).save(tmp_path / "b.tif")
    Image.fromarray((ramp / 65535).astype(np.float32)).save(tmp_path / "c.tif")
    for name in ("a.png", "a.tif", "b.tif", "c.tif"):
        assert np.asarray(open_picture(tmp_path / name))[0, :, 0].tolist() == [0, 1, 128, 255], name


@pytest.mark.parametrize("values", [np.array([[-1, 5]], np.int32), np.array([[0, np.nan]], np.float32)])
def test_values_without_a_known_white_are_refused(tmp_path: Path, values: np.ndarray) -> None:
    Image.fromarray(values).save(tmp_path / "a.tif")
    with pytest.raises(UserError, match=r"a\.tif cannot be decoded: its values must lie in 0 to .* 8 or 16 bits"):
        open_picture(tmp_path / "a.tif")


def test_gray_bits_and_cmyk_become_rgb(tmp_path: Path) -> None:
    Image.new("L", (2, 2), 77).save(tmp_path / "l.png")
    Image.new("1", (2, 2), 1).save(tmp_path / "1.png")
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(tmp_path / "cmyk.jpg", quality=100)
    assert open_picture(tmp_path / "l.png").getpixel((0, 0)) == (77, 77, 77)
    assert open_picture(tmp_path / "1.png").getpixel((0, 0)) == (255, 255, 255)
    red, green, blue = open_picture(tmp_path / "cmyk.jpg").getpixel((8, 8))  # type: ignore[misc]
    assert (red > 250, green < 5, blue < 5) == (True, True, True)


@pytest.mark.parametrize("extension", ["gif", "webp", "png"])
def test_a_moving_picture_gives_its_first_frame(tmp_path: Path, extension: str) -> None:
    first, second = Image.new("RGB", (8, 8), (255, 0, 0)), Image.new("RGB", (8, 8), (0, 0, 255))
    path = tmp_path / f"a.{extension}"
    first.save(path, save_all=True, append_images=[second], **({"lossless": True} if extension == "webp" else {}))
    assert open_picture(path).getpixel((4, 4)) == (255, 0, 0)


def test_size_is_refused_from_the_header_with_size_and_limit(tmp_path: Path) -> None:
    blocks().save(tmp_path / "a.png")
    with pytest.raises(UserError, match=r"a\.png too large: 48 x 32 = 0\.0 megapixels, .*0\.001.*--max-pixels"):
        open_picture(tmp_path / "a.png", max_pixels=1000)
    assert open_picture(tmp_path / "a.png", max_pixels=48 * 32).size == (48, 32)


def test_a_bomb_is_refused_by_us_and_pillows_own_limit_comes_back() -> None:
    # A header that promises 30000 x 30000 pixels, and nothing behind it.
    bomb = io.BytesIO()
    Image.new("1", (1, 1)).save(bomb, "PNG")
    data = bytearray(bomb.getvalue())
    data[16:24] = (30000).to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(bytes(data[12:29])).to_bytes(4, "big")
    before = Image.MAX_IMAGE_PIXELS
    with pytest.raises(UserError, match=r"30000 x 30000 = 900\.0 megapixels, the limit is 100"):
        decode(io.BytesIO(bytes(data)))
    assert before == Image.MAX_IMAGE_PIXELS


def test_between_pillows_warning_and_our_limit_nothing_warns(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    blocks().save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert fit(open_picture(tmp_path / "a.png"), (48, 16)).size == (48, 16)
    assert MAX_PIXELS == 100_000_000


def test_a_flipped_byte_and_a_short_file_are_told(tmp_path: Path) -> None:
    noise = Image.fromarray(np.random.RandomState(0).randint(0, 256, (32, 32, 3)).astype(np.uint8))
    for name in ("a.png", "a.jpg", "a.webp", "a.tif"):
        noise.save(tmp_path / name)
        data = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(data[: len(data) // 2])
        with pytest.raises(UserError, match=f"{name} cannot be decoded: "):
            open_picture(tmp_path / name)
    noise.save(tmp_path / "b.png")
    data = bytearray((tmp_path / "b.png").read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "b.png").write_bytes(bytes(data))
    with pytest.raises(UserError, match=r"b\.png cannot be decoded: "):
        open_picture(tmp_path / "b.png")
    noise.save(tmp_path / "c.png")
    data = bytearray((tmp_path / "c.png").read_bytes())
    data[-13] ^= 1  # the checksum of the pixels, which decode without it
    (tmp_path / "c.png").write_bytes(bytes(data))
    with pytest.raises(UserError, match=r"c\.png cannot be decoded: "):
        open_picture(tmp_path / "c.png")


def test_files_that_are_no_pictures_are_told(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n")
    with pytest.raises(UserError, match=r"a\.png cannot be decoded: it is not a PNG"):
        open_picture(tmp_path / "a.png")
    with pytest.raises(UserError, match=r"none\.png cannot be read: No such file"):
        open_picture(tmp_path / "none.png")


def test_bad_exif_is_no_reason_to_stop(tmp_path: Path) -> None:
    blocks().save(tmp_path / "a.jpg", exif=b"Exif\x00\x00II*\x00\xff\xff\x00\x00garbage")
    assert open_picture(tmp_path / "a.jpg").size == (48, 32)


@pytest.mark.parametrize("matte", [(0, 0), (0, 0, 256), (-1, 0, 0)])
def test_matte_must_be_a_colour(tmp_path: Path, matte: tuple[int, int, int]) -> None:
    blocks().save(tmp_path / "a.png")
    with pytest.raises(UserError, match="`matte` must be three numbers from 0 to 255"):
        open_picture(tmp_path / "a.png", matte=matte)


def test_a_mask_is_white_on_black_even_from_transparency(tmp_path: Path) -> None:
    shape = Image.new("RGBA", (2, 1), (255, 255, 255, 255))
    shape.putpixel((0, 0), (255, 255, 255, 0))
    shape.save(tmp_path / "a.mask.png")
    mask = open_mask(tmp_path / "a.mask.png")
    assert (mask.mode, mask.getpixel((0, 0)), mask.getpixel((1, 0))) == ("L", 0, 255)


@pytest.mark.parametrize(("width", "height"), [(101, 37), (37, 101), (64, 64), (7, 3), (1, 1)])
@pytest.mark.parametrize("size", [(64, 64), (48, 80), (80, 48)])
def test_fit_scales_both_directions_alike(width: int, height: int, size: tuple[int, int]) -> None:
    """Complaint: pictures deformed although cropping was off."""
    # Two ramps: their slopes in the result are the two scales, whatever was cropped.
    x, y = np.meshgrid(np.arange(width) / max(width, 2), np.arange(height) / max(height, 2))
    scales = []
    for ramp, axis, length in ((x, 1, width), (y, 0, height)):
        out = np.asarray(fit(Image.fromarray(ramp.astype(np.float32)), size))
        assert out.shape == size[::-1]
        inner = np.gradient(out.astype(np.float64), axis=axis)
        if length > 16:
            middle = np.median(inner)
            scales.append(1 / (middle * max(length, 2)))
    if len(scales) == 2:
        assert scales[0] / scales[1] == pytest.approx(1, abs=0.01)


def test_fit_takes_the_centre() -> None:
    wide = Image.new("RGB", (90, 30), (0, 0, 0))
    wide.paste((255, 255, 255), (30, 0, 60, 30))
    assert np.asarray(fit(wide, (30, 30))).min() == 255


def test_fit_refuses_no_size() -> None:
    with pytest.raises(UserError, match=r"`size` must be .* got 0 x 8"):
        fit(blocks(), (0, 8))


def test_tensor_and_back_is_exact_and_in_range() -> None:
    levels = np.arange(256 * 3, dtype=np.int64).reshape(16, 16, 3) % 256
    picture = Image.fromarray(levels.astype(np.uint8))
    pixels = to_tensor(picture)
    assert (pixels.shape, pixels.dtype) == ((3, 16, 16), torch.float32)
    assert (pixels.min().item(), pixels.max().item()) == (-1, 1)
    assert np.array_equal(np.asarray(to_picture(pixels)), np.asarray(picture))
    assert to_picture(torch.full((3, 1, 2), 9.0)).getpixel((1, 0)) == (255, 255, 255)


def test_tensor_refuses_other_modes_and_picture_refuses_nan() -> None:
    with pytest.raises(ValueError, match="`picture` must be RGB, got L"):
        to_tensor(Image.new("L", (2, 2)))
    with pytest.raises(ValueError, match="`pixels` must be finite"):
        to_picture(torch.full((3, 2, 2), float("nan")))


def test_colours_are_those_of_srgb(tmp_path: Path) -> None:
    """A profile of other primaries moves pixels; sRGB's own and a broken one leave them alone."""
    plain = Image.new("RGB", (2, 2), (200, 30, 30))
    same = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    seen = {}
    for name, profile in {"same": same, "lab": lab, "broken": b"no profile"}.items():
        plain.save(tmp_path / f"{name}.png", icc_profile=profile)
        seen[name] = np.asarray(open_picture(tmp_path / f"{name}.png"))
    assert all((pixels == np.asarray(plain)).all() for pixels in seen.values())
    wide = bytearray(same)  # its red and green primaries for each other
    red, green = wide.index(b"rXYZ"), wide.index(b"gXYZ")
    wide[red : red + 4], wide[green : green + 4] = b"gXYZ", b"rXYZ"
    wide = wide.replace(b"s\0R\0G\0B", b"m\0i\0n\0e").replace(b"sRGB", b"mine")
    plain.save(tmp_path / "wide.png", icc_profile=bytes(wide))
    turned = np.asarray(open_picture(tmp_path / "wide.png"))[0, 0]
    assert turned[1] > turned[0], "red was green there"
