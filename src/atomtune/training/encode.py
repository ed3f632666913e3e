"""A pipeline's encoders behind a cache whose keys hold all that an entry depends on."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial, reduce
from itertools import chain
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor, nn

from atomtune.backbones import Backbone, Conditioning, denoiser, join, select
from atomtune.data.cache import Cache, key
from atomtune.data.folder import Sample
from atomtune.data.picture import SCANNED, alpha_mask, fit, open_mask, to_tensor
from atomtune.data.sheet import seen
from atomtune.data.views import WHOLE, Size, View
from atomtune.effect import spread
from atomtune.errors import UserError
from atomtune.sampling import generate
from atomtune.training.masks import surprise
from atomtune.tuner import fingerprint
from atomtune.tuner.model import site_name

FORMAT = "2"
"""Raised when what an entry holds changes for the same key."""
PAINTED_AT_ONCE = 8
"""Unrelated pictures that are painted, and kept, together."""
PIXELS_AT_ONCE = 2**20
"""Pixels of unrelated pictures that are encoded, and kept, together."""


@dataclass(frozen=True)
class Bucket:
    """Pictures of one size, each in several views, the whole picture first."""

    size: Size
    rows: tuple[int, ...]
    """Which pictures, as numbers of captions."""
    latents: Float[Tensor, "views rows ..."]
    masks: Float[Tensor, "views rows tokens"]
    """Share of each token on the subject."""
    weights: Float[Tensor, "views rows ..."] | None
    """What each place of the latents weighs in the task, with one channel. None: all the same."""
    unrelated_latents: Tensor


class Encoder:
    """Pictures and prompts as the model takes them, on its device.

    `base_key` is the denoiser's `weights_key`, where it can't be taken any more: the processes share it.
    """

    def __init__(self, pipe: Any, backbone: Backbone, cache: Cache, base_key: str | None = None) -> None:
        self.pipe, self.backbone, self.cache, self.device = pipe, backbone, cache, pipe.vae.device
        texts = [part for name, part in sorted(pipe.components.items()) if name.startswith("text_encoder")]
        self.vae = key(FORMAT, weights_key(pipe.vae), str(denoiser(pipe).dtype))
        spelled = [part for name, part in sorted(pipe.components.items()) if name.startswith("tokenizer")]
        parts = (*(weights_key(part) for part in texts if part is not None), *map(_spelling, spelled))
        self.text = key(FORMAT, type(pipe).__name__, str(_settings(pipe)), *parts)
        painter = str(_settings(pipe.scheduler))
        self.base = key(base_key or weights_key(denoiser(pipe)), painter, self.vae, self.text)

    def words(self, prompts: Sequence[str]) -> Conditioning:
        """Prompts, each encoded by itself and kept."""
        return _joined([self._kept(prompt) for prompt in prompts])

    def _kept(self, prompt: str) -> Conditioning:
        """A prompt's conditioning; the cache holds tensors, so that a list of one is kept as its tensor."""

        def make() -> dict[str, Tensor]:
            found = self._conditioning([prompt]).items()
            lists = {f"{name}.0": value[0] for name, value in found if isinstance(value, list)}
            return lists | {name: value for name, value in found if not isinstance(value, list)}

        kept = {name: value.to(self.device) for name, value in self.cache.get(key(self.text, prompt), make).items()}
        return {name.removesuffix(".0"): [value] if name.endswith(".0") else value for name, value in kept.items()}

    def prompts(self, prompts: Sequence[str]) -> Conditioning:
        """Prompts of the gate, not kept: there are more of them than of anything else."""
        return _joined([self._conditioning(list(prompts[i : i + 32])) for i in range(0, len(prompts), 32)])

    def _conditioning(self, prompts: list[str]) -> Conditioning:
        found = self.backbone.encode_prompts(self.pipe, prompts)
        for value in found.values():
            for i, row in enumerate(value):
                _check_finite(row, f"the prompt {prompts[i]!r}")
        return found

    def latents(self, sample: Sample, size: Size, view: View = WHOLE) -> Tensor:
        """One picture, a batch of its own."""

        def make() -> dict[str, Tensor]:
            with sample.path.open("rb") as file:
                if hashlib.sha256(file.read()).hexdigest() != sample.digest:
                    raise UserError(f"{sample.path} has changed since it was scanned. Start again.")
            return self._encoded(to_tensor(seen(sample, size, view))[None], str(sample.path))

        return self.cache.get(key(self.vae, sample.digest, str(size), str(view)), make)["latents"].to(self.device)

    def paint(self, prompts: Sequence[str], size: Size, seed: int) -> list[Image.Image]:
        """The base's own pictures, each from a noise of its own."""
        call = self.backbone.call(self.pipe, list(prompts)) if prompts else {}
        pictures: list[Image.Image] = []
        for start in range(0, len(prompts), PAINTED_AT_ONCE):
            some, first = prompts[start : start + PAINTED_AT_ONCE], seed + start
            entry = key(self.base, str(size), str(first), str(call), *some)
            kept = self.cache.get(entry, partial(self._painted, some, size, first, call))["pixels"]
            pictures += [Image.fromarray(pixels.numpy()) for pixels in kept]
        return pictures

    def _painted(self, prompts: Sequence[str], size: Size, seed: int, call: dict[str, Any]) -> dict[str, Tensor]:
        pictures = generate(self.pipe, prompts, seed=seed, width=size[0], height=size[1], **call)
        return {"pixels": torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures]))}

    def painted(self, pictures: Sequence[Image.Image], size: Size) -> list[Tensor]:
        """Pictures that the base has painted, in batches."""
        many = max(1, PIXELS_AT_ONCE // (size[0] * size[1]))
        found = []
        for start in range(0, len(pictures), many):
            pixels = torch.stack([to_tensor(fit(picture, size)) for picture in pictures[start : start + many]])
            entry = key(self.vae, str(tuple(pixels.shape)), pixels.numpy().tobytes())
            make = partial(self._encoded, pixels, "a picture that the base has painted")
            found.append(self.cache.get(entry, make)["latents"].to(self.device))
        return found

    def _encoded(self, pixels: Tensor, name: str) -> dict[str, Tensor]:
        latents = self.backbone.encode_pictures(self.pipe, pixels.to(self.device))
        _check_finite(latents, name)
        return {"latents": latents.contiguous()}

    def bucket(
        self,
        samples: Sequence[Sample],
        rows: tuple[int, ...],
        size: Size,
        views: Sequence[Sequence[View]],
        words: Conditioning,
        unrelated: Tensor,
        mask_loss: float,
    ) -> Bucket:
        """Some of the samples at a size; `views` and `words` are those of all samples."""
        mine = [samples[row] for row in rows]
        turns = [[turn[row] for row in rows] for turn in views]
        latents = torch.stack(
            [torch.cat([self.latents(s, size, v) for s, v in zip(mine, turn, strict=True)]) for turn in turns]
        )
        grid = self.backbone.grid(denoiser(self.pipe), latents[0])
        masks = self._subjects(mine, latents[0], select(words, torch.tensor(rows)), size, turns, grid)
        weights = None
        if mask_loss:
            shares = [1 - mask_loss * (1 - _shares([counting(s) for s in mine], size, turn, grid)) for turn in turns]
            weights = torch.stack([spread(share, latents[0], grid) for share in shares]).to(self.device)
        return Bucket(size, rows, latents, masks.to(self.device), weights, unrelated)

    def _subjects(
        self,
        samples: Sequence[Sample],
        latents: Tensor,
        words: Conditioning,
        size: Size,
        turns: Sequence[Sequence[View]],
        grid: tuple[int, int],
    ) -> Float[Tensor, "views rows tokens"]:
        """By the user's masks, and where a picture has none, where the base is surprised."""
        given = torch.tensor([sample.mask is not None for sample in samples])
        files = [
            Image.new("L", size) if sample.mask is None else open_mask(sample.mask, max_pixels=SCANNED)  # black anyway
            for sample in samples
        ]
        own = torch.stack([_shares(files, size, turn, grid) for turn in turns])
        if given.all():
            return own

        def guess() -> dict[str, Tensor]:
            return {"masks": surprise(denoiser(self.pipe), self.backbone, latents, words)}

        pairs = [part for sample in samples for part in (sample.digest, sample.caption)]
        whole = self.cache.get(key(self.base, "surprise", str(size), *pairs), guess)["masks"]
        # What a view shows of the guess is cut from the guess as from a picture.
        pictures = [Image.fromarray((mask.view(grid) * 255).byte().numpy()) for mask in whole]
        guessed = torch.stack([whole, *(_shares(pictures, (grid[1], grid[0]), turn, grid) for turn in turns[1:])])
        return torch.where(given[:, None], own, guessed)


def counting(sample: Sample) -> Image.Image:
    """What counts in the task, white: by the sample's mask, else its transparency, else all of it.

    Raises UserError where nothing would.
    """
    if sample.mask is None and not sample.clear:
        return Image.new("L", (sample.width, sample.height), 255)
    counts = (
        alpha_mask(sample.path, max_pixels=SCANNED)
        if sample.mask is None
        else open_mask(sample.mask, max_pixels=SCANNED)
    )
    if counts is None or not counts.getbbox():
        raise UserError(f"{sample.mask or sample.path} marks nothing as the subject: it is black, or clear, all over.")
    return counts


def _shares(
    pictures: Sequence[Image.Image], size: Size, views: Sequence[View], grid: tuple[int, int]
) -> Float[Tensor, "rows tokens"]:
    """How white each token's place is, in [0, 1]."""
    fitted = [fit(picture.convert("RGB"), size, view) for picture, view in zip(pictures, views, strict=True)]
    pixels = torch.stack([to_tensor(picture)[0] for picture in fitted])
    return nn.functional.adaptive_avg_pool2d((pixels[:, None] + 1) / 2, grid).flatten(1).clamp(0, 1)


def _check_finite(encoded: Tensor, name: str) -> None:
    if not encoded.isfinite().all():
        kind = str(encoded.dtype).removeprefix("torch.")
        raise UserError(
            f"`dtype` must be one in which the base can encode: in {kind}, {name} becomes NaN or infinite, through no "
            "fault of its own. Give --dtype float32 or, if it was that, another base."
        )


def _joined(parts: Sequence[Conditioning]) -> Conditioning:
    """Many as one; some at a time, so that no row is copied more than a few dozen times."""
    while len(parts) > 1:
        parts = [reduce(join, parts[i : i + 32]) for i in range(0, len(parts), 32)]
    return parts[0]


def weights_key(model: nn.Module) -> str:
    """A hash of a network's weights, of its settings, and of the precision, quantized or not, that it has.

    What others have added to it counts, such as a LoRA or a token of its own; atoms do not.
    """
    every = chain(model.named_parameters(), model.named_buffers())
    named = {site_name(name): tensor for name, tensor in every if "atom_" not in name}
    tensors = sorted(named.items(), key=lambda pair: pair[0])
    kinds = {f"{type(tensor).__name__} {tensor.dtype}" for _, tensor in tensors}
    sums = [f"{name} {_sum(tensor.detach())}" for name, tensor in tensors]
    return key(fingerprint(model), str(_settings(model)), *sorted(kinds), *sums)


def _sum(tensor: Tensor) -> int | None:
    """Of all of a tensor's bits, as whole numbers: a change of any value changes it. None where they can't be read."""
    if type(tensor.data) is not Tensor or tensor.is_meta or tensor.is_complex():
        return None
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return int(tensor.contiguous().view(-1).view(kinds[tensor.element_size()]).sum(dtype=torch.int64))


def _settings(part: Any) -> dict[str, Any]:
    """Of a pipeline or a part of it; where it was loaded from, and by which version, changes nothing."""
    settings = dict(part.config) if isinstance(getattr(part, "config", None), dict) else {}
    return {name: value for name, value in settings.items() if not name.startswith("_")}


def _spelling(tokenizer: Any) -> str:
    """What a tokenizer makes of texts: its words, and its template of a chat."""
    return "" if tokenizer is None else key(str(sorted(tokenizer.get_vocab().items())), str(tokenizer.chat_template))
