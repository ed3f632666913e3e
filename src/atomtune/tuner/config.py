"""The configuration of an adapter: what `adapter_config.json` holds."""

import importlib.metadata
import itertools
import math
from dataclasses import dataclass, field

from peft import PeftConfig

from atomtune.errors import UserError, did_you_mean
from atomtune.sparse import SPARSIFIERS

from .register import ATOMS

# Raised when a file of the new format would be misread by code of the old.
FORMAT_VERSION = 1
ENCODERS = ("linear", "ista")


def _help(text: str) -> dict[str, str]:
    return {"help": text}


@dataclass
class AtomConfig(PeftConfig):
    """A dictionary of atoms at each targeted linear layer. Raises UserError on values that can't work."""

    n_atoms: int = field(default=64, metadata=_help("Atoms a site."))
    k: int | None = field(default=None, metadata=_help("Atoms kept at a position, for topk and batch_topk."))
    sparsifier: str = field(default="relu", metadata=_help(f"One of {', '.join(SPARSIFIERS)}."))
    encoder: str = field(default="linear", metadata=_help(f"One of {', '.join(ENCODERS)}."))
    threshold: float = field(
        default=1.0, metadata=_help("Where an atom starts to fire, in standard deviations of its pre-code.")
    )
    normalize: bool = field(
        default=True, metadata=_help("Whether a site's input is scaled to unit RMS before it is encoded.")
    )
    encoder_bias: bool = field(
        default=True, metadata=_help("Whether pre-codes have a bias. `dense` with neither is LoRA.")
    )
    steps: int = field(default=3, metadata=_help("Shrinkage steps of the ista encoder."))
    target_modules: list[str] | str | None = field(
        default=None, metadata=_help("Ends of module names, a regular expression, or 'all-linear'.")
    )
    exclude_modules: list[str] | str | None = field(
        default=None, metadata=_help("Ends of module names, or a regular expression, to leave alone.")
    )
    layers_to_transform: list[int] | int | None = field(default=None, metadata=_help("Indices of the blocks to adapt."))
    layers_pattern: list[str] | str | None = field(
        default=None, metadata=_help("Name of the list of blocks that the indices count in.")
    )
    size_pattern: dict[str, int] | None = field(
        default=None,
        metadata=_help("Atoms by site. A site with 0, or not named, is dropped. None: n_atoms everywhere."),
    )
    sites: list[str] | None = field(
        default=None,
        metadata=_help("Every site found at creation, in order, dropped ones too: L17 is entry 17. Filled in."),
    )
    gate_input: str | None = field(
        default=None,
        metadata=_help("Argument of the base model's forward that carries prompt embeddings. None: no gate."),
    )
    gate_mask: str | None = field(
        default=None, metadata=_help("Argument of the base model's forward that carries their mask.")
    )
    gate_dim: int | None = field(default=None, metadata=_help("Features of a prompt embedding."))
    gate_starts: list[int] | None = field(
        default=None,
        metadata=_help(
            "Of parts merged into one: the first atom id of each, which has a gate of its own. None: one gate."
        ),
    )
    base_fingerprint: str | None = field(
        default=None,
        metadata=_help("What the base's weights looked like when the adapter was saved. Filled in."),
    )
    base_fingerprint_float16: str | None = field(
        default=None, metadata=_help("The same, had the base been loaded in float16. Filled in.")
    )
    atomtune_version: str | None = field(default=None, metadata=_help("Filled in."))
    format_version: int = field(default=FORMAT_VERSION, metadata=_help("Of the file."))

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = ATOMS
        if self.atomtune_version is None:
            self.atomtune_version = importlib.metadata.version("atomtune")
        self._check_dictionary()
        self._check_gate()
        for site, size in (self.size_pattern or {}).items():
            if size < 0:
                raise UserError(f"`size_pattern` must not be negative, got {size} at {site}. Use 0 to drop it.")

    def _check_dictionary(self) -> None:
        if self.n_atoms < 1:
            raise UserError(f"`n_atoms` must be at least 1, got {self.n_atoms}.")
        if self.sparsifier not in SPARSIFIERS:
            known = ", ".join(SPARSIFIERS)
            hint = did_you_mean(self.sparsifier, SPARSIFIERS)
            raise UserError(f"`sparsifier` must be one of {known}, got {self.sparsifier!r}.{hint}")
        if self.k is None and self.sparsifier in ("topk", "batch_topk"):
            raise UserError(f"`k` must be given for the sparsifier {self.sparsifier}, got None.")
        if self.k is not None and not 1 <= self.k <= self.n_atoms:
            advice = "Raise `k`." if self.k < 1 else "Lower `k` or raise `n_atoms`."
            raise UserError(f"`k` must be between 1 and n_atoms ({self.n_atoms}), got {self.k}. {advice}")
        if self.encoder not in ENCODERS:
            raise UserError(f"`encoder` must be one of {', '.join(ENCODERS)}, got {self.encoder!r}.")
        if self.encoder == "ista" and self.sparsifier != "soft":
            raise UserError(f"`sparsifier` must be soft with the encoder ista, got {self.sparsifier!r}. Or use linear.")
        if not math.isfinite(self.threshold):
            raise UserError(f"`threshold` must be a finite number, got {self.threshold}.")
        if self.steps < 1:
            raise UserError(f"`steps` must be at least 1, got {self.steps}.")

    def _check_gate(self) -> None:
        if self.gate_input is None:
            for name in ("gate_mask", "gate_dim", "gate_starts"):
                if getattr(self, name) is not None:
                    raise UserError(f"`{name}` has no meaning without `gate_input`. Set `gate_input` or drop it.")
        elif self.gate_dim is None or self.gate_dim < 1:
            raise UserError(f"`gate_dim` must be the width of `{self.gate_input}`, at least 1, got {self.gate_dim}.")
        starts = self.gate_starts
        if starts is not None and (starts[:1] != [0] or any(a >= b for a, b in itertools.pairwise(starts))):
            raise UserError(f"`gate_starts` must rise from 0, got {starts}.")

    def atoms_at(self, site: str) -> int:
        """How many atoms the site has; 0 where it is dropped."""
        return self.n_atoms if self.size_pattern is None else self.size_pattern.get(site, 0)
