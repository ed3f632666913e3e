"""The static report: one HTML file that needs no network, no script and no other file."""

import base64
import io
import math
import re
from dataclasses import dataclass
from html import escape
from importlib import resources
from itertools import groupby
from pathlib import Path

from PIL import Image

from atomtune.files import write_whole

MAX_SIDE = 512
"""Longest side of a picture in the file, in pixels: larger ones are scaled down to it."""

SMALL_SIDE = 128
"""Pictures up to this longest side, in pixels, are enlarged with square pixels."""

# The browser itself then refuses whatever is not in the file.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


@dataclass(frozen=True)
class Cell:
    """One picture with what stands under it."""

    picture: Image.Image
    caption: str
    note: str = ""


@dataclass(frozen=True)
class Strip:
    """Pictures side by side; with `rows` > 1, a grid of that many rows, filled row by row."""

    title: str
    text: str
    cells: tuple[Cell, ...]
    rows: int = 1


@dataclass(frozen=True)
class Fact:
    """A headline figure, and what it means in one plain sentence."""

    name: str
    value: str
    meaning: str


@dataclass(frozen=True)
class AtomRow:
    """One atom of the ranking; `share` of the total importance, `density` and `purity` are in [0, 1]."""

    atom: str
    site: str
    importance: float
    share: float
    density: float
    purity: float | None
    map: Image.Image | None


@dataclass(frozen=True)
class Curve:
    """One value over the steps of training, on a logarithmic axis if `log`."""

    name: str
    steps: tuple[int, ...]
    values: tuple[float, ...]
    log: bool = False


@dataclass(frozen=True)
class Report:
    """All that the page says; an empty part leaves no trace on it.

    `formula` says how importance is computed. `small_atoms` counts the live atoms that each hold less than
    1 % of the total importance and have no row of their own.
    """

    title: str
    lead: str
    command: str
    facts: tuple[Fact, ...]
    strips: tuple[Strip, ...]
    formula: str
    atoms: tuple[AtomRow, ...]
    small_atoms: int
    dead_atoms: int
    curves: tuple[Curve, ...]
    footer: tuple[tuple[str, str], ...]


def write_report(report: Report, path: Path) -> Path:
    """Write the page to `path`, making its folder; another file there is replaced at once or not at all."""
    return write_whole(path, _page(report))


