"""`atomtune train`."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from atomtune.training.options import TrainOptions


@dataclass(frozen=True)
class Command:
    """Train an adapter on a folder of pictures."""

    data: Path
    """Folder of pictures, each with a caption (.txt beside it, metadata.jsonl, or --caption), or of .tar shards; also a
    data set: a saved folder, .parquet, imagefolder:FOLDER, hub:OWNER/NAME."""
    base: str = "embedded"
    """A diffusers pipeline folder or hub id; "embedded" is the small model that ships with atomtune."""
    out: Path | None = None
    """Where the run goes. None: runs/ and the data folder's name."""
    resume: bool = False
    """Go on with the run in --out, from its newest whole checkpoint."""
    dtype: str = "float32"
    """Precision of the frozen base: float32, bfloat16 or float16."""
    device: str | None = None
    """Where to train, such as cuda. None: cuda where there is one, else cpu."""
    options: Annotated[TrainOptions, tyro.conf.arg(name="")] = field(default_factory=TrainOptions)

    def run(self) -> None:
        import atomtune
        from atomtune.cli import command_line
        from atomtune.cli.common import device_of

        out = self.out or Path("runs") / self.data.resolve().name
        pipe = atomtune.open_pipeline(self.base, self.dtype, device_of(self.device))
        adapter = atomtune.train(pipe, self.data, out, self.options, resume=self.resume, command=command_line())
        print(f"{len(adapter.atoms)} atoms in {out}", file=sys.stderr)
        print(f"  atomtune atoms {out}\n  atomtune generate {out} PROMPT", file=sys.stderr)
