"""What a run needs before its first step: pictures as latents, prompts as conditioning, unrelated pictures."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from atomtune.backbones import Backbone, Conditioning, denoiser, spelling
from atomtune.backbones.base import default_of
from atomtune.data.cache import Cache
from atomtune.data.folder import Sample, Scan, scan
from atomtune.data.prompts import split_held_out, unrelated_prompts
from atomtune.data.views import Size, View, nearest, sizes, view_of
from atomtune.errors import UserError, hushed
from atomtune.files import key
from atomtune.training.encode import Bucket, Encoder, counting
from atomtune.training.options import TrainOptions
from atomtune.training.processes import launched

VIEWS = 8
"""Views of each picture, at most, that are cut at random."""
SAMPLES = 4
"""Captions that validation pictures are painted of, where no prompts are given."""
SHORT = 20
"""Captions of so many words reach the model whole."""
LONG = 40
"""Letters that no word has."""


class Item(NamedTuple):
    """A place in an epoch."""

    bucket: int
    place: int
    """Which of the bucket's pictures."""
    turn: int
    """The number of its view in the first epoch; the next epoch shows the next."""


SIDE = 1024
"""Of a pipeline that does not say what it paints by default, such as Z-Image's."""


@dataclass(frozen=True)
class Material:
    """Everything a step reads, on the model's device."""

    captions: tuple[str, ...]
    latents: Tensor
    """All pictures, whole and square."""
    conditioning: Conditioning
    masks: Tensor
    """Share of each picture token on the subject: from the user's masks, or where the base is surprised."""
    weights: Tensor | None
    """What each place of the latents weighs in the task, with one channel. None: all the same."""
    buckets: tuple[Bucket, ...]
    """What batches are made of."""
    items: tuple[Item, ...]
    """What an epoch shows."""
    wordless: Conditioning
    """One row: no words."""
    unrelated_captions: tuple[str, ...]
    unrelated_latents: Tensor
    unrelated_conditioning: Conditioning
    of_class: Bool[Tensor, " unrelated"]
    """Which of the unrelated pictures show the concept's class."""
    gate_concept: Conditioning
    """Prompts that must open the gate."""
    gate_unrelated: Conditioning
    """Prompts that must shut it, for training."""
    gate_held_out: Conditioning
    """The same, kept for calibration."""
    scan: Scan
    beside: str
    """Stands for the unrelated pictures and prompts, as they were given."""
    said: tuple[str, ...]
    """What the user should know of all this."""

    @property
    def far(self) -> Int[Tensor, " rows"]:
        """Unrelated pictures that do not show the concept's class; all of them where all do."""
        rows = (~self.of_class).nonzero().flatten()
        return rows if len(rows) else torch.arange(len(self.of_class))


def prepare(
    pipe: Any, backbone: Backbone, data: Path, options: TrainOptions, run: Path, base_key: str | None = None
) -> Material:
    """Scan the data and encode it; what is slow is cached beside the run, by content, item by item.

    `base_key` is `Encoder`'s.
    """
    found, added = triggered(scan(data, **options.scanning), options)
    samples, captions = found.samples, tuple(sample.caption for sample in found.samples)
    check_concept(captions, options)
    check_masks(samples, options)
    square = (side_of(pipe, options),) * 2
    fitted = fitted_sizes(pipe, samples, options)
    own = own_unrelated(options)
    kept, held_out = without_concept(pipe, options)
    encoder = Encoder(pipe, backbone, Cache(run.parent / ".cache"), base_key)
    painted = pictured(captions, kept, options)
    pictures = encoder.paint(painted, square, options.seed + 1_000_000)
    near = len(class_prompts(captions, options))
    of_class = torch.tensor(
        [mentions(sample.caption, options.class_noun) for sample in own] + [at < near for at in range(len(painted))]
    )
    unrelated_captions = spoken((*(sample.caption for sample in own), *painted))
    conditioning = encoder.words(captions)

    def bucket(size: Size, rows: tuple[int, ...], views: list[list[View]]) -> Bucket:
        unrelated = [*(encoder.latents(sample, size) for sample in own), *encoder.painted(pictures, size)]
        return encoder.bucket(samples, rows, size, views, conditioning, torch.cat(unrelated), options.mask_loss)

    views = views_of(samples, options)
    every = tuple(range(len(samples)))
    rows_of = {size: tuple(row for row in every if fitted[row] == size) for size in fitted}
    buckets = tuple(bucket(size, rows, views) for size, rows in rows_of.items())
    whole = buckets[0] if list(rows_of) == [square] else bucket(square, every, views[:1])
    opening, shutting = gate_prompts(captions, (*kept, *(sample.caption for sample in own)), options)
    return Material(
        captions=captions,
        latents=whole.latents[0],
        conditioning=conditioning,
        masks=whole.masks[0],
        weights=None if whole.weights is None else whole.weights[0],
        buckets=buckets,
        items=_items(buckets, samples),
        wordless=encoder.words(("",)),
        unrelated_captions=unrelated_captions,
        unrelated_latents=whole.unrelated_latents,
        unrelated_conditioning=encoder.words(unrelated_captions),
        of_class=of_class,
        gate_concept=encoder.prompts(opening) if options.gated else {},
        gate_unrelated=encoder.prompts(shutting) if options.gated else {},
        gate_held_out=encoder.prompts(("", *held_out)) if options.gated else {},
        scan=found,
        beside=key(*(text for sample in own for text in (sample.digest, sample.caption)), "", *kept, "", *held_out),
        said=(*added, *_told(samples, buckets, options), *_told_lost(encoder, (*samples, *own))),
    )