def _page(report: Report) -> str:
    style = resources.files("atomtune.explore").joinpath("report.css").read_text(encoding="utf-8")
    body = _lines(
        _header(report),
        *map(_strip, report.strips),
        _ranking(report),
        _curves(report.curves),
        _command(report.command),
        _footer(report.footer),
    )
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<link rel="icon" href="data:,">
<title>{escape(report.title)}</title>
<style>
{style}</style>
</head>
<body>
<main class="page">
{body}
</main>
</body>
</html>
"""


def _lines(*parts: str) -> str:
    return "\n".join(part for part in parts if part)


def _wrap(open_tag: str, content: str, close_tag: str) -> str:
    """`content` between two tags, or nothing where there is no content."""
    return f"{open_tag}{content}{close_tag}" if content else ""


def _header(report: Report) -> str:
    lead = _wrap('<p class="lead">', escape(report.lead), "</p>")
    return _lines("<header>", f"<h1>{escape(report.title)}</h1>", lead, _facts(report.facts), "</header>")


def _facts(facts: tuple[Fact, ...]) -> str:
    cards = [
        f'<div>\n<dt>{escape(fact.name)}</dt>\n<dd class="value">{escape(fact.value)}</dd>\n'
        f'<dd class="note">{escape(fact.meaning)}</dd>\n</div>'
        for fact in facts
    ]
    rows = math.ceil(len(facts) / 4)  # as even as they can be: 6 are 3 + 3, not 4 + 2
    columns = math.ceil(len(facts) / max(rows, 1))
    return _wrap(f'<dl class="facts" style="--columns:{columns}">\n', _lines(*cards), "\n</dl>")


def _strip(strip: Strip) -> str:
    if not strip.cells:
        return ""
    columns = math.ceil(len(strip.cells) / strip.rows)
    figures = _lines(*(_figure(cell, strip.title) for cell in strip.cells))
    if strip.rows == 1:
        width = 256 if columns <= 4 else 128 if columns in (7, 8) else 192
        phone = 2 if columns in (1, 2, 4) else 3
        cells = f'<div class="cells strip" style="--width:{width}px;--phone:{phone}">\n{figures}\n</div>'
    else:
        width = 192 if columns <= 6 else 128
        cells = _scroll(
            strip.title,
            f'<div class="cells grid" style="--columns:{columns};--width:{width}px">\n{figures}\n</div>',
        )
    return _section(strip.title, strip.text, cells)


def _section(title: str, text: str, content: str) -> str:
    below = _wrap('<p class="text">', escape(text), "</p>")
    return _lines("<section>", f"<h2>{escape(title)}</h2>", below, content, "</section>")


def _scroll(label: str, content: str) -> str:
    """What may be wider than the screen; the tab stop lets the arrow keys scroll it."""
    return f'<div class="scroll" role="region" aria-label="{escape(label)}" tabindex="0">\n{content}\n</div>'


def _figure(cell: Cell, title: str) -> str:
    note = _wrap('<span class="note">', escape(cell.note), "</span>")
    caption = _wrap("<figcaption>", escape(cell.caption) + note, "</figcaption>")
    return f"<figure>{_image(cell.picture, cell.caption or title)}{caption}</figure>"


def _image(picture: Image.Image, alt: str) -> str:
    shown = picture.convert("RGBA" if picture.has_transparency_data else "RGB")
    shown.thumbnail((MAX_SIDE, MAX_SIDE), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    shown.save(file, format="PNG")
    data = base64.b64encode(file.getvalue()).decode("ascii")
    pixels = ' class="pixels"' if max(shown.size) <= SMALL_SIDE else ""
    return (
        f'<img{pixels} src="data:image/png;base64,{data}" width="{shown.width}" height="{shown.height}"'
        f' alt="{escape(alt)}">'
    )


def _ranking(report: Report) -> str:
    title = "Atoms by importance"
    maps = any(row.map is not None for row in report.atoms)
    table = _scroll(title, _table(report, maps)) if report.atoms else ""
    small = _rest(report.small_atoms, "small one", "below 1 % of the total importance each")
    dead = _rest(report.dead_atoms, "dead atom", "never active, and not counted above")
    content = _lines(table, small, dead)
    text = "A map shows where an atom fires. What it does there is for the pictures to show." if maps else ""
    return _section(title, text, content) if content else ""


def _table(report: Report, maps: bool) -> str:
    atoms = sorted(report.atoms, key=lambda row: -row.importance)
    purities = any(row.purity is not None for row in atoms)
    longest = max(row.share for row in atoms)
    decimals = _decimals(atoms[0].importance)
    head = _lines(
        '<th scope="col" class="atom">Atom</th>',
        '<th scope="col" class="map">Map</th>' if maps else "",
        _heading("Importance, and its share of the total", report.formula, 'colspan="3"'),
        _heading("Density", "of positions where it is active", 'class="number"'),
        _heading("Purity", "of its energy falls on the subject", 'class="number"') if purities else "",
    )
    rows = [
        _lines(
            "<tr>",
            f'<th scope="row" class="atom"><code>{escape(row.atom)}</code>'
            f'<span class="note">{escape(row.site).replace(".", ".<wbr>")}</span></th>',
            f'<td class="map">{_map(row)}</td>' if maps else "",
            f'<td class="bar">{_bar(row.share, longest)}</td>',
            f'<td class="number">{row.importance:.{decimals}f}</td>',
            _percent_cell(row.share, " share"),
            _percent_cell(row.density),
            _percent_cell(row.purity) if purities else "",
            "</tr>",
        )
        for row in atoms
    ]
    return _lines(
        f'<table class="ranking">\n<thead>\n<tr>\n{head}\n</tr>\n</thead>',
        "<tbody>",
        *rows,
        "</tbody>\n</table>",
    )


def _heading(name: str, meaning: str, attributes: str) -> str:
    note = _wrap('<span class="note">', escape(meaning), "</span>")
    return f'<th scope="col" {attributes}>{escape(name)}{note}</th>'


def _map(row: AtomRow) -> str:
    if row.map is None:
        return ""
    return _image(row.map, f"Map of {row.atom}: active at {_percent(row.density)} of positions")


def _bar(share: float, longest: float) -> str:
    """In proportion to the longest one; the numbers stand beside it."""
    width = 100 * share / longest if longest > 0 else 0.0
    return f'<div><i style="width:{width:.1f}%"></i></div>'


def _decimals(top: float) -> int:
    """Decimals that give the top of a column three digits, so that all its points stand in line."""
    return max(0, 2 - math.floor(math.log10(top))) if 0 < top < math.inf else 0


def _percent_cell(fraction: float | None, also: str = "") -> str:
    return f'<td class="number{also}">{escape(_percent(fraction))}</td>'


def _rest(count: int, name: str, meaning: str) -> str:
    if count == 0:
        return ""
    return f'<p class="rest"><b>{count:,} {name}{"s" if count != 1 else ""}</b>, {meaning}.</p>'


def _percent(fraction: float | None) -> str:
    if fraction is None or not math.isfinite(fraction):
        return "–"
    percent = 100 * fraction
    if 0 < percent < 0.1:
        return "< 0.1 %"
    return f"{percent:.0f} %" if percent >= 10 or percent == 0 else f"{percent:.1f} %"


def _number(value: float) -> str:
    """Three digits, or all of a whole part of up to five; 0.000123 is 1.23e-4."""
    if 100 <= abs(value) < 1e5:
        return f"{value:,.0f}"
    if value == 0 or 0.001 <= abs(value) < 100 or not math.isfinite(value):
        return f"{value:.3g}"
    digits, _, exponent = f"{value:.2e}".partition("e")
    return f"{digits.rstrip('0').rstrip('.')}e{int(exponent)}"


_WIDTH, _HEIGHT = 360, 200
_LEFT, _RIGHT, _TOP, _BOTTOM = 44, 350, 10, 164
"""The plot of a curve inside its drawing, in the drawing's units."""


