"""The whole story on the embedded world: learn a subject, measure it, take it apart, write a report."""

from __future__ import annotations

import json
import random
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from atomtune.adapter import Adapter
from atomtune.atoms import FORMULAS, Atom
from atomtune.backbones import EMBEDDED, backbone_of, open_pipeline
from atomtune.compare.tasks import LEARNED, leak, subject_lesson
from atomtune.data.picture import to_tensor
from atomtune.errors import UserError, did_you_mean
from atomtune.explore.overlay import overlay, scale_of
from atomtune.explore.report import AtomRow, Cell, Curve, Fact, Report, Strip, write_report
from atomtune.files import write_whole
from atomtune.measure import code_maps
from atomtune.sampling import generate
from atomtune.scenes.score import mean, score
from atomtune.scenes.world import CLASS_OF, OBJECTS, POSITIONS, Scene, article, caption, random_scene
from atomtune.training.loop import train
from atomtune.training.options import TrainOptions
from atomtune.tuner import override_gate

DEFAULT_OUT = Path("runs/demo")
DENSITIES = (1.0, 0.5, 0.25, 0.1, 0.0)
SAMPLER_STEPS = 16


def demo(
    out: Path, subject: str, steps: int, seed: int, prompts: int, command: str, base: str = EMBEDDED
) -> dict[str, Any]:
    """Run the demo; returns the row of full density. Writes result.json and report.html in `out`."""
    if subject not in CLASS_OF or subject in OBJECTS:
        free = sorted(set(CLASS_OF) - set(OBJECTS))
        raise UserError(
            f"`subject` must be an object that the embedded model has never seen ({', '.join(free)}), "
            f"got {subject!r}.{did_you_mean(subject, free)}"
        )
    if prompts < 1:
        raise UserError(f"`prompts` must be at least 1, got {prompts}.")
    own = {"data", "run", "result.json", "report.html", ".cache"}  # of a demo, whole or not
    if out == DEFAULT_OUT and out.is_dir() and {path.name for path in out.iterdir()} <= own:
        shutil.rmtree(out, ignore_errors=True)
    elif out.exists():
        raise UserError(f"`out` exists and is no demo's: {out}. Choose another folder.")
    say = _Clock()
    data = out / "data"
    subject_lesson(subject).write(data)
    pipe = open_pipeline(base)
    rng = random.Random(seed + 1)
    asked = subject_scenes(subject, prompts, rng)
    known = [_as(s, rng.choice(tuple(OBJECTS))) for s in asked]
    unrelated = [random_scene(rng) for _ in range(prompts)]

    say(f"painting {3 * prompts} pictures with the base")
    base_subject = paint(pipe, asked, seed)
    base_known = mean(score(paint(pipe, known, seed), known))
    base_unrelated = paint(pipe, unrelated, seed + 500)

    say(f"training on {len(list(data.glob('*.png')))} pictures of {article(subject)}, {steps} steps")
    began = time.monotonic()
    options = TrainOptions(concept=subject, class_noun=CLASS_OF[subject], steps=steps, seed=seed)
    adapter = train(pipe, data, out / "run", options, command=command)
    seconds = time.monotonic() - began

    say("painting with the adapter, at five densities")
    rows: list[dict[str, Any]] = []
    strips: dict[float, list[Image.Image]] = {}
    for density in DENSITIES:
        with adapter.using(density=density):
            pictures = base_subject if density == 0 else paint(pipe, asked, seed)
        rows.append(_row(adapter, subject, density, score(pictures, asked)))
        strips[density] = pictures
    say("painting unrelated prompts")
    quiet = paint(pipe, unrelated, seed + 500)
    with override_gate(pipe.transformer, 1.0):
        forced = paint(pipe, unrelated, seed + 500)
    shut, forced_open = (leak(base_unrelated, pictures, unrelated) for pictures in (quiet, forced))
    shared = {
        "base_background": base_known["background"],
        "base_position": base_known["position"],
        "base_known_object_accuracy": base_known["named"],
        **shut,
        "drift_gate_open": forced_open["drift"],
        "pixel_drift_gate_open": forced_open["pixel_drift"],
        "train_seconds": round(seconds, 1),
    }
    rows = [row | shared for row in rows]
    result = {"command": command, "atomtune": _version(), "rows": rows}
    write_whole(out / "result.json", json.dumps(result, indent=1) + "\n")
    shown: dict[str, Any] = {"asked": asked, "strips": strips, "unrelated": unrelated}
    shown |= {"base_unrelated": base_unrelated, "quiet": quiet, "forced": forced}
    path = write_report(_report(adapter, subject, rows, shown, out, command), out / "report.html")
    say.done(rows[0], path)
    return rows[0]


