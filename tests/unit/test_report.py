"""The report is one whole file: well formed, self-contained, escaped, told in words, and written at once."""

import base64
import io
import math
import os
import re
from dataclasses import dataclass, field, replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from atomtune.errors import UserError
from atomtune.explore import report as module
from atomtune.explore.report import AtomRow, Cell, Curve, Fact, Report, Strip, write_report

VOID = {"meta", "link", "img", "br", "wbr"}
NOTHING = Report("A title", "", "", (), (), "", (), 0, 0, (), ())


def picture(side: int = 8, mode: str = "RGB") -> Image.Image:
    return Image.new(mode, (side, side))


FULL = Report(
    title="A pineapple",
    lead="Learned from four pictures.",
    command='atomtune demo --out "runs/de mo"',
    facts=(Fact("Drift", "0.012", "How far unrelated pictures moved."),),
    strips=(
        Strip("What it learned", "Same noise.", (Cell(picture(), "Adapted", "seed 3"), Cell(picture(), "Base"))),
        Strip("New prompts", "", tuple(Cell(picture(), f"picture {i}") for i in range(6)), rows=2),
    ),
    formula="mean of code times atom norm",
    atoms=(
        AtomRow("L1[2]", "layers.0.attn.to_q", 0.01, 0.1, 0.06, None, None),
        AtomRow("L17[137]", "layers.3.attn.to_k", 0.04, 0.4, 0.0004, 0.9, picture()),
    ),
    small_atoms=1214,
    dead_atoms=1,
    curves=(
        Curve("loss", (0, 50, 100), (2.0, 1.0, 0.5)),
        Curve("silence", (0, 50, 100), (1.0, 0.1, 0.001), log=True),
    ),
    footer=(("Base", "scenes"),),
)


@dataclass
class Page(HTMLParser):
    """What a browser would read; an unbalanced tag fails the test that parses."""

    text: str
    open: list[str] = field(default_factory=list)
    tags: list[tuple[str, dict[str, str | None]]] = field(default_factory=list)
    words: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()
        self.feed(self.text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len({name for name, _ in attrs}) == len(attrs), f"an attribute of <{tag}> stands twice"
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.words.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]

    @property
    def shown(self) -> str:
        return " ".join(" ".join(self.words).split())


def page(report: Report, folder: Path) -> Page:
    return Page(write_report(report, folder / "report.html").read_text(encoding="utf-8"))


def test_page_is_balanced_and_in_the_stated_order(tmp_path: Path) -> None:
    shown = page(FULL, tmp_path).shown
    parts = [
        "A pineapple Learned",
        "Drift",
        "What it learned",
        "New prompts",
        "Atoms by",
        "Training",
        "atomtune",
    ]
    places = [shown.index(part) for part in [*parts, "Base scenes"]]
    assert places == sorted(places)


def test_nothing_is_fetched_and_nothing_runs(tmp_path: Path) -> None:
    read = page(FULL, tmp_path)
    text = read.text
    assert not re.search(r"https?://|//[a-z]|@import|url\(|<script|javascript:", text, re.IGNORECASE)
    links = [value for _, attrs in read.tags for name, value in attrs.items() if name in ("src", "href")]
    assert all(value is not None and value.startswith("data:") for value in links)
    assert not any(name.startswith("on") for _, attrs in read.tags for name in attrs)
    assert "default-src 'none'" in text


def test_every_picture_and_curve_is_told_in_words(tmp_path: Path) -> None:
    read = page(FULL, tmp_path)
    alts = [image["alt"] for image in read.all("img")]
    assert alts[:2] == ["Adapted", "Base"]
    assert alts[-1] == "Map of L17[137]: active at < 0.1 % of positions"
    assert all(alts)
    assert len(alts) == 9
    labels = [drawing["aria-label"] for drawing in read.all("svg")]
    assert labels[0] == "loss: 2 at step 0, 0.5 at step 100; lowest 0.5, highest 2"


def test_a_picture_without_caption_is_named_by_its_strip(tmp_path: Path) -> None:
    report = replace(NOTHING, strips=(Strip("Faces", "", (Cell(picture(), ""),)),))
    assert page(report, tmp_path).all("img")[0]["alt"] == "Faces"


