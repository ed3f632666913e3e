"""`atomtune export`."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro


@dataclass(frozen=True)
class Command:
    """Write the LoRA that is nearest to an adapter, for diffusers and PEFT."""

    adapter: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="ADAPTER")]
    """Folder of a run or a saved adapter."""
    out: Path
    """Folder for the LoRA."""
    rank: int = 16
    """Rank of the LoRA at every site."""
    prompt: Annotated[tyro.conf.UseAppendAction[tuple[str, ...]], tyro.conf.arg(metavar="PROMPT")] = ()
    """A prompt of the concept, best one that it was trained on; may be given several times."""
    data: Path | None = None
    """Folder that it was trained on, for its captions. Without prompts and captions: made with the class noun."""
    weight: float = 1.0
    """How much staying silent on unrelated prompts counts beside the concept's."""
    steps: int | None = None
    """Steps of the sampler. None: the pipeline's default."""
    seed: int = 0
    """Seed of the pictures' noise."""
    base: str | None = None
    """Base pipeline. None: the one that the adapter names."""
    allow_other_base: bool = False
    """Load onto a base that is not the adapter's."""
    dtype: str | None = None
    """Precision of the base: float32, bfloat16 or float16. None: as the run had it, quantized too, or float32."""
    device: str | None = None
    """Where to run, such as cuda. None: cuda where there is one, else cpu."""

    def run(self) -> None:
        from atomtune.cli.common import open_adapter
        from atomtune.errors import UserError
        from atomtune.lora import captions, export_lora, learned

        if self.out.exists():
            raise UserError(f"`out` must not exist yet: {self.out}. Choose another folder.")
        adapter = open_adapter(self.adapter, self.base, self.allow_other_base, self.device, self.dtype)
        said = learned(self.data, self.adapter) if self.data else ()
        prompts = [*self.prompt, *said] or captions(adapter, self.adapter)
        done = export_lora(
            adapter, self.out, prompts, rank=self.rank, weight=self.weight, seed=self.seed, steps=self.steps
        )
        for site, lost in done.lost.items():
            print(f"{lost:7.2%}  {site}")
        print(f"{done.lost_in_all:.2%} of the energy of what the atoms add is lost, by site above", file=sys.stderr)
        print(f"drift on unrelated prompts {done.drift_before:.4f} -> {done.drift_after:.4f}", file=sys.stderr)
        print("a LoRA has no prompt gate, and no strength for one atom", file=sys.stderr)
        print(f'  pipe.load_lora_weights("{self.out}")', file=sys.stderr)