def _curves(curves: tuple[Curve, ...]) -> str:
    plots = _lines(*(_curve(curve) for curve in curves))
    return _section("Training", "", f'<div class="curves">\n{plots}\n</div>') if plots else ""


def _curve(curve: Curve) -> str:
    points = list(zip(curve.steps, curve.values, strict=True))
    if not points:
        return ""
    drawn = [(step, value) for step, value in points if _drawable(value, curve.log)]
    scale = '<span class="note">, log scale</span>' if curve.log else ""
    last = f'<p class="last"><span class="note">last</span> {_number(points[-1][1])}</p>'
    head = f'<div class="head"><h3>{escape(curve.name)}{scale}</h3>{last}</div>'
    return _lines("<div>", head, _plot(curve, points, drawn) if drawn else "", _left_out(curve), "</div>")


def _drawable(value: float, log: bool) -> bool:
    return math.isfinite(value) and (value > 0 or not log)


def _left_out(curve: Curve) -> str:
    count = sum(not _drawable(value, curve.log) for value in curve.values)
    reason = "not finite, or not above 0" if curve.log else "not finite"
    return f'<p class="note">Left out: {count:,} of {len(curve.values):,} values, {reason}.</p>' if count else ""


def _plot(curve: Curve, points: list[tuple[int, float]], drawn: list[tuple[int, float]]) -> str:
    steps, values = zip(*drawn, strict=True)
    ticks = _log_ticks(min(values), max(values)) if curve.log else _ticks(min(values), max(values))
    first, final = min(steps), max(steps)

    def x(step: float) -> float:
        return _LEFT + (_RIGHT - _LEFT) * ((step - first) / (final - first) if final > first else 0.5)

    def y(value: float) -> float:
        height = math.log10 if curve.log else float
        low, high = height(ticks[0]), height(ticks[-1])
        return _BOTTOM - (_BOTTOM - _TOP) * (height(value) - low) / (high - low)

    # A gap in the values is a gap in the line; a lone point is a line to itself, which is drawn as a dot.
    line = ""
    for seen, run in groupby(points, key=lambda point: _drawable(point[1], curve.log)):
        if seen:
            places = [f"{x(step):.1f} {y(value):.1f}" for step, value in run]
            line += f"M{places[0]}L" + " ".join(places[1:] or places)
    rules = [
        f'<line class="rule" x1="{_LEFT}" x2="{_RIGHT}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>'
        f'<text x="{_LEFT - 8}" y="{y(tick) + 4:.1f}" text-anchor="end">{_number(tick)}</text>'
        for tick in ticks
    ]
    below = [
        (_LEFT, "start", f"{first:,}"),
        ((_LEFT + _RIGHT) / 2, "middle", "step"),
        (_RIGHT, "end", f"{final:,}"),
    ]
    labels = [f'<text x="{x}" y="{_BOTTOM + 22}" text-anchor="{side}">{text}</text>' for x, side, text in below]
    return _lines(
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(_told(curve.name, drawn))}">',
        *rules,
        *labels,
        f'<path class="line" d="{line}"/>',
        f'<circle class="end" cx="{x(steps[-1]):.1f}" cy="{y(values[-1]):.1f}" r="4.5"/>',
        "</svg>",
    )


