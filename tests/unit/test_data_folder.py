"""A folder is scanned once: each file a sample or skipped for a reason, each mistake told in one line."""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import atomtune.data.folder as module
from atomtune.data.folder import Scan, scan
from atomtune.errors import UserError


def picture(path: Path, size: tuple[int, int] = (12, 8), value: int = 90, exif: Image.Exif | None = None) -> Path:
    Image.new("RGB", size, (value, 20, 30)).save(path, **({"exif": exif} if exif else {}))
    return path


def metadata(folder: Path, *rows: dict[str, object] | str) -> None:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def reasons(result: Scan) -> dict[str, str]:
    return {item.path.name: item.reason for item in result.skipped}


def complaint(folder: Path, **settings: object) -> str:
    with pytest.raises(UserError) as caught:
        scan(folder, **settings)  # type: ignore[arg-type]
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_a_sample_says_all_about_its_picture(tmp_path: Path) -> None:
    path = picture(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("a red\r\n  square \n")
    Image.new("L", (6, 4), 255).save(tmp_path / "a.mask.png")
    (sample,) = scan(tmp_path).samples
    assert (sample.path, sample.caption, sample.caption_source) == (path, "a red square", "sidecar")
    assert (sample.mask, sample.width, sample.height) == (tmp_path / "a.mask.png", 12, 8)
    assert sample.digest == hashlib.sha256(path.read_bytes()).hexdigest()


def test_what_is_no_picture_is_skipped_with_its_reason_and_never_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Complaint: `.DS_Store` or a caption file is opened as a picture; crash in the loop."""
    picture(tmp_path / "a.png")
    picture(tmp_path / ".hidden.png")
    (tmp_path / ".DS_Store").write_bytes(b"\0")
    (tmp_path / "a.txt").write_text("a square")
    (tmp_path / "lone.txt").write_text("nothing beside me")
    (tmp_path / "Thumbs.db").write_bytes(b"\0")
    (tmp_path / "clip.mp4").write_bytes(b"\0")
    (tmp_path / "README").write_text("hello")
    (tmp_path / "b.caption").write_text("an unused caption")
    (tmp_path / "metadata.csv").write_text("file_name,text")
    (tmp_path / "folder.png").mkdir()
    os.mkfifo(tmp_path / "pipe.png")
    picture(tmp_path / "lone.mask.png")
    metadata(tmp_path, {"file_name": "a.png", "text": "overruled"})
    decoded: list[str] = []
    decode = module.decode

    def spy(file, **settings):  # type: ignore[no-untyped-def]
        decoded.append(Path(file.name).name)
        return decode(file, **settings)

    monkeypatch.setattr(module, "decode", spy)
    result = scan(tmp_path)
    assert decoded == ["a.png"]
    assert [sample.path.name for sample in result.samples] == ["a.png"]
    assert reasons(result) == {
        ".DS_Store": "hidden file",
        ".hidden.png": "hidden file",
        "README": "not a picture: no extension",
        "Thumbs.db": "not a picture: .db",
        "a.txt": "caption: of a.png",
        "b.caption": "caption file not used: captions are read from .txt, "
        "pass --caption-extension .caption to read these",
        "clip.mp4": "not a picture: .mp4",
        "folder.png": "folder: only pictures directly in the folder are read",
        "lone.mask.png": "mask without a picture: none is named lone",
        "lone.txt": "caption without a picture: none is named lone",
        "metadata.csv": "caption file not used: only metadata.jsonl is read, or name the folder as imagefolder:FOLDER",
        "metadata.jsonl": "captions of several pictures",
        "pipe.png": "special file",
    }
    assert [item.path.name for item in result.skipped] == sorted(reasons(result))


def test_samples_are_sorted_and_reruns_agree(tmp_path: Path) -> None:
    for name in ("c.png", "a.JPG", "B.webp", "b.PNG"):
        picture(tmp_path / name)
    result = scan(tmp_path, caption="a square")
    assert [sample.path.name for sample in result.samples] == ["B.webp", "a.JPG", "b.PNG", "c.png"]
    assert scan(str(tmp_path), caption="a square") == result


def test_width_and_height_are_those_of_the_upright_picture(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(tmp_path / "a.jpg", (12, 8), exif=exif)
    Image.new("L", (8, 12), 255).save(tmp_path / "a.mask.png")
    (sample,) = scan(tmp_path, caption="a square").samples
    assert (sample.width, sample.height) == (8, 12)


def test_sidecar_before_metadata_before_shared(tmp_path: Path) -> None:
    for name in "abcde":
        picture(tmp_path / f"{name}.png")
    (tmp_path / "a.TXT").write_text("from the sidecar")
    (tmp_path / "e.txt").write_text(" \n")
    metadata(
        tmp_path,
        {"file_name": "a.png", "text": "overruled"},
        "",
        {"file_name": "./b.png", "text": "from text"},
        {"file_name": "c.png", "caption": "from caption"},
        {"file_name": "d.png", "text": ""},
    )
    found = [(sample.caption, sample.caption_source) for sample in scan(tmp_path, caption=" shared  one ").samples]
    assert found == [
        ("from the sidecar", "sidecar"),
        ("from text", "metadata.jsonl"),
        ("from caption", "metadata.jsonl"),
        ("shared one", "shared prompt"),
        ("shared one", "shared prompt"),
    ]


def test_another_caption_extension(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    (tmp_path / "a.caption").write_text("used")
    (tmp_path / "a.txt").write_text("unused")
    result = scan(tmp_path, caption_extension=".Caption")
    assert result.samples[0].caption == "used"
    assert "--caption-extension .txt" in reasons(result)["a.txt"]


def test_byte_order_marks_and_accents_spelt_in_two_ways(tmp_path: Path) -> None:
    picture(tmp_path / "cafe\u0301.png")
    picture(tmp_path / "e\u0301te\u0301.png")
    (tmp_path / "caf\u00e9.txt").write_bytes(b"\xef\xbb\xbfa caf\xc3\xa9")
    metadata(tmp_path, '\ufeff{"file_name": "\u00e9t\u00e9.png", "text": "summer"}')
    assert [sample.caption for sample in scan(tmp_path).samples] == ["a caf\u00e9", "summer"]


def test_missing_and_empty_captions_are_counted_and_named(tmp_path: Path) -> None:
    """Complaint: captions with another ending overlooked; trains without any."""
    for name in "abcde":
        picture(tmp_path / f"{name}.png")
    (tmp_path / "a.txt").write_text("")
    (tmp_path / "b.txt").write_text("a square")
    (tmp_path / "c.caption").write_text("overlooked elsewhere")
    message = complaint(tmp_path)
    assert message.startswith("4 of the pictures have no caption, or an empty one: a.png, c.png, d.png and 1 more. ")
    assert "a.txt" in message
    assert "--caption," in message
    assert "Not used: c.caption; see --caption-extension." in message


def make_text(path: Path) -> None:
    path.write_text("I am no picture")


def make_empty(path: Path) -> None:
    path.write_bytes(b"")


def make_short(path: Path) -> None:
    noise = np.random.RandomState(0).randint(0, 256, (16, 16, 3)).astype(np.uint8)
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[:-200])


def make_huge(path: Path) -> None:
    picture(path, (200, 60))


def make_dangling(path: Path) -> None:
    path.symlink_to(path.with_name("gone.png"))


@pytest.mark.parametrize(
    ("name", "make", "told"),
    [
        ("bad.png", make_text, "cannot be decoded: it is not a PNG"),
        ("bad.jpg", make_empty, "empty file: 0 bytes"),
        ("bad.png", make_short, "cannot be decoded: "),
        ("bad.png", make_huge, "too large: 200 x 60 = 0.0 megapixels, the limit is 0.01. Scale it down, or"),
        ("bad.heic", make_text, "cannot be decoded: .heic is not read here, convert it to PNG or JPEG"),
        ("bad.png", make_dangling, "cannot be read: No such file or directory"),
    ],
)
def test_a_broken_picture_is_named_or_skipped_on_request(
    tmp_path: Path, name: str, make: Callable[[Path], None], told: str
) -> None:
    picture(tmp_path / "good.png")
    make(tmp_path / name)
    message = complaint(tmp_path, caption="a square", max_pixels=10_000)
    assert message.startswith(f"1 of the pictures cannot be used: {name} ({told}")
    assert "--skip-broken" in message
    result = scan(tmp_path, caption="a square", max_pixels=10_000, skip_broken=True)
    assert [sample.path.name for sample in result.samples] == ["good.png"]
    assert reasons(result)[name].startswith(told)


def test_all_broken_pictures_are_told_at_once(tmp_path: Path) -> None:
    """Complaint: one bad picture kills caching after hours."""
    for name in "dcba":
        make_text(tmp_path / f"{name}.png")
    message = complaint(tmp_path, caption="a square")
    assert message.startswith("4 of the pictures cannot be used: a.png (")
    assert "; b.png (" in message
    assert "; c.png (" in message
    assert " and 1 more. " in message


def test_a_mask_must_decode_match_and_be_png(tmp_path: Path) -> None:
    picture(tmp_path / "a.png", (100, 80))
    mask = picture(tmp_path / "a.mask.png", (80, 100))
    assert "a.png (mask does not match: a.mask.png must have the picture's shape 100 x 80, got 80 x 100)" in complaint(
        tmp_path, caption="a square"
    )
    mask.write_text("no picture")
    assert "a.png (mask cannot be used: " in complaint(tmp_path, caption="a square")
    mask.unlink()
    picture(tmp_path / "a.mask.jpg")
    assert "a mask must be a .png file, got .jpg" in complaint(tmp_path, caption="a square")


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ('{"file_name": "a.png", ', "line 2 must be one JSON object, got"),
        ("[" * 100_000, "line 2 must be one JSON object, got"),
        ("[1, 2]", 'line 2 must hold a "file_name"'),
        ('{"text": "a square"}', 'line 2 must hold a "file_name"'),
        ('{"file_name": 7}', 'line 2 must hold a "file_name"'),
        ('{"file_name": "a.png", "text": 7}', 'line 2: "text" must be a string, got 7'),
        ('{"file_name": "none.png", "text": "x"}', "line 2: no picture is named 'none.png'"),
        ('{"file_name": "notes.txt", "text": "x"}', "line 2: no picture is named 'notes.txt'"),
        ('{"file_name": "b.png", "text": "again"}', "line 2: 'b.png' has a line already"),
        (
            '{"file_name": "../a.png", "text": "x"}',
            "line 2: \"file_name\" must stay inside the folder, got '../a.png'",
        ),
        ('{"file_name": "sub/../../a.png"}', 'line 2: "file_name" must stay inside the folder'),
        ('{"file_name": "..\\\\a.png"}', 'line 2: "file_name" must stay inside the folder'),
        ('{"file_name": "/etc/passwd"}', 'line 2: "file_name" must stay inside the folder'),
        ('{"file_name": "C:\\\\a.png"}', 'line 2: "file_name" must stay inside the folder'),
        ('{"file_name": "sub/a.png"}', 'line 2: "file_name" must lie directly in the folder'),
        ('{"file_name": "."}', "line 2: "),
    ],
)
def test_bad_metadata_is_told_with_its_line(tmp_path: Path, row: str, told: str) -> None:
    picture(tmp_path / "a.png")
    picture(tmp_path / "b.png")
    (tmp_path / "notes.txt").write_text("x")
    metadata(tmp_path, {"file_name": "b.png", "text": "a square"}, row)
    message = complaint(tmp_path, caption="a square")
    assert f"metadata.jsonl {told}" in message
    assert len(message) < 400


def test_links_out_of_the_folder_are_refused(tmp_path: Path) -> None:
    folder, outside = tmp_path / "data", tmp_path / "outside"
    folder.mkdir()
    outside.mkdir()
    picture(folder / "a.png")
    picture(outside / "b.png")
    (folder / "b.png").symlink_to(outside / "b.png")
    metadata(folder, {"file_name": "b.png", "text": "x"})
    message = complaint(folder, caption="a square")
    assert "b.png (link out of the folder: copy the file in, or pass --follow-links)" in message
    assert len(scan(folder, caption="a square", skip_broken=True).samples) == 1
    assert len(scan(folder, caption="a square", follow_links=True).samples) == 2


@pytest.mark.parametrize("name", ["a.txt", "a.mask.png", "metadata.jsonl"])
def test_captions_and_masks_out_of_the_folder_are_refused_too(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    picture(folder / "a.png")
    (tmp_path / "secret").write_text("secret")
    (folder / name).symlink_to(tmp_path / "secret")
    message = complaint(folder, caption="a square", skip_broken=True)
    assert f"{name}: link out of the folder" in message
    assert "secret" not in message


def test_a_link_inside_the_folder_and_a_linked_folder_are_fine(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    picture(folder / "a.png")
    (folder / "b.png").symlink_to("a.png")
    (tmp_path / "link").symlink_to(folder)
    assert len(scan(tmp_path / "link", caption="a square").samples) == 2


@pytest.mark.parametrize("data", [b"\xff\xfea\x00b\x00", b"caf\xe9", b"a\x00b"])
def test_a_caption_in_another_encoding_is_told(tmp_path: Path, data: bytes) -> None:
    picture(tmp_path / "a.png")
    (tmp_path / "a.txt").write_bytes(data)
    assert "a.txt must be UTF-8 text" in complaint(tmp_path)
    picture(tmp_path / "b.png")
    (tmp_path / "b.txt").write_text("a square")
    found = scan(tmp_path, skip_broken=True)
    assert [sample.path.name for sample in found.samples] == ["b.png"]
    assert found.by_reason()["caption cannot be read"] == ["a.png"]


def test_two_captions_for_one_picture_are_told(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "a.TXT").write_text("two")
    if len(list(tmp_path.iterdir())) < 3:
        pytest.skip("this file system does not tell case")
    assert complaint(tmp_path) == "Two captions for a: a.TXT and a.txt. Remove one of them."


def test_an_empty_folder_is_told(tmp_path: Path) -> None:
    message = complaint(tmp_path)
    assert message.startswith(f"No picture to learn from in {tmp_path}: it is empty. Put in pictures (.png ")


def test_nothing_left_counts_files_per_reason_and_names_the_flags(tmp_path: Path) -> None:
    """Complaint: filters remove every picture; the error only says none found."""
    for name in ("a.mp4", "b.mov", ".x", "a.txt"):
        (tmp_path / name).write_text("x")
    (tmp_path / "photos").mkdir()
    make_huge(tmp_path / "huge.png")
    make_text(tmp_path / "bad.png")
    message = complaint(tmp_path, skip_broken=True, max_pixels=100)
    for count in (
        "2 x not a picture",
        "1 x hidden file",
        "1 x folder",
        "1 x too large",
        "1 x cannot be decoded",
        "1 x caption without a picture",
    ):
        assert count in message
    assert "name it as --data" in message
    assert "raise --max-pixels" in message


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"caption": " "}, "`caption` must hold words"),
        ({"caption_extension": "txt"}, "`caption_extension` must be a dot and letters"),
        ({"caption_extension": ".PNG"}, "`caption_extension` must be a dot and letters"),
        ({"caption_extension": ""}, "`caption_extension` must be a dot and letters"),
        ({"max_pixels": 0}, "`max_pixels` must be at least 1, got 0"),
    ],
)
def test_senseless_settings_are_told(tmp_path: Path, settings: dict[str, object], told: str) -> None:
    picture(tmp_path / "a.png")
    assert told in complaint(tmp_path, **settings)


def test_no_folder_is_told(tmp_path: Path) -> None:
    assert "must be a folder of pictures" in complaint(tmp_path / "none")
    assert "nothing there. Check --data." in complaint(tmp_path / "none")
    assert "a file. Check --data." in complaint(picture(tmp_path / "a.png"))


def test_a_caption_of_two_pictures_is_told(tmp_path: Path) -> None:
    for name in ("a.png", "a.webp"):
        picture(tmp_path / name)
    (tmp_path / "a.txt").write_text("one of them")
    assert complaint(tmp_path) == "a.txt is beside 2 pictures, a.png, a.webp. Give each a name of its own."


def test_a_caption_column_that_no_line_has_is_told(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    metadata(tmp_path, {"file_name": "a.png", "caption": "a kite"})
    said = complaint(tmp_path, caption_column="captoin", caption="a photo")
    assert said.startswith("`caption_column` must be in some line of ")
    assert said.endswith("got 'captoin'. Did you mean `caption`?")
