"""`atomtune generate`."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro


@dataclass(frozen=True)
class Command:
    """Paint pictures with an adapter, its dials turned as you say."""

    adapter: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="ADAPTER")]
    """Folder of a run or a saved adapter."""
    prompts: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="PROMPT ...")]
    """What to paint, one picture each."""
    out: Path = Path("pictures")
    """Folder for the pictures."""
    seed: int = 0
    """Seed of the first picture's noise; the next takes the next."""
    strength: float = 1.0
    """Multiplier on the whole adapter."""
    density: float = 1.0
    """Share of all atoms that take part, the most important first; 0 is the base."""
    atom: Annotated[tyro.conf.UseAppendAction[tuple[str, ...]], tyro.conf.arg(metavar="L17[137]=0.5")] = ()
    """Strength of one atom; may be given several times."""
    steps: int | None = None
    """Steps of the sampler. None: the pipeline's default."""
    guidance: float | None = None
    """Guidance scale. None: the pipeline's default."""
    base: str | None = None
    """Base pipeline. None: the one that the adapter names."""
    allow_other_base: bool = False
    """Load onto a base that is not the adapter's."""
    device: str | None = None
    """Where to run, such as cuda. None: cuda where there is one, else cpu."""

    def run(self) -> None:
        import atomtune
        from atomtune.cli.common import open_adapter, parse_strengths
        from atomtune.sampling import save_pictures

        single = parse_strengths(self.atom)
        adapter = open_adapter(self.adapter, self.base, self.allow_other_base, self.device)
        with adapter.using(density=self.density, strength=self.strength, atoms=single):
            pictures = atomtune.generate(
                adapter.pipe, self.prompts, seed=self.seed, steps=self.steps, guidance=self.guidance
            )
        for path in save_pictures(pictures, self.out, self.seed):
            print(path)
        print(f"{len(pictures)} pictures in {self.out}", file=sys.stderr)