def test_all_text_is_escaped(tmp_path: Path) -> None:
    evil = """</style></title><script>alert("1")</script>'&amp;"""
    atom = AtomRow(evil, evil, 0.1, 1.0, 0.1, 0.5, picture())
    report = Report(
        title=evil,
        lead=evil,
        command=evil,
        facts=(Fact(evil, evil, evil),),
        strips=(
            Strip(evil, evil, (Cell(picture(), evil, evil),)),
            Strip(evil, evil, (Cell(picture(), evil),), rows=2),
        ),
        formula=evil,
        atoms=(atom,),
        small_atoms=0,
        dead_atoms=0,
        curves=(Curve(evil, (0, 1), (0.0, 1.0)),),
        footer=((evil, evil),),
    )
    read = page(report, tmp_path)
    assert read.all("script") == []
    # title, h1, lead, command; the fact; two strips; atom, site, formula, curve; footer
    assert "".join(read.words).count(evil) == 4 + 3 + 4 + 3 + 4 + 2
    assert [image["alt"] for image in read.all("img")][:2] == [evil, evil]


def test_empty_parts_leave_no_trace(tmp_path: Path) -> None:
    read = page(NOTHING, tmp_path)
    assert read.shown == "A title A title"
    assert {tag for tag, _ in read.tags} & {"section", "p", "dl", "table", "footer", "pre", "svg"} == set()
    assert page(replace(NOTHING, strips=(Strip("Nobody", "", ()),)), tmp_path).shown == "A title A title"
    assert page(replace(NOTHING, curves=(Curve("loss", (), ()),)), tmp_path).shown == "A title A title"


def test_atoms_are_ranked_and_the_bars_are_in_proportion(tmp_path: Path) -> None:
    read = page(FULL, tmp_path)
    shown = read.shown
    assert shown.index("L17[137]") < shown.index("L1[2]")
    assert [bar["style"] for bar in read.all("i")] == ["width:100.0%", "width:25.0%"]
    assert "share of the total mean of code times atom norm" in shown
    assert "0.0400 40 % < 0.1 % 90 %" in shown
    assert "0.0100 10 % 6.0 % –" in shown
    assert "1,214 small ones , below 1 % of the total importance each." in shown
    assert "1 dead atom , never active" in shown


def test_columns_that_nobody_filled_vanish(tmp_path: Path) -> None:
    shown = page(replace(FULL, atoms=FULL.atoms[:1]), tmp_path).shown
    assert "Density" in shown
    assert "Purity" not in shown
    assert "Map" not in shown


def test_dead_atoms_alone_are_told(tmp_path: Path) -> None:
    read = page(replace(NOTHING, dead_atoms=3), tmp_path)
    assert "3 dead atoms" in read.shown
    assert read.all("table") == []


def test_values_that_are_not_finite_are_left_out_and_leave_a_gap(tmp_path: Path) -> None:
    values = (1.0, 2.0, math.nan, 3.0, math.inf, 1.5, math.nan)
    read = page(replace(NOTHING, curves=(Curve("loss", tuple(range(7)), values),)), tmp_path)
    assert "Left out: 3 of 7 values, not finite." in read.shown
    assert "last nan" in read.shown
    [line] = read.all("path")
    assert line["d"] is not None
    assert line["d"].count("M") == 3
    assert "nan" not in line["d"]
    assert "inf" not in line["d"]


def test_log_curve_leaves_out_what_has_no_logarithm(tmp_path: Path) -> None:
    read = page(replace(NOTHING, curves=(Curve("silence", (0, 1, 2), (1.0, 0.0, 0.1), log=True),)), tmp_path)
    assert "Left out: 1 of 3 values, not finite, or not above 0." in read.shown
    assert "silence , log scale last 0.1" in read.shown