def check_masks(samples: Sequence[Sample], options: TrainOptions) -> None:
    """Raises UserError where the loss is to be masked, and nothing says where."""
    if not options.mask_loss:
        return
    if not any(sample.mask or sample.clear for sample in samples):
        raise UserError("`mask_loss` needs masks (NAME.mask.png beside a picture) or transparency: there are none.")
    for sample in samples:
        counting(sample)


def triggered(found: Scan, options: TrainOptions) -> tuple[Scan, tuple[str, ...]]:
    """(the scan, with the concept's name in front of captions that lack it if that is asked for, what to say of it)."""
    if not options.trigger:
        return found, ()

    def named(sample: Sample) -> Sample:
        if mentions(sample.caption, options.concept):
            return sample
        source = f"{sample.caption_source}, {options.concept!r} put in front"
        return dataclasses.replace(sample, caption=f"{options.concept}, {sample.caption}", caption_source=source)

    samples = tuple(map(named, found.samples))
    lacking = sum(new is not old for new, old in zip(samples, found.samples, strict=True))
    said = f"{options.concept!r} put in front of the {lacking} of {len(samples)} captions that lack it"
    return dataclasses.replace(found, samples=samples), (said,) if lacking else ()


def fitted_sizes(pipe: Any, samples: Sequence[Sample], options: TrainOptions) -> list[Size]:
    """The size that each picture is brought to."""
    side = side_of(pipe, options)
    among = sizes(side, unit_of(pipe)) if options.buckets else ((side, side),)
    return [nearest(sample.width, sample.height, among) for sample in samples]


def lost_words(encode: Callable[[str], Conditioning], caption: str) -> str:
    """The words at a caption's end that reach no part of the model: without them the conditioning is the same."""
    words, space = caption.split(), " "
    if any(len(word) > LONG for word in words):  # of a script without spaces, or tags with commas alone
        words, space = list(space.join(words)), ""
    whole = encode(space.join(words))

    def enough(number: int) -> bool:
        part = encode(space.join(words[:number]))
        return all(_same(part[name], value) for name, value in whole.items())

    if not words or not enough(len(words) - 1):
        return ""
    least, most = 0, len(words) - 1
    while least < most:
        middle = (least + most) // 2
        least, most = (least, middle) if enough(middle) else (middle + 1, most)
    return space.join(words[most:])


def _same(one: Tensor | list[Tensor], other: Tensor | list[Tensor]) -> bool:
    """Whether two parts of a conditioning are equal; some families keep a list, a prompt each."""
    pair = [value if isinstance(value, list) else [value] for value in (one, other)]
    return all(torch.equal(*values) for values in zip(*pair, strict=True))


def unlogged() -> AbstractContextManager[None]:
    """Inside, the libraries do not say at every encoding that a prompt is too long."""
    return hushed("transformers", "diffusers")


