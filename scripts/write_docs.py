"""python scripts/write_docs.py [--check]: write what is said twice from what it is said of.

docs/cli.md comes from the commands' own help; the tables between markers in README.md and docs/training.md from
benchmarks/results, and the one in docs/backbones.md from the backbones.
With --check nothing is written, and the exit code is 1 where a file differs.
"""

from __future__ import annotations

import inspect
import json
import os
import re
import shlex
import subprocess
import sys
from functools import cache
from itertools import takewhile
from pathlib import Path
from typing import Any

from measure_scale import MODELS, error_on_largest, projected

from atomtune.backbones import BACKBONES, unet
from atomtune.backbones.noising import scheduled
from atomtune.cli import COMMANDS
from atomtune.compare.grid import Grid, changed_since
from atomtune.compare.methods import parse_options
from atomtune.compare.tables import (
    Cells,
    Interval,
    base_reference,
    cells_of,
    difference,
    interval,
    markdown,
    method_hypervolume,
    ratio,
    summarise,
)
from atomtune.editing.options import Point

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def cli_page() -> str:
    """The help of every command, as a terminal of 100 columns shows it."""
    parts = ["# Commands\n\nWritten by `python scripts/write_docs.py` from the commands themselves.\n"]
    for name in COMMANDS:
        environment = os.environ | {
            "COLUMNS": "100",
            "NO_COLOR": "1",
            "PYTHON_COLORS": "0",
            "TERM": "dumb",
            "PYTHONUTF8": "1",
        }
        command = [sys.executable, "-m", "atomtune", name, "--help"]
        text = subprocess.run(command, env=environment, capture_output=True, encoding="utf-8", check=True).stdout
        lines = "\n".join(line.rstrip() for line in text.strip().splitlines())
        parts.append(f"## atomtune {name}\n\n```\n{lines}\n```\n")
    return "\n".join(parts)


def rows_of(name: str) -> tuple[list[dict[str, Any]], str]:
    """The rows of a stored result and the command that made it."""
    result = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return result["rows"], result["command"]


def with_command(lines: list[str], command: str) -> str:
    """A table, and below it the commands that made its rows."""
    return "\n".join([*lines, *(f"\n`{line}`" for line in command.splitlines())])


@cache
def aged(name: str) -> str:
    """A line where methods of a comparison have changed since they were measured: its command gives other rows now."""
    rows, command = rows_of(name)
    given = shlex.split(command.splitlines()[0])
    start = given.index("--set") + 1 if "--set" in given else len(given)
    changes = list(takewhile(lambda part: not part.startswith("--"), given[start:])) or ["steps=200"]
    changed = changed_since(rows, Grid(rows[0]["task"], (), options=parse_options(changes)))
    return f"\n\nMeasured by an earlier version of {' and '.join(changed)}: see LOG.md." if changed else ""


def scenes_table() -> str:
    rows, command = rows_of("scenes")
    row = rows[0]
    wanted = {"background": 0.97, "position": 0.95, "object_accuracy": 0.90}
    names = {"background": "background right", "position": "position right", "object_accuracy": "object named right"}
    lines = [f"| on {row['prompts']} unseen combinations | measured | goal |", "|---|---|---|"]
    lines += [f"| {names[key]} | {row[key]:.1%} | {wanted[key]:.0%} |" for key in names]
    lines += [
        f"| size right | {row['size']:.1%} | |",
        f"| style right | {row['style_accuracy']:.1%} | |",
        f"| the judge itself, on true scenes | {row['judge_accuracy_on_true_scenes']:.1%} | |",
    ]
    return with_command(lines, command)


