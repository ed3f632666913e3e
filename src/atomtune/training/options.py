"""Everything that a training run can be told."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from atomtune.errors import UserError, did_you_mean

SCHEDULES = ("cosine", "linear", "constant")
"""What the learning rate does after its warm-up."""
OPTIMIZERS = ("adamw", "adamw8bit", "adopt", "came", "lion", "muon", "prodigy")
"""Optimizers of encoders and atoms: `training.optimizers` makes them."""
TRACKERS = ("tensorboard", "wandb", "aim", "clearml", "comet_ml", "dvclive", "mlflow", "swanlab", "trackio")
"""Those of accelerate."""


def later(default: Any) -> Any:
    """A field that came when results were stored already: at its default it is no part of `essence`."""
    return field(default=default, metadata={"later": True})


@dataclass(frozen=True)
class TrainOptions:
    """Options of a training run; a None is derived from the data or the base."""

    concept: str | None = None
    """The words that name the concept in your captions, such as "sks dog". None: no prompt gate."""
    class_noun: str | None = None
    """What kind of thing the concept is, such as "dog"; prompts with it alone must stay the base's."""
    caption: str | None = None
    """Caption of every picture that has none of its own."""
    caption_extension: str | None = None
    """Ending of the caption files beside pictures. None: .txt."""
    caption_column: str | None = None
    """Where captions stand in metadata.jsonl or in a data set. None: text, caption or prompt."""
    trigger: bool = False
    """Put `concept` in front of captions that lack it."""
    caption_dropout: float = 0.0
    """Share of the concept's pictures that are learned without words."""
    buckets: bool = False
    """Keep the pictures' shapes, up to twice as long as wide; every batch has one. Off: all are cut to squares."""
    flip: bool = False
    """Show every picture mirrored too."""
    crop: float = 0.0
    """Largest share of each side that a random cut leaves away, such as 0.1."""
    mask_loss: float = 0.0
    """How much the task leaves out what your masks, or transparency, mark as not the subject: 0 to 1."""
    unrelated_data: Path | None = None
    """Your own regularization pictures, captioned like the concept's; beside those that the base paints."""
    skip_broken: bool = False
    """Pass over pictures that can't be read, or whose caption can't be, instead of stopping."""
    follow_links: bool = False
    """Follow links out of the data folder."""
    max_pixels: int | None = None
    """Width times height of the largest picture to open. None: 100 million."""
    steps: int = 300
    """Optimizer steps."""
    batch_size: int = 4
    """Pictures of the concept a step."""
    unrelated_batch: int | None = None
    """Unrelated pictures a step. None: as many as `batch_size`. 0: no silence term and no distillation."""
    lr: float = 4e-3
    """Learning rate of encoders and atoms, after the warm-up and before `schedule` lowers it."""
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
    contain: bool = True
    """In half of the steps atoms fire only above a share, drawn by lot, of what they reach on unrelated pictures, so
    that the dial `contain` of a trained adapter costs less."""
    dead: float = 0.0
    """Weight on waking atoms that have not fired for 50 steps."""
    gate: bool = True
    """Train a prompt gate: prompts without the concept give the base's picture, bit for bit."""
    unrelated: Path | None = None
    """A text file of unrelated prompts, one a line. None: the base folder's unrelated.txt, or a shipped list."""
    unrelated_pictures: int = 32
    """How many pictures the base paints before training (cached): of unrelated prompts, and of the class noun.
    0, with `unrelated_data`: none."""
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

    optimizer: str = later("adamw")
    """adamw, adamw8bit (bitsandbytes), muon, or adopt, came, lion, prodigy (with --lr 1; pytorch-optimizer)."""
    schedule: str = later("cosine")
    """What the learning rate does after the warm-up: cosine or linear, down to `floor`, or constant."""
    warmup: float = later(0.05)
    """Share of the steps over which the learning rate rises."""
    floor: float = later(0.1)
    """Share of the learning rate that is left at the end."""
    ema: float = 0.0
    """Decay of a running mean of the adapter, such as 0.999, which is then what is sampled, validated and saved."""
    held_out: int = 0
    """How many pictures are kept for validation, drawn by the seed. 0: it uses those that are learned from."""
    validate_every: int | None = None
    """Steps between validations: loss at fixed noise, and drift on unrelated prompts. None: none."""
    patience: int | None = None
    """Stop after this many validations without a better one. None: never before `steps`."""
    trackers: tuple[str, ...] | None = None
    """Where curves go, such as tensorboard or wandb. None: tensorboard, where it is installed."""
    shard: bool = False
    """Share the frozen base among the processes (FSDP2), instead of one whole copy on each."""
    hub: str | None = None
    """Hub repository, owner/name, that receives the finished adapter; a new one is private."""

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            object.__setattr__(self, f.name, _read(f.name, getattr(self, f.name), str(f.type)))
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
            "validate_every",
            "patience",
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
        if self.unrelated_pictures < (self.unrelated_data is None):
            raise UserError(
                f"`unrelated_pictures` must be at least 1, or 0 with `unrelated_data`, got {self.unrelated_pictures}."
            )
        for name, known in (("optimizer", OPTIMIZERS), ("schedule", SCHEDULES)):
            _among(name, getattr(self, name), known)
        for name in self.trackers or ():
            _among("trackers", name, TRACKERS)
        for name, top in (("warmup", 1.0), ("floor", 1.0), ("ema", 0.99999)):
            if not 0 <= getattr(self, name) <= top:
                raise UserError(f"`{name}` must be between 0 and {top:g}, got {getattr(self, name)}.")
        if self.held_out < 0:
            raise UserError(f"`held_out` must be 0 or more, got {self.held_out}.")
        if self.validate_every is None and (self.patience is not None or self.held_out):
            name = "held_out" if self.held_out else "patience"
            raise UserError(f"`{name}` must come with validation, got no --validate-every. Give it, such as 50.")
        if self.sample_prompts and self.sample_every is None:
            raise UserError("`sample_prompts` must come with `sample_every`, the steps between pictures of them.")
        if self.k is not None and self.sparsifier in ("relu", "soft", "jumprelu", "dense"):
            raise UserError(f"`k` must come with the sparsifier topk or batch_topk, got {self.sparsifier}.")
        if self.optimizer == "prodigy" and self.lr < 0.1:
            raise UserError(f"`lr` must be about 1 with prodigy, which finds its own, got {self.lr:g}. Give --lr 1.")
        if self.hub is not None and self.hub.count("/") != 1:
            raise UserError(f"`hub` must be owner/name, got {self.hub!r}.")
        if self.concept is not None and not self.concept.strip():
            raise UserError("`concept` must be words, got nothing. Leave it out for a run without a gate.")
        self._check_data()

    def _check_data(self) -> None:
        for name, most in (("caption_dropout", 1), ("mask_loss", 1), ("crop", 0.5)):
            if not 0 <= getattr(self, name) <= most:
                raise UserError(f"`{name}` must be a share between 0 and {most}, got {getattr(self, name)}.")
        said, noun = (" ".join((words or "").split()).casefold() for words in (self.concept, self.class_noun))
        if said and f" {said} " in f" {noun} ":
            raise UserError(
                f"`class_noun` must not say the concept's name, {self.concept!r}, got {self.class_noun!r}: prompts "
                "with it alone must stay the base's. Give the plain noun."
            )
        if self.class_noun and self.concept is None and self.unrelated_data is None:
            raise UserError(f"`class_noun` must come with the concept's name, got {self.class_noun!r} alone.")
        if self.trigger and self.concept is None:
            raise UserError("`trigger` puts the concept's name in front of captions: give it with --concept.")

    @property
    def scanning(self) -> dict[str, Any]:
        """How pictures are looked for: arguments of `data.folder.scan`."""
        names = ("caption", "caption_extension", "caption_column", "skip_broken", "follow_links", "max_pixels")
        return {name: getattr(self, name) for name in names}

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
        """`to_dict` without what is off, and without what came later (see `later`), where it stands at its default.

        So a new option does not change what stored results are found by.
        """
        plain, default = self.to_dict(), type(self)().to_dict()
        silent = {f.name for f in dataclasses.fields(self) if not f.default or f.metadata.get("later")}
        return {name: value for name, value in plain.items() if name not in silent or value != default[name]}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainOptions:
        """The options of `to_dict`. Raises UserError on unknown keys and on values of another type."""
        fields = {f.name: f for f in dataclasses.fields(cls)}
        for name in values:
            if name not in fields:
                hint = did_you_mean(name, fields)
                raise UserError(f"Unknown option {name!r} in a saved run.{hint} Of a newer atomtune?")
        return cls(**values)

    def to_json(self) -> str:
        """The options as JSON; `from_json` reads it back."""
        return json.dumps(self.to_dict(), indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> TrainOptions:
        """The options of `to_json`. Raises UserError on unknown keys."""
        return cls.from_dict(json.loads(text))


def _among(field: str, value: str, known: Collection[str]) -> None:
    if value not in known:
        raise UserError(f"`{field}` must be one of {', '.join(known)}, got {value!r}.{did_you_mean(value, known)}")


def _read(name: str, value: Any, kind: str) -> Any:
    """A value as the type that the field is annotated with; as JSON has it, too."""
    kind, _, optional = kind.partition(" | ")
    if value is None and optional:
        return None
    if kind.startswith("tuple") and isinstance(value, list | tuple):
        inner = kind.removeprefix("tuple[").removesuffix(", ...]")
        return tuple(_read(name, item, inner) for item in value)
    if kind == "float" and type(value) in (int, float):  # JSON knows no difference between 1 and 1.0
        return float(value)
    if kind == "Path" and isinstance(value, str | Path):
        return Path(value)
    if type(value).__name__ != kind:
        raise UserError(f"`{name}` must be {kind}{' or None' if optional else ''}, got {value!r}.")
    return value