def cut_off(encode: Callable[[str], Conditioning], samples: Sequence[Sample]) -> dict[int, str]:
    """The words lost from captions that are longer than the base reads, by the number of the sample."""
    long = (number for number, sample in enumerate(samples) if _may_be_cut(sample.caption))
    with unlogged():
        found = {number: lost_words(encode, samples[number].caption) for number in long}
    return {number: lost for number, lost in found.items() if lost}


def _may_be_cut(caption: str) -> bool:
    """Whether it has more tokens than a few: of words, of letters beside ASCII, or of tags without spaces."""
    beside = sum(not letter.isascii() for letter in caption)
    return max(len(caption.split()), beside, len(caption) // 5) > SHORT


def _told_lost(encoder: Encoder, samples: Sequence[Sample]) -> Iterator[str]:
    for number, lost in cut_off(lambda text: encoder.words((text,)), samples).items():
        yield f"warning: the caption of {samples[number].path} is longer than the base reads; lost: {lost}"


def _told(samples: Sequence[Sample], buckets: Sequence[Bucket], options: TrainOptions) -> Iterator[str]:
    clear = sum(sample.clear for sample in samples)
    if clear:
        yield f"{clear} of {len(samples)} pictures are partly transparent: white lies under them"
    if options.mask_loss:
        masked = sum(sample.mask is not None for sample in samples)
        alpha = sum(sample.clear and sample.mask is None for sample in samples)
        whole = len(samples) - masked - alpha
        yield f"masked loss: {masked} pictures by their mask, {alpha} by their transparency, {whole} count whole"
    if options.gate and options.concept is None:
        yield "warning: without --concept there is no prompt gate: what is learned may show in every picture"
    if options.buckets:
        yield "sizes: " + ", ".join(f"{len(b.rows)} x {b.size[0]}x{b.size[1]}" for b in buckets)


def own_unrelated(options: TrainOptions) -> tuple[Sample, ...]:
    """The user's regularization pictures. Raises UserError where one of them names the concept."""
    if options.unrelated_data is None:
        return ()
    shared = f"a {options.class_noun}" if options.class_noun else None
    own = scan(options.unrelated_data, **options.scanning | {"caption": shared}).samples
    named = [sample.caption for sample in own if mentions(sample.caption, options.concept)]
    if named:
        raise UserError(
            f"`unrelated_data` must not name the concept, but {len(named)} of {len(own)} captions do, "
            f"such as {named[0]!r}."
        )
    return tuple(sample for sample in own for _ in range(sample.repeats))


def views_of(samples: Sequence[Sample], options: TrainOptions) -> list[list[View]]:
    """Every picture's views, the whole pictures first; no more than there are epochs to show them, or two."""
    most = VIEWS if options.crop else 2 if options.flip else 1
    seen = options.steps * options.grad_accumulation * options.batch_size * launched()
    # In a single epoch some are shown whole, others cut.
    number = min(most, max(2, -(-seen // sum(sample.repeats for sample in samples))))
    how: dict[str, Any] = {"crop": options.crop, "flip": options.flip, "seed": options.seed}
    return [[view_of(sample.digest, n, **how) for sample in samples] for n in range(number)]


def _items(buckets: Sequence[Bucket], samples: Sequence[Sample]) -> tuple[Item, ...]:
    """Every picture as often as it is repeated, in the samples' order."""
    found = []
    for number, bucket in enumerate(buckets):
        for place, row in enumerate(bucket.rows):
            first = int(samples[row].digest[:8], 16)
            found += [(row, Item(number, place, first + copy)) for copy in range(samples[row].repeats)]
    return tuple(item for _, item in sorted(found))


def side_of(pipe: Any, options: TrainOptions) -> int:
    """Side of the square pictures, in pixels. Raises UserError on one that the base can't have."""
    side = default_side(pipe) if options.resolution is None else options.resolution
    if side % unit_of(pipe):
        raise UserError(f"`resolution` must be a multiple of {unit_of(pipe)} pixels for this base, got {side}.")
    return side


def unit_of(pipe: Any) -> int:
    """What the sides of all pictures are multiples of, in pixels."""
    return 2 * int(pipe.vae_scale_factor)


def default_side(pipe: Any) -> int:
    """The side, in pixels, that the pipeline paints when it is not told one."""
    own = default_of(pipe, "height")
    if isinstance(own, int):
        return own
    config: Any = denoiser(pipe).config
    size = getattr(pipe, "default_sample_size", None) or getattr(config, "sample_size", None)
    return int(size * pipe.vae_scale_factor) if size else SIDE


def unrelated_list(pipe: Any, options: TrainOptions) -> tuple[str, ...]:
    """Unrelated prompts: the user's file, or the base folder's unrelated.txt, or the shipped list."""
    path = options.unrelated
    if path is None:
        beside = Path(str(getattr(pipe, "name_or_path", "") or "")) / "unrelated.txt"
        if not beside.is_file():
            return unrelated_prompts()
        path = beside
    try:
        lines = tuple(ln.strip() for ln in path.read_text(encoding="utf-8-sig").splitlines() if ln.strip())
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"`unrelated` can't be read: {error}.") from error
    if len(lines) < 5:
        raise UserError(f"`unrelated` must hold at least 5 prompts, one a line; {path} has {len(lines)}.")
    return lines


def without_concept(pipe: Any, options: TrainOptions) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Unrelated prompts to train on, and some held out. Raises UserError where all of them name the concept."""
    kept, held_out = (
        tuple(p for p in part if not mentions(p, options.concept))
        for part in split_held_out(unrelated_list(pipe, options))
    )
    if not kept or not held_out:
        raise UserError("`unrelated` must hold prompts without the concept; all of them name it.")
    return kept, held_out


def pictured(captions: tuple[str, ...], unrelated: tuple[str, ...], options: TrainOptions) -> tuple[str, ...]:
    """The prompts of the base's own pictures: those of the class, then unrelated ones."""
    return (*class_prompts(captions, options), *unrelated)[: options.unrelated_pictures]


def class_prompts(captions: tuple[str, ...], options: TrainOptions) -> tuple[str, ...]:
    """A quarter of the prompts: captions that say the class noun where they said the concept's name."""
    name, noun, number = options.concept, options.class_noun, options.unrelated_pictures
    near = [replaced(c, name, noun) for c in captions if mentions(c, name)] if name and noun else []
    # With few captions each is painted several times, every time from another noise.
    return tuple((near * number)[: number // 4])


def spoken(painted: tuple[str, ...]) -> tuple[str, ...]:
    """What stands beside the base's pictures: their prompts, and for the last eighth, at least one, no words.

    Guidance leans on what the model paints without words.
    """
    mute = -(-len(painted) // 8) if len(painted) > 1 else 0
    return painted[: len(painted) - mute] + ("",) * mute


def gate_prompts(
    captions: tuple[str, ...], unrelated: tuple[str, ...], options: TrainOptions
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Prompts that must open the gate, and prompts that must shut it.

    Opening: the captions, and the concept's name alone and beside other words. Shutting: unrelated prompts,
    no words at all, and the captions with the name taken out or replaced by the class noun.
    """
    name, noun = options.concept or "", options.class_noun
    beside = tuple(f"{p}, {name}" for p in unrelated[::4]) + tuple(f"{name}, {p}" for p in unrelated[1::4])
    opening = (*dict.fromkeys(captions), name, f"a {name}", f"a picture of {name}", *beside)
    without = tuple(" ".join(replaced(c, name, "").split()) for c in captions)
    instead = tuple(replaced(c, name, noun) for c in captions) + (noun, f"a {noun}") if noun else ()
    shutting = ("", *without, *instead, *unrelated)
    return opening, tuple(dict.fromkeys(shutting))


def replaced(text: str, name: str, by: str) -> str:
    """The text with the name replaced wherever it stands."""
    return spelling(name).sub(lambda _: by, text)


def mentions(text: str, name: str | None) -> bool:
    """Whether a text says a name, in whole words."""
    return name is not None and spelling(name).search(text) is not None


def check_concept(captions: tuple[str, ...], options: TrainOptions) -> None:
    """Raises UserError where the gate is to learn a name that not every caption says."""
    if not options.gated:
        return
    missing = [c for c in captions if not mentions(c, options.concept)]
    if missing:
        raise UserError(
            f"`concept` must stand in every caption, but {len(missing)} of {len(captions)} lack "
            f"{options.concept!r}, such as {missing[0]!r}. Mend the captions, pass --trigger, or train with --no-gate."
        )
