"""`atomtune edit`."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from atomtune.editing.options import TUNING, EditOptions
from atomtune.training.options import TrainOptions


@dataclass(frozen=True)
class Command:
    """Tune on one picture, and paint edits of it over a sweep of which atoms take part."""

    picture: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="PICTURE")]
    """The picture to edit; its middle, square."""
    source: str
    """What it shows."""
    prompt: Annotated[
        tyro.conf.UseAppendAction[tuple[str, ...]],
        tyro.conf.arg(metavar="PROMPT", help_behavior_hint="(required, repeatable)"),
    ]
    """What an edit shall show; may be given several times."""
    out: Path
    """Folder for the strips, the pictures and the adapter."""
    mask: Path | None = None
    """A picture of the same size, white on the subject. None: where the base is surprised."""
    tuned: Path | None = None
    """Folder of a run that was tuned on the picture: sweep it, and train nothing."""
    json: bool = False
    """Print JSON, every edit."""
    base: str = "embedded"
    """A diffusers pipeline folder or hub id; "embedded" is the small model that ships with atomtune."""
    dtype: str = "float32"
    """Precision of the base: float32, bfloat16 or float16."""
    device: str | None = None
    """Where to run, such as cuda. None: cuda where there is one, else cpu."""
    options: Annotated[EditOptions, tyro.conf.arg(name="")] = field(default_factory=EditOptions)
    training: Annotated[TrainOptions, tyro.conf.arg(name="")] = field(default_factory=lambda: TUNING)

    def run(self) -> None:
        import atomtune
        from atomtune.cli import command_line
        from atomtune.cli.common import device_of
        from atomtune.data.picture import open_mask
        from atomtune.editing.sweep import table
        from atomtune.explore.strips import marked, save_edits
        from atomtune.measure.edits import ALIGNMENT, LIKENESS

        pipe = atomtune.open_pipeline(self.base, self.dtype, device_of(self.device))
        done = atomtune.edit(
            pipe,
            self.picture,
            self.source,
            self.prompt,
            self.out,
            self.options,
            self.training,
            mask=None if self.mask is None else open_mask(self.mask),
            adapter=None if self.tuned is None else atomtune.load(pipe, self.tuned),
            command=command_line(),
        )
        strips, rows, chosen = save_edits(done, self.out), table(done.found), marked(done.found)
        if self.json:
            edits = [
                {"prompt": e.prompt, "seed": e.seed, "likeness": e.likeness, "alignment": e.alignment}
                for e in done.found
            ]
            points = [vars(e.point) for e in done.found]
            print(json.dumps([p | e for p, e in zip(points, edits, strict=True)], indent=1))
        else:
            print(
                f"{'purity':>6} {'beside':>6} {'keep':>5} {'strength':>8} {'likeness':>8} {'alignment':>9} {'score':>5}"
            )
            for row in rows:
                mark = "  best" if chosen and all(row[k] == value for k, value in vars(chosen).items()) else ""
                print(
                    f"{row['purity']:>6.2f} {row['beside']:>6.2f} {row['keep']:>5.0%} {row['strength']:>8.2f} "
                    f"{row['likeness']:>8.3f} {row['alignment']:>+9.3f} {row['score']:>5.2f}{mark}"
                )
        for prompt in done.adapter.shut(self.prompt):
            print(f"warning: the gate is shut for {prompt!r}: its edits are all the base's", file=sys.stderr)
        print(f"likeness: {LIKENESS}\nalignment: {ALIGNMENT}", file=sys.stderr)
        print("score: their sum, each from 0 to 1 over the sweep", file=sys.stderr)
        for path in strips:
            print(path, file=sys.stderr)
