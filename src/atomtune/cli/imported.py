"""`atomtune import`."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro


@dataclass(frozen=True)
class Command:
    """Turn a LoRA into atoms, to see, rank and prune them."""

    adapter: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="LORA")]
    """The .safetensors file of a LoRA, or a folder with one."""
    out: Path
    """Folder for the atoms."""
    prompt: Annotated[
        tyro.conf.UseAppendAction[tuple[str, ...]],
        tyro.conf.arg(metavar="PROMPT", help_behavior_hint="(required, repeatable)"),
    ]
    """A prompt that the LoRA was made for, on which atoms are measured; may be given several times."""
    exact: bool = False
    """Its rank-one components as atoms, signed and always on, instead of a sparse dictionary of what it adds."""
    base: str = "embedded"
    """A diffusers pipeline folder or hub id; "embedded" is the small model that ships with atomtune."""
    steps: int | None = None
    """Steps of the sampler. None: the pipeline's default."""
    seed: int = 0
    """Seed of the pictures' noise."""
    dtype: str = "float32"
    """Precision of the base: float32, bfloat16 or float16."""
    device: str | None = None
    """Where to run, such as cuda. None: cuda where there is one, else cpu."""

    def run(self) -> None:
        import atomtune
        from atomtune.cli.common import counted, device_of
        from atomtune.errors import UserError
        from atomtune.lora import import_lora
        from atomtune.tuner.lora import lora_file

        if self.out.exists():
            raise UserError(f"`out` must not exist yet: {self.out}. Choose another folder.")
        lora_file(self.adapter)
        pipe = atomtune.open_pipeline(self.base, self.dtype, device_of(self.device))
        adapter, lost = import_lora(pipe, self.adapter, self.prompt, exact=self.exact, seed=self.seed, steps=self.steps)
        adapter.save(self.out, {"LoRA": self.adapter.name, "energy lost": f"{lost:.2%}"})
        print(self.out)
        made = counted(len(adapter.atoms), "atom")
        print(f"{made}; {lost:.2%} of the energy of what the LoRA adds is lost", file=sys.stderr)
        print(f"  atomtune atoms {self.out}", file=sys.stderr)