def _told(name: str, drawn: list[tuple[int, float]]) -> str:
    """The curve in words, for those who do not see it."""
    (first, start), (final, end) = drawn[0], drawn[-1]
    low, high = min(value for _, value in drawn), max(value for _, value in drawn)
    return (
        f"{name}: {_number(start)} at step {first}, {_number(end)} at step {final}; "
        f"lowest {_number(low)}, highest {_number(high)}"
    )


def _ticks(low: float, high: float) -> list[float]:
    """Three to five round values from below `low` to above `high`."""
    least = 1e-6 * max(abs(low), abs(high)) or 1.0
    raw = max(high - low, least) / 3
    power = 10.0 ** math.floor(math.log10(raw))
    gap = next(m * power for m in (1, 2, 5, 10) if m * power >= raw)
    start = math.floor(low / gap)
    stop = max(math.ceil(high / gap), start + 1)
    return [index * gap for index in range(start, stop + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    """At most seven round values from below `low` to above `high`: 1, 2, 5, 10 if they reach, else powers."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    fine = [digit * 10.0**power for power in range(first, last + 2) for digit in (1, 2, 5)]
    start = sum(tick <= low for tick in fine) - 1
    stop = max(sum(tick < high for tick in fine), start + 1)
    if stop - start < 7:
        return fine[start : stop + 1]
    stride = math.ceil((last - first) / 6)
    return [10.0**power for power in range(first, last + stride, stride)]


def _command(command: str) -> str:
    text = "A click selects all of it."
    words = re.sub(r"\S+", r"<span>\g<0></span>", escape(command))  # lines break between words, not at hyphens
    block = f'<pre class="command" tabindex="0">{words}</pre>'
    return _section("The command that made this", text, block) if command else ""


def _footer(rows: tuple[tuple[str, str], ...]) -> str:
    cells = [f'<tr><th scope="row">{escape(name)}</th><td>{escape(value)}</td></tr>' for name, value in rows]
    return _wrap("<footer>\n<table>\n<tbody>\n", _lines(*cells), "\n</tbody>\n</table>\n</footer>")
