"""Pictures from prompts, each with a seed of its own, so that batches change nothing."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from atomtune.backbones import backbone_of, call_arguments, denoiser, encoding
from atomtune.errors import UserError
from atomtune.tuner import hold_gate


def generate(
    pipe: Any,
    prompts: str | Sequence[str],
    *,
    seed: int | Sequence[int] = 0,
    batch_size: int = 8,
    steps: int | None = None,
    guidance: float | None = None,
    **call: Any,
) -> list[Image.Image]:
    """One picture a prompt; prompt i starts from the noise of seed + i (of seed[i]), whatever its batch.

    `steps`, `guidance` None: the pipeline's defaults. Other arguments go to the pipeline; lists of
    prompts, such as negative ones, have one a prompt. Prompt gates are held as `prompt_gates` does.
    """
    prompts = [prompts] if isinstance(prompts, str) else prompts
    seeds = range(seed, seed + len(prompts)) if isinstance(seed, int) else seed
    call |= named(steps, guidance)
    return [picture for batch in batches(pipe, prompts, seeds, batch_size, **call) for picture in batch]


def named(steps: int | None, guidance: float | None) -> dict[str, Any]:
    """Steps of the sampler and its guidance as pipelines call them; a None is the pipeline's own."""
    given = {"num_inference_steps": steps, "guidance_scale": guidance}
    return {name: value for name, value in given.items() if value is not None}


def batches(
    pipe: Any,
    prompts: Sequence[str],
    seeds: Sequence[int],
    batch_size: int,
    around: Callable[[slice], AbstractContextManager[Any]] = lambda rows: nullcontext(),
    **call: Any,
) -> Iterator[Any]:
    """What the pipeline gives of each batch of prompts, each with its own seed; `around(rows)` holds meanwhile."""
    check(prompts, seeds, batch_size)
    steps, guidance = call.get("num_inference_steps"), call.get("guidance_scale")
    if steps is not None and steps < 1:
        raise UserError(f"`steps` must be at least 1, got {steps}.")
    if guidance is not None and not math.isfinite(guidance):
        raise UserError(f"`guidance` must be a finite number, got {guidance}.")
    arguments = call_arguments(pipe, prompts, call)
    for start in range(0, len(prompts), batch_size):
        rows = slice(start, start + batch_size)
        noises = [torch.Generator().manual_seed(seed) for seed in seeds[rows]]
        with prompt_gates(pipe, prompts[rows]), around(rows):
            own = arguments | of_rows({name: arguments[name] for name in call}, rows, len(prompts))
            images = pipe(prompt=list(prompts[rows]), generator=noises, **own).images
        yield images


def check(prompts: Sequence[str], seeds: Sequence[int], batch_size: int) -> None:
    """Raises UserError on no prompts, on seeds that are not one a prompt, and on a batch of nothing."""
    if not prompts:
        raise UserError("`prompts` must name at least one picture, got none.")
    if batch_size < 1:
        raise UserError(f"`batch_size` must be at least 1, got {batch_size}.")
    if len(seeds) != len(prompts):
        raise UserError(f"`seed` must be one number, or one a prompt ({len(prompts)}), got {len(seeds)}.")
    for seed in seeds:
        if not 0 <= seed < 2**63:
            raise UserError(f"`seed` must be at least 0 and below 2**63, got {seed}.")


def of_rows(call: Mapping[str, Any], rows: slice, number: int) -> dict[str, Any]:
    """Arguments of a call as some of its prompts have them: of those with one entry a prompt, theirs."""
    return {name: value[rows] if _one_a_prompt(name, value, number) else value for name, value in call.items()}


def _one_a_prompt(name: str, value: Any, number: int) -> bool:
    """Whether an argument of the pipeline, such as negative_prompt, has one entry a prompt."""
    own = "prompt" in name or name == "latents"
    return own and isinstance(value, list | tuple | torch.Tensor) and len(value) == number


@contextmanager
def prompt_gates(pipe: Any, prompts: str | Sequence[str]) -> Iterator[None]:
    """Inside, each picture has its prompt's gate, in the branch without words too: of these prompts, in order.

    Guidance steps away from the branch without words. By itself that branch's gate is shut, so that guidance leads
    away from a base that does not know the concept: about twice as far as it should (LOG.md).
    """
    told = [prompts] if isinstance(prompts, str) else list(prompts)
    with (
        hold_gate(denoiser(pipe), lambda: backbone_of(pipe).encode_prompts(pipe, told)) as spread,
        # A pipeline that paints several pictures of a prompt repeats what it encoded.
        encoding(pipe, lambda prompts, found: spread(max(1, len(found[0]) // len(prompts)))),
    ):
        yield


def save_pictures(pictures: Sequence[Image.Image], folder: Path, seed: int) -> list[Path]:
    """Write pictures as `seed-number.png`; never over another picture."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        paths = []
        for i, picture in enumerate(pictures):
            stem, turn = f"{seed + i:05d}", 1
            path = folder / f"{stem}.png"
            while path.exists():
                turn += 1
                path = folder / f"{stem}-{turn}.png"
            picture.save(path)
            paths.append(path)
    except OSError as error:
        raise UserError(f"`out` can't be written: {error}.") from error
    return paths