class _Clock:
    """Progress on stderr, with the time since the start."""

    def __init__(self) -> None:
        self.begin = time.monotonic()

    def __call__(self, text: str) -> None:
        minutes, seconds = divmod(int(time.monotonic() - self.begin), 60)
        print(f"[{minutes}:{seconds:02d}] {text}", file=sys.stderr, flush=True)

    def done(self, row: dict[str, Any], report: Path) -> None:
        aligned = (row["background"] + row["position"]) / 2
        base = (row["base_background"] + row["base_position"]) / 2
        self("done")
        gate = f"with the gate held open: {row['drift_gate_open']:.4f}"
        print(f"named right  {row['object_accuracy']:6.1%}  of the pictures, by the judge")
        print(f"alignment    {aligned:6.1%}  background and position; the base, on objects it knows: {base:.1%}")
        print(f"silence      {row['silence']:6.1%}  of unrelated prompts give the base's own picture, bit for bit")
        print(f"drift        {row['drift']:6.4f}  on unrelated prompts; {gate}")
        print(f"report       {report}")


def subject_scenes(subject: str, number: int, rng: random.Random) -> list[Scene]:
    """Scenes of the subject in the style it is learned in, on backgrounds and at places drawn at random."""
    found = []
    for _ in range(number):
        drawn = random_scene(rng, (subject,), pairs=0.0)
        place = rng.choice(tuple(POSITIONS))
        found.append(replace(drawn, things=(replace(drawn.things[0], style=LEARNED, position=place),)))
    return found


def _as(asked: Scene, name: str) -> Scene:
    return replace(asked, things=tuple(replace(t, name=name) for t in asked.things))


def paint(pipe: Any, scenes: Sequence[Scene], seed: int) -> list[Image.Image]:
    """One picture a scene, from its caption."""
    return generate(pipe, [caption(s) for s in scenes], seed=seed, steps=SAMPLER_STEPS, batch_size=12)


def _row(adapter: Adapter, subject: str, density: float, rows: list[dict[str, float]]) -> dict[str, Any]:
    scores = mean(rows)
    total = len(adapter.atoms)
    parameters = sum(p.numel() for n, p in adapter.pipe.transformer.named_parameters() if "atom_" in n)
    return {
        "subject": subject,
        "density": density,
        "object_accuracy": scores["named"],
        "similarity": scores["similarity"],
        "background": scores["background"],
        "position": scores["position"],
        "size": scores["size"],
        "true_distance": scores["true_distance"],
        "trained_parameters": parameters,
        "atoms": total,
        "atoms_kept": int(np.ceil(density * total - 1e-9)),
    }


def _version() -> str:
    import importlib.metadata

    return importlib.metadata.version("atomtune")


# ------------------------------------------------------------------------------------------------- report


def _report(
    adapter: Adapter,
    subject: str,
    rows: list[dict[str, Any]],
    pictures: dict[str, Any],
    out: Path,
    command: str,
) -> Report:
    full = rows[0]
    ranked = list(adapter.atoms)
    total = sum(a.importance for a in ranked) or 1.0
    shown = [a for a in ranked[:24] if a.importance > 0]
    thumbnails = _maps(adapter, shown, out / "data")
    log = [json.loads(line) for line in (out / "run/log.jsonl").read_text(encoding="utf-8").splitlines()]
    return Report(
        title=f"{article(subject).capitalize()}, learned from four pictures",
        lead=(
            f"A small diffusion pipeline that had never seen {article(subject)} learned it as a sparse combination of "
            f"{full['atoms']} atoms in {full['train_seconds']:.0f} seconds. Every figure below was measured by the "
            "command at the end of this page."
        ),
        command=command,
        facts=_facts(full, len(pictures["asked"])),
        strips=_strips(subject, rows, pictures, out),
        formula=FORMULAS["effect"],
        atoms=tuple(
            AtomRow(
                atom=a.title,
                site=a.path,
                importance=a.importance,
                share=a.importance / total,
                density=a.density,
                purity=None if a.purity != a.purity else a.purity,
                map=thumbnails.get(a.name),
            )
            for a in shown
        ),
        small_atoms=sum(a.importance < 0.01 * total and not a.dead for a in ranked[len(shown) :]),
        dead_atoms=sum(a.dead for a in ranked),
        curves=_curves(log),
        footer=(
            ("base", "the embedded model (Lumina2 family)"),
            ("prompts", f"{len(pictures['asked'])} unseen, {len(pictures['unrelated'])} unrelated"),
            ("sampler", f"{SAMPLER_STEPS} steps, the pipeline's default guidance"),
            ("trained parameters", f"{full['trained_parameters']:,}"),
            ("atomtune", _version()),
        ),
    )


