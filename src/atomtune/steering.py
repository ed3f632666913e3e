"""Atoms steered while a picture is painted: how strong, at which times, on which part of it, on which words."""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from atomtune.atoms import Atom, at_site, find
from atomtune.backbones import Backbone, Embeds, Heard, backbone_of, denoiser, encoding, named, word_tokens
from atomtune.data.picture import mask_shares
from atomtune.errors import UserError
from atomtune.tuner import atom_layers, unwrap

READING: ContextVar[bool] = ContextVar("reading", default=False)
"""Whether this forward is one that only reads codes, of words that no prompt says."""


@dataclass(frozen=True)
class Steer:
    """Some atoms, a strength, and limits to it.

    With a `strength`, that is what the atoms are multiplied by within the limits; beyond them they are as they were.
    Without one, they take part within the limits only. `where` speaks of picture tokens, `words` of prompt tokens:
    each alone leaves the other kind as it was. Words reach the whole picture: what is wanted in one part only may
    need a second steer that turns its words off.
    """

    atoms: str | Sequence[str] | None = None
    """Atoms (`L17[137]` or labels) and whole sites (`L17`, or the end of a module path such as `to_v`). None: all."""
    strength: float | None = None
    """Multiplier within the limits. None: 1 there, and 0 beyond them."""
    time: tuple[float, float] | None = None
    """From and to, both included, of s: 0 is the picture, 1 is noise."""
    where: Any = None
    """A mask of the picture, of any size: a PIL image of mode L or 1, or (height, width) in [0, 1]; shares count."""
    words: str | None = None
    """Words of the prompt, wherever they stand in it; empty: none of them."""

    def __post_init__(self) -> None:
        if self.strength is None and self.time is None and self.where is None and self.words is None:
            raise UserError("A Steer must have a `strength` or a limit (`time`, `where`, `words`), got neither.")
        if self.strength is not None and not math.isfinite(self.strength):
            raise UserError(f"`strength` must be a finite number, got {self.strength}.")
        if self.time is not None and not (len(self.time) == 2 and 0 <= self.time[0] < self.time[1] <= 1):
            raise UserError(f"`time` must be (from, to) with 0 <= from < to <= 1, got {self.time}.")
        if self.words and not self.words.strip():
            raise UserError(f"`words` must be some of the prompt's words, or empty for none, got {self.words!r}.")
        _ = self.mask

    @property
    def names(self) -> Sequence[str] | None:
        """`atoms` as a list."""
        return [self.atoms] if isinstance(self.atoms, str) else self.atoms

    @functools.cached_property
    def mask(self) -> Float[Tensor, "height width"] | None:
        """`where` as numbers in [0, 1]."""
        if self.where is None:
            return None
        return mask_shares(self.where, "where")


@contextmanager
def steered(pipe: Any, steers: Sequence[Steer], ranked: Sequence[Atom], adapter: str = "default") -> Iterator[None]:
    """Inside, the adapter's atoms (`ranked`, all of them) are multiplied by what each of the steers says.

    Words are sought in the prompts that the pipeline encoded last, not in negative ones. Raises UserError on atoms
    that are not there and, when prompts are encoded, on one without the words.
    """
    if not steers:
        yield
        return
    backbone, model, layers = backbone_of(pipe), denoiser(pipe), atom_layers(pipe, adapter)
    plan: dict[str, list[tuple[int, Tensor | None]]] = {}
    for number, steer in enumerate(steers):
        for path, chosen in _chosen(steer.names, ranked).items():
            plan.setdefault(path, []).append((number, None if chosen.all() else chosen))
    # Inside another steering, whose hook runs first, this one multiplies what that one has set.
    inner = {path for path in plan if adapter in layers[path].steering}

    def before_forward(_: nn.Module, args: Any, given: dict[str, Any]) -> None:
        heard = backbone.heard(unwrap(model), named(unwrap(model), args, given))
        factors = [_factor(steer, heard, backbone, spelled) for steer in steers]
        for path, parts in plan.items():
            value: Any = layers[path].steering[adapter] if path in inner else 1
            for number, chosen in parts:
                factor = factors[number](path)
                value = value * (factor if chosen is None else torch.where(chosen.to(factor.device), factor, 1))
            layers[path].steering[adapter] = value

    with _listening(pipe, backbone, {steer.words for steer in steers if steer.words is not None}) as spelled:
        handle = model.register_forward_pre_hook(before_forward, with_kwargs=True)
        try:
            for path in plan.keys() - inner:
                layers[path].steering[adapter] = layers[path].atom_strength[adapter].new_ones(1, 1, 1)
            yield
        finally:
            handle.remove()
            for path in plan.keys() - inner:
                layers[path].steering.pop(adapter, None)


def _chosen(names: Sequence[str] | None, ranked: Sequence[Atom]) -> dict[str, Bool[Tensor, " n_atoms"]]:
    """Which atoms are meant, by site."""
    sizes = Counter(atom.path for atom in ranked)
    found: dict[str, Tensor] = {}
    for atom in ranked if names is None else [a for name in names for a in _named(name, ranked)]:
        found.setdefault(atom.path, torch.zeros(sizes[atom.path], dtype=torch.bool))[atom.row] = True
    return found