def test_curve_without_a_finite_value_has_a_note_and_no_drawing(tmp_path: Path) -> None:
    read = page(replace(NOTHING, curves=(Curve("loss", (0, 1), (math.nan, math.nan)),)), tmp_path)
    assert "Left out: 2 of 2 values" in read.shown
    assert read.all("svg") == []


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize(
    "values",
    [(5.0,), (0.3, 0.3), (1e-9, 1e9), (1e-12, 2e-12), (8.0, 256.0), (0.11, 0.19), (1.0, 10.0), (1e30, 2e30)],
)
def test_curves_stay_inside_their_frame(values: tuple[float, ...], log: bool) -> None:
    ticks = module._log_ticks(min(values), max(values)) if log else module._ticks(min(values), max(values))
    assert ticks[0] <= min(values)
    assert ticks[-1] >= max(values)
    assert 2 <= len(ticks) <= 7
    assert ticks == sorted(set(ticks))


@pytest.mark.parametrize("value", [0.0, -3.0])
def test_flat_curves_have_a_scale(value: float) -> None:
    ticks = module._ticks(value, value)
    assert ticks[0] <= value <= ticks[-1]
    assert len(ticks) >= 2


def test_steps_and_values_must_be_as_many(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="zip"):
        page(replace(NOTHING, curves=(Curve("loss", (0, 1), (1.0,)),)), tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P", "1", "CMYK"])
def test_pictures_of_any_mode_are_inlined_with_square_pixels(mode: str, tmp_path: Path) -> None:
    report = replace(NOTHING, strips=(Strip("s", "", (Cell(picture(64, mode), "c"),)),))
    [image] = page(report, tmp_path).all("img")
    assert (image["class"], image["width"], image["height"]) == ("pixels", "64", "64")
    assert image["src"] is not None
    data = base64.b64decode(image["src"].removeprefix("data:image/png;base64,"))
    assert Image.open(io.BytesIO(data)).size == (64, 64)


def test_big_pictures_are_scaled_down_and_stay_smooth(tmp_path: Path) -> None:
    report = replace(NOTHING, strips=(Strip("s", "", (Cell(Image.new("RGB", (1024, 768)), "c"),)),))
    [image] = page(report, tmp_path).all("img")
    assert (image.get("class"), image["width"], image["height"]) == (None, "512", "384")


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (1, "1"), (0.0123456, "0.0123"), (0.0005, "5e-4"), (1536.0, "1,536"), (-2.5e9, "-2.5e9")],
)
def test_numbers_are_short(value: float, text: str) -> None:
    assert module._number(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0 %"), (1.0, "100 %"), (0.0004, "< 0.1 %"), (0.041, "4.1 %"), (None, "–"), (math.nan, "–")],
)
def test_percents_are_short(value: float | None, text: str) -> None:
    assert module._percent(value) == text


def test_command_survives_copying(tmp_path: Path) -> None:
    text = page(FULL, tmp_path).text
    [block] = re.findall(r"<pre[^>]*>(.*?)</pre>", text, re.DOTALL)
    assert re.sub(r"<[^>]*>", "", block).replace("&quot;", '"') == FULL.command


def test_report_is_replaced_at_once_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "made" / "report.html"
    assert write_report(FULL, path) == path
    before = path.read_bytes()

    def fail(source: Path, target: Path) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as broken:
        broken.setattr(os, "replace", fail)
        with pytest.raises(UserError, match="disk full"):
            write_report(NOTHING, path)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]
    write_report(NOTHING, path)
    assert "A title" in path.read_text(encoding="utf-8")


def luminance(color: str) -> float:
    """Relative luminance as WCAG 2 defines it."""
    channels = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
def test_contrast_of_text_and_bars(theme: int) -> None:
    style = Path(module.__file__).with_name("report.css").read_text(encoding="utf-8")
    block = re.findall(r":root \{(.*?)\}", style, re.DOTALL)[theme]
    colors = dict(re.findall(r"--(\w+): (#\w{6});", block))
    for front, back in [
        ("ink", "paper"),
        ("ink", "raised"),
        ("soft", "paper"),
        ("soft", "raised"),
        ("accent", "paper"),
    ]:
        low, high = sorted((luminance(colors[front]), luminance(colors[back])))
        assert (high + 0.05) / (low + 0.05) >= 4.5, f"{front} on {back}"
