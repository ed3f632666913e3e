"""What atoms do over many positions: streaming statistics of codes, and the importance formulas."""

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

PerAtom = Float[Tensor, " n_atoms"]


class CodeStatistics:
    """Running sums over the codes of one site, float64 on the CPU.

    A signed code counts by its absolute value. A result is NaN where nothing seen could define it.
    """

    def __init__(self, n_atoms: int, time_buckets: int = 8) -> None:
        if min(n_atoms, time_buckets) < 1:
            raise ValueError(f"`n_atoms` and `time_buckets` must be at least 1, got {n_atoms} and {time_buckets}.")
        # Per atom on the last axis, but for the weights: positions seen, by time bucket, by side of the mask.
        self._sums = {
            name: torch.zeros(*shape, n_atoms, dtype=torch.float64)
            for name, shape in {
                "active": (), "total": (), "square": (), "maximum": (), "maximum_beside": (),
                "time_total": (time_buckets,), "masked_square": (2,),
            }.items()
        }  # fmt: skip
        self._weights = {
            "count": torch.zeros((), dtype=torch.float64),
            "time_count": torch.zeros(time_buckets, dtype=torch.float64),
            "masked_count": torch.zeros(2, dtype=torch.float64),
        }

    @property
    def n_atoms(self) -> int:
        return self._sums["total"].shape[-1]

    @property
    def time_buckets(self) -> int:
        return len(self._weights["time_count"])

    @torch.no_grad()
    def update(
        self,
        codes: Float[Tensor, "batch positions n_atoms"],
        *,
        time: Float[Tensor, " batch"] | None = None,
        mask: Float[Tensor, "batch positions"] | Bool[Tensor, "batch positions"] | None = None,
    ) -> None:
        """Add codes; `time` in [0, 1] a sample, `mask` the share in [0, 1] of a position on the subject."""
        if codes.ndim != 3 or codes.shape[-1] != self.n_atoms:
            expected = f"(batch, positions, {self.n_atoms})"
            raise ValueError(f"`codes` must be of shape {expected}, got {tuple(codes.shape)}.")
        batch, positions, _ = codes.shape
        t = None if time is None else _unit("time", time, (batch,))
        m = None if mask is None else _unit("mask", mask, (batch, positions))
        # Summed where they lie, so that only (batch, n_atoms) numbers travel; mps has no float64.
        codes = codes.detach().abs().to(torch.float32 if codes.device.type == "mps" else torch.float64)
        square = codes.square()
        total = _cpu(codes.sum(1))
        self._sums["active"] += _cpu((codes > 0).sum((0, 1)))
        self._sums["total"] += total.sum(0)
        self._sums["square"] += _cpu(square.sum((0, 1)))
        if codes.numel():
            torch.maximum(self._sums["maximum"], _cpu(codes.amax((0, 1))), out=self._sums["maximum"])
        self._weights["count"] += batch * positions
        if t is not None:
            bucket = (t * self.time_buckets).long().clamp_max(self.time_buckets - 1)
            self._sums["time_total"].index_add_(0, bucket, total)
            self._weights["time_count"] += positions * bucket.bincount(minlength=self.time_buckets)
        if m is not None:
            sides = torch.stack((m, 1 - m))
            there = sides.to(codes.device, codes.dtype)
            self._sums["masked_square"] += _cpu(torch.einsum("sbp,bpn->sn", there, square))
            self._weights["masked_count"] += sides.sum((1, 2))
            if codes.numel():
                beside = _cpu(torch.where(there[0, ..., None] < 0.5, codes, 0).amax((0, 1)))
                torch.maximum(self._sums["maximum_beside"], beside, out=self._sums["maximum_beside"])

    @property
    def count(self) -> int:
        """Positions seen."""
        return int(self._weights["count"])

    @property
    def density(self) -> PerAtom:
        """Fraction of positions where the atom is active."""
        return self._sums["active"] / self._weights["count"]

    @property
    def mean(self) -> PerAtom:
        """Mean code over all positions."""
        return self._sums["total"] / self._weights["count"]

    @property
    def mean_when_active(self) -> PerAtom:
        """Mean code over the positions where the atom is active; 0 for a silent atom."""
        return self._sums["total"] / self._sums["active"].clamp_min(1)

    @property
    def maximum(self) -> PerAtom:
        """Largest code seen."""
        return self._sums["maximum"].clone()

    @property
    def maximum_beside(self) -> PerAtom:
        """Largest code seen at positions of which less than half is on the subject; 0 where no mask was given."""
        return self._sums["maximum_beside"].clone()

    @property
    def energy(self) -> PerAtom:
        """Mean square of the code over all positions."""
        return self._sums["square"] / self._weights["count"]

    @property
    def dead(self) -> Bool[Tensor, " n_atoms"]:
        """Never active over the `count` positions seen."""
        return self._sums["active"] == 0

    @property
    def by_time(self) -> Float[Tensor, "time_buckets n_atoms"]:
        """Mean code in each of `time_buckets` equal parts of [0, 1]."""
        return self._sums["time_total"] / self._weights["time_count"][:, None]

    @property
    def on_subject(self) -> PerAtom:
        """Mean energy on the subject: positions weighted by the mask."""
        return self._sums["masked_square"][0] / self._weights["masked_count"][0]

    @property
    def on_background(self) -> PerAtom:
        """Mean energy off the subject: positions weighted by 1 - mask."""
        return self._sums["masked_square"][1] / self._weights["masked_count"][1]

    @property
    def purity(self) -> PerAtom:
        """on_subject / (on_subject + on_background); NaN for a silent atom, or where no mask was given."""
        return self.on_subject / (self.on_subject + self.on_background)

    def merge(self, other: "CodeStatistics") -> None:
        """Add what another object has seen."""
        mine, theirs = (self.n_atoms, self.time_buckets), (other.n_atoms, other.time_buckets)
        if mine != theirs:
            raise ValueError(f"`other` must have (n_atoms, time_buckets) {mine}, got {theirs}.")
        names = ("maximum", "maximum_beside")
        highest = {name: torch.maximum(self._sums[name], other._sums[name]) for name in names}
        for name, value in self._state().items():
            value += other._state()[name]
        self._sums |= highest

    def select(self, index: Int[Tensor, " kept"]) -> "CodeStatistics":
        """The statistics of a subset or reorder of the atoms, as `Dictionary.select`."""
        chosen = CodeStatistics(len(index), self.time_buckets)
        chosen._sums = {name: value[..., index.cpu()] for name, value in self._sums.items()}
        chosen._weights = {name: value.clone() for name, value in self._weights.items()}
        return chosen

    def _state(self) -> dict[str, Tensor]:
        return self._sums | self._weights

    def state_dict(self) -> dict[str, Tensor]:
        """All sums, as plain tensors."""
        return {name: value.clone() for name, value in self._state().items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Replace all sums; names and shapes must be this object's."""
        expected = {name: tuple(value.shape) for name, value in self._state().items()}
        found = {name: tuple(value.shape) for name, value in state.items()}
        if found != expected:
            raise ValueError(f"`state` must hold {expected}, got {found}.")
        for name, value in self._state().items():
            value.copy_(state[name])


def _cpu(x: Tensor) -> Tensor:
    return x.to("cpu").double()


def _unit(name: str, values: Tensor, shape: tuple[int, ...]) -> Tensor:
    values = _cpu(values.detach())
    if values.shape != shape:
        raise ValueError(f"`{name}` must be of shape {shape}, got {tuple(values.shape)}.")
    if not ((values >= 0) & (values <= 1)).all():
        low, high = values.min().item(), values.max().item()
        raise ValueError(f"`{name}` must lie in [0, 1], got values from {low:g} to {high:g}.")
    return values


def mean_importance(mean: PerAtom, atom_norms: PerAtom) -> PerAtom:
    """Mean code over all positions, times ||D_i||: mean size of what the atom adds."""
    return mean * atom_norms


def active_importance(mean_when_active: PerAtom, atom_norms: PerAtom) -> PerAtom:
    """Mean code over the positions where it fires, times ||D_i||."""
    return mean_when_active * atom_norms


def max_importance(maximum: PerAtom, atom_norms: PerAtom) -> PerAtom:
    """Largest code, times ||D_i||."""
    return maximum * atom_norms


def purity_importance(purity: PerAtom, atom_norms: PerAtom) -> PerAtom:
    """Share of the atom's energy on the subject; 0 where it is silent or D_i is zero."""
    return purity.nan_to_num(0.0) * (atom_norms > 0)


# Keyed by the statistic that the formula reads.
IMPORTANCE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mean": mean_importance,
    "mean_when_active": active_importance,
    "maximum": max_importance,
    "purity": purity_importance,
}


def importance(statistics: CodeStatistics, atoms: Float[Tensor, "n_atoms d_out"], formula: str = "mean") -> PerAtom:
    """Importance of each atom by a formula of `IMPORTANCE`, float64 on the CPU; larger matters more."""
    if formula not in IMPORTANCE:
        raise ValueError(f"`formula` must be one of {', '.join(IMPORTANCE)}, got {formula!r}.")
    statistic: Tensor = getattr(statistics, formula)
    if formula == "purity" and not statistics._weights["masked_count"].all():
        raise ValueError("`purity` needs codes on and off the subject. Give `mask` to `update`.")
    norms = _cpu(torch.linalg.vector_norm(atoms.detach(), dim=-1, dtype=torch.float32))
    return IMPORTANCE[formula](statistic, norms)
