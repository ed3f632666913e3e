"""Shards and data sets are scanned as folders are: same samples, same reasons, same mistakes told."""

import dataclasses
import gc
import io
import json
import re
import tarfile
import warnings
from pathlib import Path

import pytest
from PIL import Image

import atomtune.data
from atomtune.cli.train import Command
from atomtune.data.folder import scan
from atomtune.data.picture import open_picture
from atomtune.errors import UserError
from atomtune.training.options import TrainOptions


def png(value: int, size: tuple[int, int] = (12, 8)) -> bytes:
    data = io.BytesIO()
    Image.new("RGB", size, (value, 20, 30)).save(data, "PNG")
    return data.getvalue()


def shard(path: Path, **files: bytes | str) -> Path:
    """A .tar; `a_png=...` becomes `a.png`."""
    with tarfile.open(path, "w") as archive:
        for name, content in files.items():
            data = content.encode() if isinstance(content, str) else content
            member = tarfile.TarInfo(name.replace("_", "."))
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def mask(value: int = 255) -> bytes:
    data = io.BytesIO()
    Image.new("L", (12, 8), value).save(data, "PNG")
    return data.getvalue()


# ---------------------------------------------------------------------------------------------------- shards


def test_shards_pair_files_by_key(tmp_path: Path) -> None:
    shard(
        tmp_path / "s-0.tar",
        b_png=png(2),
        b_json=json.dumps({"caption": "two", "repeats": 3}),
        a_txt="one",
        a_png=png(1),
    )
    shard(tmp_path / "s-1.tar", a_png=png(3), a_txt="three", a_mask_png=mask(), c_cls="7")
    found = scan(tmp_path)
    told = [(s.path.name, s.caption, s.caption_source, s.repeats, s.mask is not None) for s in found.samples]
    assert told == [
        ("s-0.tar/a.png", "one", "sidecar", 1, False),
        ("s-0.tar/b.png", "two", "json", 3, False),
        ("s-1.tar/a.png", "three", "sidecar", 1, True),
    ], "one key in two shards is two pictures"
    assert [open_picture(sample.path).getpixel((0, 0))[0] for sample in found.samples] == [1, 2, 3]  # type: ignore[index]
    assert found.by_reason()["not a picture"] == ["s-1.tar/c.cls"]
    assert str(found.samples[0].path) == str(tmp_path / "s-0.tar" / "a.png")
    assert scan(tmp_path / "s-1.tar").samples == found.samples[2:]


def test_a_shards_pictures_are_those_of_a_folder(tmp_path: Path) -> None:
    """Digests are of the pictures' bytes, so that caches hold for both."""
    (tmp_path / "a.png").write_bytes(png(1))
    (tmp_path / "a.txt").write_text("one")
    packed = shard(tmp_path / "s.tar", a_png=png(1), a_txt="one")
    (plain,), (packed_sample,) = scan(tmp_path).samples, scan(packed).samples
    assert dataclasses.replace(packed_sample, path=plain.path) == plain


def test_a_folders_metadata_in_a_shard_is_told(tmp_path: Path) -> None:
    found = scan(shard(tmp_path / "s.tar", a_png=png(1), a_txt="one", metadata_jsonl='{"file_name": "a.png"}'))
    assert [sample.caption for sample in found.samples] == ["one"]
    assert found.by_reason()["caption file not used"] == ["s.tar/metadata.jsonl"]


def test_a_shard_that_is_not_whole_or_not_plain_is_told(tmp_path: Path) -> None:
    path = shard(tmp_path / "s.tar", a_png=png(1, (400, 400)), a_txt="one", b_png=png(2), b_txt="x")
    path.write_bytes(path.read_bytes()[:700])
    with pytest.raises(UserError, match=r"s\.tar"):
        scan(path)
    with tarfile.open(path, "w:gz") as archive:
        archive.addfile(tarfile.TarInfo("a.txt"))
    with pytest.raises(UserError, match=r"s\.tar must be a plain \.tar"):
        scan(path)


def test_a_shards_odd_members_are_skipped_or_told(tmp_path: Path) -> None:
    path = shard(tmp_path / "s.tar", a_png=png(1), a_txt="one", _a_png=b"")
    with tarfile.open(path, "a") as archive:
        link = tarfile.TarInfo("b.png")
        link.type, link.linkname = tarfile.SYMTYPE, "../../secret.png"
        archive.addfile(link)
    assert scan(path).by_reason() == {
        "hidden file": ["s.tar/.a.png"],
        "special file": ["s.tar/b.png"],
        "caption": ["s.tar/a.txt"],
    }
    with pytest.raises(UserError, match=r"a\.png .*cannot be decoded"):
        scan(shard(tmp_path / "t.tar", a_png=b"no picture", a_txt="one"))
    with pytest.raises(UserError, match=r"t\.tar/a\.json must be one JSON object"):
        scan(shard(tmp_path / "t.tar", a_png=png(1), a_json="{"))
    with pytest.raises(UserError, match=r"t\.tar/a\.json must be one JSON object, got '\[1\]'"):
        scan(shard(tmp_path / "t.tar", a_png=png(1), a_json="[1]"))
    with pytest.raises(UserError, match=r"1 of the pictures have no caption.*t\.tar/a\.png"):
        scan(shard(tmp_path / "t.tar", a_png=png(1)))