def demo_table() -> str:
    rows, command = rows_of("demo")
    lines = ["| atoms kept | named right | similarity | background | position |", "|---|---|---|---|---|"]
    for row in rows:
        kept = f"{row['density']:.0%} ({row['atoms_kept']})"
        scores = [f"{row[k]:.0%}" for k in ("object_accuracy", "background", "position")]
        lines.append(f"| {kept} | {scores[0]} | {row['similarity']:.3f} | {scores[1]} | {scores[2]} |")
    full = rows[0]
    base = f"{full['base_background']:.0%} and {full['base_position']:.0%}"
    after = (
        f"The base's own background and position, on objects it knows: {base}. On unrelated prompts: silence "
        f"{full['silence']:.0%}, drift {full['drift']:.4f}; with the gate held open, drift "
        f"{full['drift_gate_open']:.4f}. {full['trained_parameters']:,} trained parameters, "
        f"{full['train_seconds']:.0f} seconds."
    )
    return "\n".join([*lines, "", after, "", f"`{command}`"])


OPENED = "gate held open"
OFF = vars(Point())
"""The dials of `atomtune edit` where all atoms take part."""


def chosen(task: str, points: dict[str, dict[str, Any]], columns: tuple[str, ...]) -> str:
    """A table of some operating points of a comparison: by the name they get, the columns that tell them."""
    rows, command = rows_of(task)
    summary = summarise([row for row in rows if row.get("edit", "all") == "all"])
    entries = []
    for name, wanted in points.items():
        found = [e for e in summary if all(e.get(key) == value for key, value in wanted.items())]
        if len(found) != 1:
            raise SystemExit(f"benchmarks/results/{task}.json has {len(found)} operating points for {name!r}")
        entries.append(found[0] | {"point": name, "place": len(entries)})
    return markdown(entries, columns, {"point": ""}, order="place", command=command) + aged(task)


def customization_table() -> str:
    full = {"knob": "full", "gate": False}
    points = {
        "base": {"method": "base"},
        "true pictures, decoded": {"method": "truth"},
        "bottleneck adapter": {"method": "adapter", "knob": "full"},
        "DoRA": {"method": "dora", "knob": "full"},
        f"LoRA, {OPENED}": {"method": "lora", **full},
        "LoRA, contained by half": {"method": "lora", "knob": "contain", "knob_value": 0.5},
        "LoRA, contained": {"method": "lora", "knob": "contain", "knob_value": 1.0},
        f"atoms, {OPENED}": {"method": "atoms", **full},
        "atoms, contained by half": {"method": "atoms", "knob": "contain", "knob_value": 0.5},
        "atoms, contained": {"method": "atoms", "knob": "contain", "knob_value": 1.0},
        "LoRA, a tenth, refitted": {"method": "lora", "knob": "refit"},
        "atoms, a tenth, refitted": {"method": "atoms", "knob": "refit"},
        "LoRA, its gate on": {"method": "lora", "knob": "full", "gate": True},
        "atoms, their gate on": {"method": "atoms", "knob": "full", "gate": True},
        "LoRA, gate on, own words": {"method": "lora", "knob": "own-words", "knob_value": 0.0},
        "atoms, gate on, own words": {"method": "atoms", "knob": "own-words", "knob_value": 0.0},
    }
    columns = ("similarity", "object_accuracy", "alignment", "drift", "pixel_drift", "bleed", "inner_leak", "silence")
    return chosen("customization", points, columns)