def is_named(name: str, ranked: Sequence[Atom]) -> bool:
    """Whether some of these atoms, or a site of theirs, are of that name."""
    try:
        return bool(_named(name, ranked))
    except UserError:
        return False


def _named(name: str, ranked: Sequence[Atom]) -> list[Atom]:
    """The atom of that name or label, or all of that site."""
    named = "[" in name or any(name == a.label for a in ranked)
    return [find(ranked, name)] if named else at_site(ranked, name)


def _factor(
    steer: Steer, heard: Heard, backbone: Backbone, spelled: Callable[..., Tensor]
) -> Callable[[str], Float[Tensor, "#rows #positions 1"]]:
    """For this forward, by site: 1 where the steer says nothing, else its strength as far as its limits hold."""
    within, beyond = (1, 0) if steer.strength is None else (steer.strength, 1)
    time = torch.ones(1, 1, device=heard.s.device)
    if steer.time is not None:
        s = heard.s.unsqueeze(1)
        time = ((s > steer.time[0] - heard.slack) & (s < steer.time[1] + heard.slack)).float()
    picture = None if steer.mask is None else F.adaptive_avg_pool2d(steer.mask[None], heard.grid).flatten(1).to(time)
    text = None if steer.words is None else spelled(steer.words, heard.conditioning[backbone.gate_input])

    def at(site: str) -> Tensor:
        if picture is None and text is None:
            return (beyond * (1 - time) + within * time).unsqueeze(-1)
        factor, layout = time.new_ones(()), backbone.layout(site, heard.conditioning, heard.grid)
        own = None if picture is None or not layout.image.any() else layout.resample(picture, heard.grid)
        # Without any words, what fills prompts up is silent too.
        said = layout.real & ~layout.image if steer.words else ~layout.image
        for values, here in ((own, layout.image), (text, said)):
            if values is not None:
                nth = (here.cumsum(1) - 1).clamp(min=0)  # a row's k-th value is for its k-th position here
                values = F.pad(values, (0, max(0, int(nth.max()) + 1 - values.shape[1])))
                share = time * values.expand(len(here), -1).gather(1, nth)
                factor = torch.where(here, beyond * (1 - share) + within * share, factor)
        return factor.unsqueeze(-1)

    return at


@contextmanager
def _listening(pipe: Any, backbone: Backbone, words: set[str]) -> Iterator[Callable[[str, Embeds], Tensor]]:
    """Gives (words, embeddings) -> 1 at the tokens that spell them (rows, tokens), in prompts encoded inside."""
    spoken: dict[str, list[list[int]]] = {"": []}  # no words

    def hear(prompts: list[str]) -> None:
        for said in words - {""}:
            spoken[said] = [word_tokens(backbone.readings(pipe, prompt), said) for prompt in prompts]

    def spelled(said: str, embeds: Embeds) -> Tensor:
        known = spoken.get(said, [])
        found = embeds[0].new_zeros(len(embeds), 1 + max((k for at in known for k in at), default=0))
        for row, prompt in enumerate(which(embeds, "words") if said else []):
            if prompt >= 0:
                found[row, known[prompt]] = 1
        return found

    with listening(pipe, hear) as which:
        yield spelled


@contextmanager
def unheard(pipe: Any) -> Iterator[None]:
    """Inside, prompts that the pipeline encodes are those of no picture."""
    outermost = vars(pipe).pop("encode_prompt", None)
    try:
        yield
    finally:
        if outermost is not None:
            pipe.encode_prompt = outermost


@contextmanager
def listening(pipe: Any, hear: Callable[[list[str]], None]) -> Iterator[Callable[[Embeds, str], list[int]]]:
    """Inside, `hear` gets the prompts of each call of the pipeline. Gives which of them each row of embeddings is.

    A denoiser gets embeddings only: by them a row is known; the branch without words is -1. Negative prompts are not
    heard: a family that encodes them by themselves does so after the prompts and before any forward. What `hear` itself
    lets the pipeline encode is heard by nobody, as is what `unheard` covers. `field` is what an error names.
    """
    said: list[str] = []
    # A family may encode its prompts by parts, of different widths: which are looked up by is the gate's input.
    known: dict[int, Embeds] = {}
    used = False

    def listen(prompts: list[str], found: Any) -> None:
        nonlocal said, used
        if used or not known:
            said, used = [], False
            known.clear()
            with unheard(pipe):
                hear(prompts)
            said = prompts
        if prompts == said:
            known[found[0][0].shape[-1]] = found[0]

    def which(embeds: Embeds, field: str) -> list[int]:
        nonlocal used
        first = not used and not READING.get()
        used = used or first
        spoken = known.get(embeds[0].shape[-1])
        if spoken is None:
            raise UserError(f"`{field}` needs the prompt's text: let the pipeline encode it inside.")
        rows = [next((n for n, prompt in enumerate(spoken) if torch.equal(one, prompt)), -1) for one in embeds]
        if first and max(rows) < 0:
            raise UserError(f"`{field}` heard {said} last, of which no picture was painted. Paint again.")
        return [row * len(said) // len(spoken) for row in rows]

    with encoding(pipe, listen):
        yield which
