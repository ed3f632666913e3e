"""`atomtune train`."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, NoReturn

import tyro

from atomtune.training import config
from atomtune.training.options import TrainOptions

BASE = ("base", "dtype", "quantize", "device")
"""Options that say what is trained on."""


@dataclass(frozen=True)
class Planned:
    """A run as it is asked for."""

    data: Path
    """Folder of pictures, each with a caption (.txt beside it, metadata.jsonl, or --caption), or of .tar shards; also a
    data set: a saved folder, .parquet, imagefolder:FOLDER, hub:OWNER/NAME."""
    config: Path | None = None
    """A TOML file of these options, such as a recipe or a run's config.toml; what is given here wins."""
    base: str = "embedded"
    """A diffusers pipeline folder or hub id; "embedded" is the small model that ships with atomtune."""
    out: Path | None = None
    """Where the run goes. None: runs/ and the data folder's name."""
    resume: bool = False
    """Go on with the run in --out, from its newest whole checkpoint, with its own options."""
    allow_changed_data: bool = False
    """With --resume: go on although pictures or captions have changed."""
    dtype: str = "float32"
    """Precision of the frozen base: float32, bfloat16 or float16."""
    quantize: str | None = None
    """Fewer bits for the frozen base: int8 or fp8 (torchao), nf4 (bitsandbytes)."""
    device: str | None = None
    """Where to train, such as cuda. None: cuda where there is one, else cpu."""
    options: Annotated[TrainOptions, tyro.conf.arg(name="")] = field(default_factory=TrainOptions)

    @property
    def folder(self) -> Path:
        """Where the run goes."""
        return self.out or folder_of(self.data)

    @property
    def settings(self) -> dict[str, Any]:
        """What the base was asked to be."""
        return {name: getattr(self, name) for name in BASE}

    def open(self) -> Any:
        """The base, as it is trained on."""
        from atomtune.cli.common import device_of
        from atomtune.training.base import open_base

        return open_base(
            self.base, self.dtype, device_of(self.device), quantized=self.quantize, share=self.options.shard
        )

    def examine(self, as_json: bool = False, **how: Any) -> NoReturn:
        """Print what the run would meet; exit code 1 where it would stop."""
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # or its profiler says what it can't see; read at import
        from atomtune.training.doctor import examine, text

        asked: dict[str, Any] = {
            "out": self.folder,
            "resume": self.resume,
            "allow_changed_data": self.allow_changed_data,
        }
        report = examine(self.open, self.data, self.options, **asked, **how)
        print(json.dumps(dataclasses.asdict(report), indent=1) if as_json else text(report))
        sys.exit(1 if report.problems else 0)


def folder_of(data: Path) -> Path:
    """Where the run on some data goes, if nothing is said."""
    return Path("runs") / data.resolve().name


@dataclass(frozen=True)
class Command(Planned):
    """Train an adapter on a folder of pictures."""

    dry_run: bool = False
    """Say what the run would meet and cost, as `atomtune doctor` does, and train nothing."""

    def run(self) -> None:
        if self.dry_run:
            self.examine()
        import atomtune
        from atomtune.cli import command_line
        from atomtune.data.folder import check_there

        check_there(self.data)  # before the base is opened, which may take minutes
        out = self.folder
        adapter = atomtune.train(
            self.open(),
            self.data,
            out,
            self.options,
            resume=self.resume,
            allow_changed_data=self.allow_changed_data,
            command=command_line(),
            settings=self.settings,
        )
        print(f"{len(adapter.atoms)} atoms in {out}", file=sys.stderr)
        print(f"  atomtune atoms {out}\n  atomtune generate {out} PROMPT", file=sys.stderr)


def expand(arguments: list[str]) -> list[str]:
    """The arguments with those of --config before them, or of the run to resume: the command line's win."""
    reader = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for name in ("--config", "--out", "--data"):
        reader.add_argument(name, type=Path, nargs="?")
    reader.add_argument("--resume", action="store_true")
    try:
        given = reader.parse_known_args(arguments)[0]
    except argparse.ArgumentError:  # tyro says what is wrong
        return arguments
    path = given.config
    if path is None and given.resume and (given.out or given.data):
        began = (given.out or folder_of(given.data)) / config.FILE
        path = began if began.is_file() else None
    if path is None:
        return arguments
    known = [f.name for kind in (Command, TrainOptions) for f in dataclasses.fields(kind)]
    values = config.read(path, [name for name in known if name not in ("config", "options")])
    return [*config.arguments(values), *arguments]