def paired_table() -> str:
    """Customization's points against each other, paired over subjects and seeds."""
    rows, command = rows_of("customization")
    base = {"method": "base"}
    full = {method: {"method": method, "knob": "full", "gate": False} for method in ("atoms", "lora")}
    adapter = {"method": "adapter", "knob": "full"}
    contained = {"method": "atoms", "knob": "contain", "knob_value": 1.0}
    pairs: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
        "atoms against LoRA": (full["atoms"], full["lora"]),
        "atoms against the adapter": (full["atoms"], adapter),
        "atoms against DoRA": (full["atoms"], {"method": "dora", "knob": "full"}),
        "contained atoms against LoRA": (contained, full["lora"]),
        "contained atoms against the adapter": (contained, adapter),
        "contained atoms against atoms": (contained, full["atoms"]),
        "a tenth, refitted, against all atoms": ({"method": "atoms", "knob": "refit"}, full["atoms"]),
    }

    def of(wanted: dict[str, Any], measure: str) -> Cells:
        return cells_of([row for row in rows if wanted.items() <= row.items()], measure)

    def beyond(wanted: dict[str, Any]) -> Cells:
        """Inner leak, less the base's."""
        own, plain = of(wanted, "inner_leak"), of(base, "inner_leak")
        return {s: {k: None if v is None else v - plain[s][k] for k, v in inner.items()} for s, inner in own.items()}

    header = ("likeness gained", "likeness kept", "alignment, points", "drift", "bleed", "inner leak over the base's")
    lines = [f"| paired over subjects | {' | '.join(header)} |", f"|---|{'---:|' * len(header)}"]
    for name, (a, b) in pairs.items():
        gained = difference(of(a, "alignment"), of(b, "alignment"))
        cells = [
            spread(difference(of(a, "similarity"), of(b, "similarity")), "+.3f"),
            spread(ratio(of(a, "similarity"), of(b, "similarity")), ".1%"),
            spread(Interval(100 * gained.mean, 100 * gained.low, 100 * gained.high, 0, 0), "+.1f"),
            *(spread(ratio(of(a, m), of(b, m)), ".2f") for m in ("drift", "bleed")),
            spread(ratio(beyond(a), beyond(b)), ".2f"),
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    volumes = [
        f"{entry['method']}{' with its gate' if entry['gate'] else ''} {entry['hypervolume'].mean:.3f} "
        f"({entry['points']} points)"
        for entry in method_hypervolume(rows, base_reference(rows))
        if entry["method"] != "base"
    ]
    return with_command([*lines, "", f"Hypervolume: {', '.join(volumes)}."], command)


def spread(value: Interval, form: str) -> str:
    return f"{value.mean:{form}} ({value.low:{form}} to {value.high:{form}})"


def kept_table() -> str:
    names = {"lora": "LoRA's components", "atoms": "atoms"}
    points = {}
    for method, name in names.items():
        points[f"{name}, all"] = {"method": method, "knob": "full", "gate": True}
        for share in (0.5, 0.25, 0.1):
            kept = {"knob": "atoms", "formula": "effect", "knob_value": share}
            points[f"{name}, {share:.0%} by effect"] = {"method": method, **kept}
        points[f"{name}, 10% by effect, refitted"] = {"method": method, "knob": "refit"}
    return chosen("customization", points, ("similarity", "object_accuracy", "alignment"))


def mixing_table() -> str:
    points: dict[str, dict[str, Any]] = {"base": {"method": "base"}, "true pictures, decoded": {"method": "truth"}}
    for method, name in (("lora", "LoRA"), ("atoms", "atoms")):
        points |= {
            f"{name}, sum": {"method": method, "knob": "full", "gate": True},
            f"{name}, sum, subject x 1.2": {"method": method, "knob": "strong"},
            f"{name}, own words": {"method": method, "knob": "own-words", "knob_value": 0.3},
            f"{name}, own words, subject x 1.2": {"method": method, "knob": "own-strong"},
            f"{name}, own words to the end": {"method": method, "knob": "own-words", "knob_value": 0.0},
        }
    return chosen("mixing", points, ("true_distance", "similarity", "object_accuracy", "style", "both"))


def plain_table() -> str:
    """One picture and nothing beside it: what removal does, and what turning down does."""
    points: dict[str, dict[str, Any]] = {"base": {"method": "base"}, "true pictures, decoded": {"method": "truth"}}
    for method, name, of in (("lora", "LoRA", "LoRA's components"), ("atoms", "atoms", "atoms")):
        points[name] = {"method": method, "knob": "full"}
        points |= {f"{name} x {v}": {"method": method, "knob": "scale", "knob_value": v} for v in (1.2, 0.9, 0.8)}
        for knob, values in {"purity": (0.2, 0.4, 0.6), "beside": (0.25, 0.5, 1.0)}.items():
            points |= {f"{of}, {knob} {v}": {"method": method, "knob": knob, "knob_value": v} for v in values}
        for formula in ("effect", "focus"):
            kept = {"method": method, "knob": "atoms", "formula": formula, "knob_value": 0.5}
            points[f"{of}, 50% by {formula}"] = kept
        points[f"{of}, half by lot"] = {"method": method, "knob": "random"}
    points["LoRA, half by singular value"] = {"method": "lora", "knob": "svd", "knob_value": 0.5}
    columns = ("similarity", "object_accuracy", "alignment", "background", "position", "style", "true_distance")
    return chosen("editing-plain", points, columns)


def gains_table() -> str:
    """What each way to turn a method down gains and costs there, paired over subjects."""
    every, command = rows_of("editing-plain")
    rows = [row for row in every if row.get("edit", "all") == "all"]
    ways: dict[str, dict[str, Any]] = {f"x {v}": {"knob": "scale", "knob_value": v} for v in (0.9, 0.8)}
    ways |= {f"beside {v}": {"knob": "beside", "knob_value": v} for v in (0.25, 0.5, 0.75, 1.0)}
    ways |= {f"purity {v}": {"knob": "purity", "knob_value": v} for v in (0.2, 0.4)}
    for formula in ("effect", "focus"):
        ways[f"half by {formula}"] = {"knob": "atoms", "knob_value": 0.5, "formula": formula}
    ways["half by singular value"] = {"knob": "svd", "knob_value": 0.5}
    lines = ["| turned down | likeness kept | alignment gained, points |", "|---|---:|---:|"]
    for method, name in (("lora", "LoRA"), ("atoms", "atoms")):
        own = [row for row in rows if row["method"] == method]
        full = [row for row in own if row["knob"] == "full"]
        for way, wanted in ways.items():
            turned = [row for row in own if wanted.items() <= row.items()]
            if turned:
                lines.append(f"| {name}, {way} | {' | '.join(gain(turned, full, 'similarity', 'alignment'))} |")
    return with_command(lines, command) + aged("editing-plain")


def gain(turned: list[dict[str, Any]], full: list[dict[str, Any]], likeness: str, alignment: str) -> tuple[str, str]:
    """The share of likeness that is kept, and the points of alignment that are gained, paired over subjects."""
    kept = ratio(cells_of(turned, likeness), cells_of(full, likeness))
    gained = difference(cells_of(turned, alignment), cells_of(full, alignment))
    return (
        f"{kept.mean:.0%} ({kept.low:.0%} to {kept.high:.0%})",
        f"{100 * gained.mean:+.1f} ({100 * gained.low:+.1f} to {100 * gained.high:+.1f})",
    )


def edits_table() -> str:
    """What `atomtune edit` paints at each point of its sweep, against all atoms at full strength."""
    rows, command = rows_of("edits")
    points: dict[str, dict[str, Any]] = {}
    for row in rows:
        dials = ", ".join(f"{n} {row[n]:g}" for n, at in OFF.items() if row[n] != at) or "all atoms"
        name = dials if row["recipe"] == "default" else f"{row['recipe']}: {dials}"
        points[name] = {n: row[n] for n in ("recipe", *OFF)}
    points["as suggested"] = {"recipe": "default", "suggested": True}
    full = [row for row in rows if points["all atoms"].items() <= row.items()]
    lines = [
        "| point | similarity | alignment | distance to the truth | likeness kept | alignment gained, points |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name, wanted in points.items():
        own = [row for row in rows if wanted.items() <= row.items()]
        means = (interval(cells_of(own, f"exact_{m}")).mean for m in ("similarity", "alignment", "true_distance"))
        similarity, alignment, distance = means
        both = gain(own, full, "exact_similarity", "exact_alignment")
        lines.append(f"| {name} | {similarity:.3f} | {alignment:.1%} | {distance:.4f} | {' | '.join(both)} |")
    agreed = [
        f"{measure} {interval(cells_of(full, column)).mean:.2f}"
        for measure, column in (("likeness", "likeness_with_similarity"), ("alignment", "alignment_with_alignment"))
    ]
    steps = {recipe: "-".join(map(str, sorted({min(s), max(s)}))) for recipe, s in _steps(rows).items()}
    after = (
        f"Rank correlation, within a prompt, of what the base measures with the exact scores: {', '.join(agreed)}. "
        f"Steps: {', '.join(f'{recipe} {found}' for recipe, found in steps.items())}."
    )
    return with_command([*lines, "", after], command)


def _steps(rows: list[dict[str, Any]]) -> dict[str, set[int]]:
    """How long each recipe tuned."""
    found: dict[str, set[int]] = {}
    for row in rows:
        found.setdefault(row["recipe"], set()).add(row["steps"])
    return found


def editing_table() -> str:
    points: dict[str, dict[str, Any]] = {"base": {"method": "base"}, "true pictures, decoded": {"method": "truth"}}
    for method, name in (("lora", "LoRA"), ("atoms", "atoms")):
        points[name] = {"method": method, "knob": "full"}
        points |= {f"{name} x {v}": {"method": method, "knob": "scale", "knob_value": v} for v in (1.4, 0.8)}
        of = "LoRA's components" if method == "lora" else name
        for share in (0.5, 0.25):
            kept = {"method": method, "knob": "atoms", "formula": "effect", "knob_value": share}
            points[f"{of}, {share:.0%} by effect"] = kept
        points[f"{of}, half by purity"] = {"method": method, "knob": "atoms", "formula": "purity", "knob_value": 0.5}
    points["LoRA, half by singular value"] = {"method": "lora", "knob": "svd", "knob_value": 0.5}
    return chosen("editing-bare", points, ("similarity", "object_accuracy", "alignment", "style", "true_distance"))


def memory_table() -> str:
    rows, command = rows_of("doctor")
    lines = ["| setting | estimated | counted | error |", "|---|---:|---:|---:|"]
    for row in rows:
        sizes = (f"{row[kind] / 2**20:.1f} MiB" for kind in ("estimated", "counted"))
        lines.append(f"| {row['setting']} | {' | '.join(sizes)} | {row['error']:+.1%} |")
    return with_command(lines, command)


def scale_measured() -> str:
    """Time and memory as multiples of the base's own step, at the most tokens."""
    rows, command = rows_of("scale")
    most = max(row["tokens"] for row in rows)
    sizes = {(r["layers"], r["width"]): r["weights"] for r in rows}
    methods = [name for name in dict.fromkeys(row["method"] for row in rows) if name != "base"]
    lines = [f"| model | {' | '.join(methods)} |", f"|---|{'---:|' * len(methods)}"]
    for (layers, width), weights in sizes.items():
        found = {r["method"]: r for r in rows if (r["layers"], r["width"], r["tokens"]) == (layers, width, most)}
        base = found["base"]
        shares = [
            f"{found[m]['seconds'] / base['seconds']:.2f}, {found[m]['bytes'] / base['bytes']:.2f}" for m in methods
        ]
        lines.append(f"| {layers} layers of {width}: {weights / 1e6:.0f}M | {' | '.join(shares)} |")
    return with_command(lines, command)


def scale_projected() -> str:
    """What models that were not measured should need, and how well the fit does where it can be told."""
    rows, _ = rows_of("scale")
    lines = [
        "| model | atoms a site | trained | a step takes longer by | memory beside the base |",
        "|---|---:|---:|---:|---:|",
    ]
    for model in MODELS:
        for atoms in (16, 64, 256):
            found = projected(rows, model, atoms)
            cells = (f"{found['trained'] / 1e6:.0f}M", f"{found['slower']:.1%}", f"{found['bytes'] / 1e9:.1f} GB")
            lines.append(f"| {model} | {atoms} | {' | '.join(cells)} |")
    errors = {name: error_on_largest(rows, measure) for name, measure in (("time", "seconds"), ("memory", "bytes"))}
    told = "; ".join(f"{name} {median:.0%}, at most {most:.0%}" for name, (median, most) in errors.items())
    return "\n".join([*lines, "", f"Error on the widest measured model, by a fit of the others, median: {told}."])


def many_table() -> str:
    rows, command = rows_of("many")
    lines = ["| | one by one | together | gain |", "|---|---:|---:|---:|"]
    for row in rows:
        gain = row["alone"] / row["together"]
        lines.append(f"| {row['what']} | {row['alone']:.1f} s | {row['together']:.1f} s | {gain:.2f} x |")
    return with_command(lines, command)


def backbones_table() -> str:
    """A row a family; what is special is the first line of its file."""
    lines = ["| family | pipeline | default sites | times | target | |", "|---|---|---|---|---|---|"]
    for name, backbone in BACKBONES.items():
        sites = " ".join(f"`{site}`" for site in backbone.sites)
        free = backbone.settings in (scheduled, unet.settings)
        times = backbone.density.replace("_", "-") + (", shifted" if not free and backbone.density == "uniform" else "")
        target = "epsilon or v-prediction" if free else "velocity"
        special = inspect.getdoc(sys.modules[backbone.layout.__module__]) or ""
        special = special.partition(": ")[2].partition("\n")[0]
        lines.append(f"| {backbone.family} | `{name}` | {sites} | {times} | {target} | {special} |")
    return "\n".join(lines)


def reliability_table() -> str:
    """A row a hazard; what is told beside its counts is a sum of what happened."""
    rows, command = rows_of("reliability")
    own = ("part", "hazard", "tried", "survived", "how", "first_failure")
    lines = ["| hazard | tried | survived | what surviving is | in these trials |", "|---|---:|---:|---|---|"]
    for row in rows:
        facts = ", ".join(f"{name} {value}" for name, value in row.items() if name not in own and value is not None)
        lines.append(f"| {row['hazard']} | {row['tried']} | {row['survived']} | {row['how']} | {facts} |")
    return with_command(lines, command)


TABLES = {
    "README.md": {
        "scenes": scenes_table,
        "demo": demo_table,
        "customization": customization_table,
        "kept": kept_table,
    },
    "docs/backbones.md": {"backbones": backbones_table},
    "docs/method.md": {
        "paired": paired_table,
        "mixing": mixing_table,
        "editing": editing_table,
        "plain": plain_table,
        "gains": gains_table,
        "edits": edits_table,
    },
    "docs/scale.md": {"measured": scale_measured, "projected": scale_projected, "many": many_table},
    "docs/training.md": {"memory": memory_table, "reliability": reliability_table},
}


def page(path: str) -> str:
    """A page with its tables as they should be."""
    text = (ROOT / path).read_text(encoding="utf-8")
    for name, table in TABLES[path].items():
        pattern = re.compile(f"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        if not pattern.search(text):
            raise SystemExit(f"{path} has no place for the table {name!r}")
        content = table()
        text = pattern.sub(lambda m, content=content: f"{m[1]}{content}\n{m[2]}", text)  # type: ignore[misc]
    return text


def main() -> int:
    stale = []
    pages = {ROOT / path: page(path) for path in TABLES}
    for path, text in ({ROOT / "docs/cli.md": cli_page()} | pages).items():
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            stale.append(str(path.relative_to(ROOT)))
            if "--check" not in sys.argv:
                path.write_text(text, encoding="utf-8")
    if "--check" in sys.argv and stale:
        print(f"out of date: {', '.join(stale)}. Run: python scripts/write_docs.py", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
