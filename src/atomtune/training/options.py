"""Everything that a training run can be told."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from atomtune.errors import UserError


@dataclass(frozen=True)
class TrainOptions:
    """Options of a training run; a None is derived from the data or the base."""

    concept: str | None = None
    """The words that name the concept in your captions, such as "sks dog". None: no prompt gate."""
    class_noun: str | None = None
    """What kind of thing the concept is, such as "dog"; prompts with it alone must stay the base's."""
    caption: str | None = None
    """Caption of every picture that has none of its own."""
    steps: int = 300
    """Optimizer steps."""
    batch_size: int = 4
    """Pictures of the concept a step."""
    unrelated_batch: int | None = None
    """Unrelated pictures a step. None: as many as `batch_size`. 0: no silence term and no distillation."""
    lr: float = 4e-3
    """Learning rate of encoders and atoms (AdamW); linear warm-up over 5 % of the steps, cosine to a tenth."""
    n_atoms: int = 32
    """Atoms a site."""
    sparsifier: str = "relu"
    """How pre-codes become codes: relu, soft, topk, batch_topk, jumprelu, or dense (which is LoRA)."""
    threshold: float = 1.0
    """Where an atom starts to fire, in standard deviations of its pre-code."""
    data_start: bool = False
    """Start encoders from the data: they tell the concept's tokens from unrelated ones before step 1."""
    k: int | None = None
    """Atoms kept at a position, for topk and batch_topk; annealed from all over the first 40 % of the steps."""
    times: tuple[float, ...] = ()
    """Times that pictures are noised to, 0 being clean. Empty: drawn from the family's own density."""
    sites: tuple[str, ...] | None = None
    """Ends of the names of the layers to adapt. None: the family's attention layers."""
    silence: float = 0.01
    """Weight on any code that fires on unrelated pictures."""
    margin: float = 0.2
    """How far below firing the silence term pushes, in pre-code units."""
    inner: float = 0.0
    """Weight on any code that fires beside the subject in the concept's own pictures."""
    prior: float = 0.0
    """Weight on the task's own loss on unrelated pictures (prior preservation)."""
    sparsity: float = 0.0
    """Weight on the size of codes times their atoms' norms, on the concept's pictures."""
    distill: float = 1.0
    """Weight on the squared difference to the base's prediction on unrelated pictures."""
    nested: bool = True
    """Train a random prefix of every dictionary each step, so that a share of the atoms works by itself."""
    dead: float = 0.0
    """Weight on waking atoms that have not fired for 50 steps."""
    gate: bool = True
    """Train a prompt gate: prompts without the concept give the base's picture, bit for bit."""
    unrelated: Path | None = None
    """A text file of unrelated prompts, one a line. None: the base folder's unrelated.txt, or a shipped list."""
    unrelated_pictures: int = 32
    """How many pictures the base paints before training (cached): of unrelated prompts, and of the class noun."""
    resolution: int | None = None
    """Side of the training pictures, in pixels. None: the base's default."""
    grad_accumulation: int = 1
    """Batches an optimizer step."""
    gradient_checkpointing: bool = False
    """Trade time for memory."""
    mixed_precision: str = "no"
    """no, fp16 or bf16."""
    max_grad_norm: float = 1.0
    """Gradients longer than this are scaled down."""
    seed: int = 0
    """Seed of initial weights, order, noise and times."""
    checkpoint_every: int = 100
    """Steps between checkpoints."""
    keep_checkpoints: int = 2
    """How many checkpoints stay."""
    sample_every: int | None = None
    """Steps between validation pictures. None: no such pictures."""
    sample_prompts: tuple[str, ...] = ()
    """Prompts of the validation pictures. Empty: the first captions."""

    def __post_init__(self) -> None:
        for name in (
            "steps",
            "batch_size",
            "n_atoms",
            "k",
            "resolution",
            "grad_accumulation",
            "checkpoint_every",
            "keep_checkpoints",
            "sample_every",
        ):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise UserError(f"`{name}` must be at least 1, got {getattr(self, name)}.")
        for name in ("silence", "inner", "prior", "sparsity", "distill", "dead"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise UserError(f"`{name}` must be a weight of 0 or more, got {value}.")
        for name in ("lr", "max_grad_norm"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) > 0):
                raise UserError(f"`{name}` must be above 0, got {getattr(self, name)}.")
        for name in ("margin", "threshold"):
            if not math.isfinite(getattr(self, name)):
                raise UserError(f"`{name}` must be a finite number, got {getattr(self, name)}.")
        if not all(0 <= s <= 1 for s in self.times):
            raise UserError(f"`times` must lie in [0, 1], got {self.times}.")
        if not 0 <= self.seed < 2**31:
            raise UserError(f"`seed` must be between 0 and {2**31 - 1}, got {self.seed}.")
        if self.mixed_precision not in ("no", "fp16", "bf16"):
            raise UserError(f"`mixed_precision` must be no, fp16 or bf16, got {self.mixed_precision!r}.")
        if self.unrelated_batch is not None and self.unrelated_batch < 0:
            raise UserError(f"`unrelated_batch` must be 0 or more, got {self.unrelated_batch}.")
        if self.unrelated_pictures < 1:
            raise UserError(f"`unrelated_pictures` must be at least 1, got {self.unrelated_pictures}.")
        if self.concept is not None and not self.concept.strip():
            raise UserError("`concept` must be words, got nothing. Leave it out for a run without a gate.")

    @property
    def gated(self) -> bool:
        """Whether the run trains a prompt gate."""
        return self.gate and self.concept is not None

    @property
    def unrelated_rows(self) -> int:
        """Unrelated pictures in a batch."""
        return self.batch_size if self.unrelated_batch is None else self.unrelated_batch

    def to_dict(self) -> dict[str, Any]:
        """The options as plain values; `from_dict` reads them back."""
        plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self), default=str))
        return plain

    def essence(self) -> dict[str, Any]:
        """`to_dict` without what is off: an option that is new, and off by default, does not change it."""
        off = {f.name for f in dataclasses.fields(self) if not f.default}
        return {name: value for name, value in self.to_dict().items() if value or name not in off}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainOptions:
        """The options of `to_dict`. Raises UserError on unknown keys."""
        known = {f.name for f in dataclasses.fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise UserError(f"Unknown option {unknown[0]!r} in a saved run. Was it made by a newer atomtune?")
        read: dict[str, Any] = dict(values)
        for field in dataclasses.fields(cls):
            if field.type == "float" and field.name in read:  # JSON knows no difference between 1 and 1.0
                read[field.name] = float(read[field.name])
        for name in ("sites", "times", "sample_prompts"):
            if read.get(name) is not None:
                read[name] = tuple(read[name])
        if read.get("unrelated") is not None:
            read["unrelated"] = Path(read["unrelated"])
        return cls(**read)

    def to_json(self) -> str:
        """The options as JSON; `from_json` reads it back."""
        return json.dumps(self.to_dict(), indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> TrainOptions:
        """The options of `to_json`. Raises UserError on unknown keys."""
        return cls.from_dict(json.loads(text))
