"""`atomtune compare`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Command:
    """Measure methods against each other: a grid of methods, subjects, seeds and sizes, which goes on where it was."""

    task: str = "customization"
    """customization, style, editing, editing-bare, mixing or both."""
    methods: tuple[str, ...] = ("base", "atoms", "lora")
    """Methods, such as lora; options of training may follow, as in atoms:silence=0.01,n_atoms=64."""
    subjects: tuple[str, ...] = ("benchmark",)
    """Names, or benchmark, or tuning for those on which anything may be tried."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of training and of the pictures."""
    sizes: tuple[int, ...] = (16,)
    """Sizes, in ranks of LoRA: the methods train as many parameters as that LoRA, where they can."""
    set: tuple[str, ...] = ("steps=200",)
    """Options of training for all methods."""
    out: Path = Path("runs/compare")
    """Where cells and trained methods are kept; several runs may share it."""
    name: str | None = None
    """Name of the result. None: the task."""
    results: Path | None = None
    """Where result, tables and figures go. None: a folder in --out."""
    processes: int | None = None
    """Cells at once, each on one core. None: one a core."""
    ray: str | None = None
    """Address of a Ray cluster to spread the cells over; "local" starts one here."""
    again: bool = False
    """Measure finished cells anew."""
    add: bool = False
    """Keep what the result of that name holds of other methods, subjects, seeds and sizes."""
    tune: bool = False
    """Search each method's learning rate instead, by its hypervolume; use --subjects tuning."""
    dials: bool = True
    """Turn the knobs too, on methods that have components."""
    sampler: int = 12
    """Steps of the sampler."""
    base: str = "embedded"
    """The base: a pipeline folder that paints the embedded world."""

    def run(self) -> None:
        from atomtune.cli import command_line
        from atomtune.compare import grid as grids
        from atomtune.compare.methods import parse_options

        grid = grids.Grid(
            self.task,
            self.methods,
            self.subjects,
            self.seeds,
            self.sizes,
            self.base,
            self.sampler,
            self.dials,
            parse_options(self.set),
        )
        table = (grids.tune if self.tune else grids.compare)(
            grid,
            self.out,
            self.name or ("tuning" if self.tune else self.task),
            processes=self.processes,
            ray=self.ray,
            again=self.again,
            add=self.add,
            results=self.results,
            command=command_line(),
        )
        print(table.read_text(encoding="utf-8"))
        print(table)
