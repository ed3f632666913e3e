"""`atomtune generate`."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

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
    strength: float | None = None
    """Multiplier on the whole adapter. None: 1."""
    density: Annotated[tyro.conf.UseAppendAction[tuple[str, ...]], tyro.conf.arg(metavar="0.5|L17=0.2")] = ()
    """Share of all atoms that take part, the most important first; 0 is the base, nothing said is 1. Or of the atoms of
    a site, by its number or the end of its path; may then be given several times."""
    purity: float = 0.0
    """Only atoms with at least this share of their energy on the subject, or an unknown one, take part."""
    atom: Annotated[tyro.conf.UseAppendAction[tuple[str, ...]], tyro.conf.arg(metavar="L17[137]=0.5")] = ()
    """Strength of one atom; may be given several times."""
    site: Annotated[tyro.conf.UseAppendAction[tuple[str, ...]], tyro.conf.arg(metavar="L17=2.5")] = ()
    """Multiplier on the atoms of a site, by its number or the end of its path (to_v=0); may be given several times."""
    time: Annotated[str | None, tyro.conf.arg(metavar="0.6-1.0")] = None
    """Limit to some times: 1 is noise, 0 the picture. Within its limits a strength (of --atom and --site, or else
    --strength) is what you say, beyond them 1. Without any strength the adapter takes part within them only."""
    where: Annotated[tyro.conf.UseAppendAction[tuple[str, ...]], tyro.conf.arg(metavar="MASK|PART=MASK")] = ()
    """Limit to what is white in this picture, of any size. The prompt's tokens keep the whole adapter, so that the rest
    still changes, unless --words "" limits them to none. For a mixture it may be given once a part: each then takes
    part in its own region only."""
    words: str | None = None
    """Limit to these words of the prompts; for the prompts' tokens. Empty: none of them."""
    own_words: Annotated[tyro.conf.UseAppendAction[tuple[str, ...]], tyro.conf.arg(metavar="[PART:]SEPIA=PHOTO")] = ()
    """Where the prompt says the first, the adapter's codes are read as if it said the second, a word that its captions
    had; nothing takes it out. Twice the time. Of a mixture, give the part; may be given several times."""
    own_until: float = 0.3
    """Until which time own words hold: 1 is noise, 0 the picture. Lower is more of the subject, less of the prompt."""
    contain: float = 0.0
    """How contained atoms are: each fires only above this share of what it reached on unrelated pictures. 1: silent on
    all of those; more is stricter."""
    beside: float = 0.0
    """Likewise, of what it reached beside the subject in the concept's own pictures."""
    steps: int | None = None
    """Steps of the sampler. None: the pipeline's default."""
    guidance: float | None = None
    """Guidance scale. None: the pipeline's default."""
    base: str | None = None
    """Base pipeline. None: the one that the adapter names."""
    allow_other_base: bool = False
    """Load onto a base that is not the adapter's."""
    dtype: str | None = None
    """Precision of the base: float32, bfloat16 or float16. None: as the run had it, quantized too, or float32."""
    device: str | None = None
    """Where to run, such as cuda. None: cuda where there is one, else cpu."""

    def run(self) -> None:
        import atomtune
        from atomtune.atoms import find_each
        from atomtune.cli.common import counted, open_adapter, parse_density, parse_numbers
        from atomtune.sampling import save_pictures

        dials = self._dials() | {"own_words": self._own_words(), "own_until": self.own_until}
        adapter = open_adapter(self.adapter, self.base, self.allow_other_base, self.device, self.dtype)
        for atom, value in find_each(adapter.atoms.ranked, parse_numbers("atom", "L17[137]=0.5", self.atom)).items():
            print(f"{atom.title} at {value:g}", file=sys.stderr)
        dials |= {"purity": self.purity, "contain": self.contain, "beside": self.beside}
        with adapter.using(parse_density(self.density), **dials):
            pictures = atomtune.generate(
                adapter.pipe, self.prompts, seed=self.seed, steps=self.steps, guidance=self.guidance
            )
        for path in save_pictures(pictures, self.out, self.seed):
            print(path)
        print(f"{counted(len(pictures), 'picture')} in {self.out}", file=sys.stderr)

    def _own_words(self) -> dict[str, Any]:
        """Words by what is read instead; where a part is named, by part."""
        from atomtune.errors import UserError

        by_part: dict[str, dict[str, str]] = {}
        for given in self.own_words:
            words, sign, own = given.partition("=")
            part, _, said = words.rpartition(":")
            mixed = bool(by_part) and ("" in by_part) != (part == "")
            if not sign or not said or mixed or said in by_part.get(part, {}):
                raise UserError(
                    "`own_words` must be WORDS=OTHERS or, for a mixture, each time PART:WORDS=OTHERS, each words once, "
                    f"got {given!r}."
                )
            by_part.setdefault(part, {})[said] = own
        return by_part.get("", by_part)

    def _dials(self) -> dict[str, Any]:
        """Arguments of `using`."""
        from atomtune.cli.common import pairs, parse_numbers, parse_time
        from atomtune.errors import UserError
        from atomtune.steering import Steer

        atoms = parse_numbers("atom", "L17[137]=0.5", self.atom)
        sites = parse_numbers("site", "L17=2.5", self.site)
        strength = 1.0 if self.strength is None else self.strength
        if self.time is None and not self.where and self.words is None:
            steer = [Steer(name, value) for name, value in sites.items()]
            return {"strength": strength, "atoms": atoms, "steer": steer}
        limits: dict[str, Any] = {"time": parse_time(self.time), "words": self.words}
        if any("=" in given for given in self.where) or len(self.where) > 1:
            if atoms | sites:
                raise UserError("`where` by part takes no --atom and --site. Turn them by themselves.")
            regions = {part: _picture(Path(path)) for part, path in pairs("where", self.where, "PART=MASK").items()}
            return {"steer": {p: [Steer(None, self.strength, where=mask, **limits)] for p, mask in regions.items()}}
        limits["where"] = _picture(Path(self.where[0])) if self.where else None
        if not atoms | sites:
            return {"steer": [Steer(None, self.strength, **limits)]}
        return {
            "strength": strength,
            "steer": [Steer(name, value, **limits) for name, value in (atoms | sites).items()],
        }


def _picture(path: Path) -> Any:
    from atomtune.data.picture import open_mask
    from atomtune.errors import UserError

    try:
        return open_mask(str(path))
    except UserError as error:
        raise UserError(f"`where` must be a picture file, got {error}") from error