# ------------------------------------------------------------------------------------------------- data sets


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    """Three rows with pictures in them; the library's own cache lies in the test's folder."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = {
        "image": [{"bytes": png(value), "path": None} for value in (1, 2, 3)],
        "text": ["one", "two", "three"],
        "long": ["a long one", "a long two", None],
        "repeats": [1, 2, None],
    }
    return datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())


@pytest.mark.parametrize("kind", ["saved", "splits", "parquet", "folder-of-parquet"])
def test_a_data_set_is_scanned_like_a_folder(tmp_path: Path, table, kind: str) -> None:  # type: ignore[no-untyped-def]
    import datasets

    place = tmp_path / f"set-{kind}"
    if kind == "saved":
        table.save_to_disk(place)
    elif kind == "splits":
        datasets.DatasetDict({"test": table.select([0]), "train": table}).save_to_disk(place)
    else:
        place.mkdir()
        place = place / "rows.parquet"
        table.to_parquet(place)
    found = scan(place.parent if kind == "folder-of-parquet" else place)
    told = [(s.caption, s.caption_source, s.repeats) for s in found.samples]
    assert told == [("one", "column text", 1), ("two", "column text", 2), ("three", "column text", 1)]
    assert [open_picture(s.path).getpixel((0, 0))[0] for s in found.samples] == [1, 2, 3]  # type: ignore[index]


def test_a_caption_column_is_used_and_its_gaps_told(tmp_path: Path, table) -> None:  # type: ignore[no-untyped-def]
    table.save_to_disk(tmp_path / "set")
    with pytest.raises(UserError, match=r"no caption.*set/000002.*Write it into a column long,"):
        scan(tmp_path / "set", caption_column="long")
    assert scan(tmp_path / "set", caption_column="long", caption="else").samples[0].caption == "a long one"
    table.select_columns(["image"]).save_to_disk(tmp_path / "bare")
    assert {s.caption for s in scan(tmp_path / "bare", caption="one for all").samples} == {"one for all"}
    with pytest.raises(
        UserError, match=r"`caption_column` must be a column of .*: image, text, long, repeats; got 'x'"
    ):
        scan(tmp_path / "set", caption_column="x")


def test_image_folders_keep_same_names_apart(tmp_path: Path, table) -> None:  # type: ignore[no-untyped-def]
    """No picture gets the caption of another that has its name in another folder."""
    for number, name in enumerate(("x", "y")):
        (tmp_path / "set" / name).mkdir(parents=True)
        (tmp_path / "set" / name / "a.png").write_bytes(png(number + 1))
    (tmp_path / "set" / "metadata.csv").write_text("file_name,text\nx/a.png,one\ny/a.png,two\n")
    with pytest.raises(UserError, match=r"No picture to learn from .*2 x folder.*imagefolder:FOLDER"):
        scan(tmp_path / "set")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # the library leaves the table of captions open
        found = scan(f"imagefolder:{tmp_path / 'set'}")
        gc.collect()
    pairs = [(open_picture(s.path).getpixel((0, 0))[0], s.caption) for s in found.samples]  # type: ignore[index]
    assert sorted(pairs) == [(1, "one"), (2, "two")]


def test_a_table_without_pictures_is_told(tmp_path: Path, table) -> None:  # type: ignore[no-untyped-def]
    table.remove_columns("image").save_to_disk(tmp_path / "set")
    with pytest.raises(UserError, match="must have one column of pictures, got"):
        scan(tmp_path / "set")
    (tmp_path / "a.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(UserError, match=r"a\.parquet cannot be read as a data set: "):
        scan(tmp_path / "a.parquet")


def test_the_hub_is_asked_for_by_name_only(table, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    """A mistyped folder is no reason to go to the network."""
    import datasets

    asked: list[str] = []

    def load_dataset(name: str, **_: object):  # type: ignore[no-untyped-def]
        asked.append(name)
        return datasets.DatasetDict({"train": table})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(UserError, match="nothing there"):
        scan("someone/pictures")
    assert asked == []
    assert len(scan("hub:someone/pictures").samples) == 3
    assert asked == ["someone/pictures"]


def test_without_the_library_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"needs the `datasets` library: pip install 'atomtune\[datasets\]'"):
        scan("hub:someone/pictures")


# ------------------------------------------------------------------------------------------------- all kinds


def test_repeats_and_columns_of_metadata(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / f"{name}.png").write_bytes(png(1))
    (tmp_path / "b.txt").write_text("beside")
    rows = [{"file_name": "a.png", "text": "short", "long": "a long one"}, {"file_name": "b.png", "repeats": 4}]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert [(s.caption, s.repeats) for s in scan(tmp_path).samples] == [("short", 1), ("beside", 4)]
    assert scan(tmp_path, caption_column="long").samples[0].caption == "a long one"
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "a.png", "text": "x", "repeats": 0}))
    with pytest.raises(UserError, match='line 1: "repeats" must be a whole number from 1 to 10000, got 0'):
        scan(tmp_path)


def test_every_flag_that_a_message_names_exists() -> None:
    """Complaint: the error names a setting that cannot be found."""
    folder = Path(atomtune.data.__file__).parent
    named = set(re.findall(r"--([a-z][a-z-]+)", "".join(path.read_text() for path in folder.glob("*.py"))))
    known = {field.name.replace("_", "-") for kind in (TrainOptions, Command) for field in dataclasses.fields(kind)}
    assert named >= {"skip-broken", "max-pixels", "caption-extension", "follow-links"}
    assert named <= known