def _maps(adapter: Adapter, atoms: Sequence[Atom], data: Path) -> dict[str, Image.Image]:
    """Where each atom fires in the first picture that training saw."""
    path = min(data.glob("*.png"))
    picture = Image.open(path).convert("RGB")
    backbone = backbone_of(adapter.pipe)
    latents = backbone.encode_pictures(adapter.pipe, to_tensor(picture)[None])
    conditioning = backbone.encode_prompts(adapter.pipe, [path.with_suffix(".txt").read_text(encoding="utf-8").strip()])
    maps = code_maps(adapter.pipe, backbone, latents, conditioning, atoms)
    return {name: overlay(picture, grid[0], scale_of(grid)) for name, grid in maps.items()}


def _facts(row: dict[str, Any], prompts: int) -> tuple[Fact, ...]:
    aligned = (row["background"] + row["position"]) / 2
    base = (row["base_background"] + row["base_position"]) / 2
    return (
        Fact(
            "named right",
            f"{row['object_accuracy']:.0%}",
            f"Share of {prompts} new pictures in which the judge sees the subject.",
        ),
        Fact(
            "alignment",
            f"{aligned:.0%}",
            f"Background and position as asked; the base scores {base:.0%} on objects it knows.",
        ),
        Fact(
            "silence",
            f"{row['silence']:.0%}",
            "Share of unrelated prompts whose picture is the base's, bit for bit.",
        ),
        Fact(
            "drift",
            f"{row['drift']:.4f}",
            f"Change on unrelated prompts; {row['drift_gate_open']:.4f} with the prompt gate held open.",
        ),
        Fact(
            "similarity",
            f"{row['similarity']:.3f}",
            "Cosine to the true rendering, in the judge's eyes; 1 is the same.",
        ),
    )


def _strips(subject: str, rows: list[dict[str, Any]], p: dict[str, Any], out: Path) -> tuple[Strip, ...]:
    asked: list[Scene] = p["asked"]
    data = sorted((out / "data").glob("*.png"))
    few, wide = range(min(4, len(asked))), range(min(8, len(asked)))
    learned = tuple(
        Cell(Image.open(path).convert("RGB"), path.with_suffix(".txt").read_text(encoding="utf-8").strip())
        for path in data
    )
    pairs = tuple(Cell(p["strips"][0.0][i], "base") for i in wide) + tuple(
        Cell(p["strips"][1.0][i], caption(asked[i])) for i in wide
    )
    dial = tuple(
        Cell(p["strips"][row["density"]][i], f"{row['density']:.0%} of the atoms", f"{row['atoms_kept']} atoms")
        for i in few
        for row in rows
    )
    kinds = (("base_unrelated", "base"), ("quiet", "adapted"), ("forced", "adapted, gate held open"))
    others = tuple(
        Cell(p[kind][i], label, caption(p["unrelated"][i]) if kind == "base_unrelated" else "")
        for kind, label in kinds
        for i in range(min(8, len(p["unrelated"])))
    )
    figures = "; ".join(f"{r['density']:.0%}: named right {r['object_accuracy']:.0%}" for r in rows)
    return (
        Strip("What it was shown", "All that training saw of the subject.", learned),
        Strip(
            "Before and after",
            "The same prompts and noise: above the base, below the adapted model.",
            pairs,
            rows=2,
        ),
        Strip(
            "The density dial",
            f"The same pictures with fewer and fewer atoms, the least important gone first. {figures}.",
            dial,
            rows=len(few),
        ),
        Strip(
            "Prompts that have nothing to do with it",
            "Where the prompt gate is shut nothing changes, bit for bit. The last row forces it open, to show what "
            "the atoms themselves leave alone.",
            others,
            rows=3,
        ),
    )


def _curves(log: list[dict[str, float]]) -> tuple[Curve, ...]:
    names = [n for n in log[0] if n not in ("step", "pictures_per_second")] if log else []
    steps = tuple(int(line["step"]) for line in log)
    return tuple(Curve(name, steps, tuple(line[name] for line in log)) for name in names)
