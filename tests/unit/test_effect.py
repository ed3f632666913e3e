"""The effect of an atom, against differences of whole predictions."""

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from pipelines import random_atoms

from atomtune import effect
from atomtune.atoms import strengths
from atomtune.backbones import backbone_of, select
from atomtune.effect import effects, spread

SITES = ["layers.0.attn.to_q", "layers.0.attn.to_v", "context_refiner.0.attn.to_k"]
PROMPTS = ["a big flat kite on a red background, on the left", "a kite"]
STEP = 1e-2


@pytest.fixture
def pipe(shared: Any) -> Iterator[Any]:
    with random_atoms(shared, n_atoms=3, target_modules=SITES, threshold=0.0):
        yield shared


def test_it_is_the_change_of_the_prediction(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(effect, "PASSES", 120)
    model, backbone = pipe.transformer, backbone_of(pipe)
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    conditioning = backbone.encode_prompts(pipe, PROMPTS)
    rows, columns = backbone.grid(model, latents)
    masks = torch.zeros(2, rows * columns)
    masks[:, : rows * columns // 4] = 1
    found = effects(model, backbone, latents, conditioning, masks, times=(0.5,))

    # The same passes, each atom turned up and down a little.
    generator = torch.Generator().manual_seed(0)
    exact = {name: {s: torch.zeros(3) for s in found} for name in ("effect", "effect_beside")}
    for row in range(2):
        for _ in range(4):
            noise = torch.randn(latents[:1].shape, generator=generator)
            x, given = 0.5 * latents[row : row + 1] + 0.5 * noise, select(conditioning, torch.tensor([row]))
            on = spread(masks[row : row + 1], x, (rows, columns)).expand_as(x)
            for site in found:
                for atom in range(3):
                    ends = []
                    for by in (1 + STEP, 1 - STEP):
                        value = torch.ones(3)
                        value[atom] = by
                        with torch.no_grad(), strengths(model, {site: value}):
                            ends.append(backbone.predict(model, x, torch.tensor([0.5]), given))
                    slope = ((ends[0] - ends[1]) / (2 * STEP)).square()
                    for name, region in (("effect", on), ("effect_beside", 1 - on)):
                        exact[name][site][atom] += (slope * region).sum() / region.sum() / 8
    for name, by_site in exact.items():
        mine = torch.cat([found[s][name] for s in found])
        true = torch.cat([by_site[s].sqrt() for s in found])
        assert torch.allclose(mine, true, rtol=0.35), name
        assert torch.corrcoef(torch.stack([mine, true]))[0, 1] > 0.97
        assert (mine.view(-1, 3)[:, 2] == 0).all()  # what never fires has no effect


def test_a_site_whose_output_is_thrown_away_has_no_effect(pipes: dict[str, Any]) -> None:
    """The last block of Qwen-Image makes words that nothing reads."""
    pipe = pipes["qwen_image"]
    last = len(pipe.transformer.transformer_blocks) - 1
    sites = [f"transformer_blocks.{last}.attn.to_q", f"transformer_blocks.{last}.attn.to_add_out"]
    with random_atoms(pipe, n_atoms=3, target_modules=sites, threshold=0.0):
        backbone = backbone_of(pipe)
        latents = backbone.encode_pictures(pipe, torch.zeros(1, 3, 64, 64))
        rows, columns = backbone.grid(pipe.transformer, latents)
        given = backbone.encode_prompts(pipe, PROMPTS[:1])
        found = effects(pipe.transformer, backbone, latents, given, torch.ones(1, rows * columns), times=(0.5,))
    assert found[sites[0]]["effect"].any()
    assert not found[sites[1]]["effect"].any()


@pytest.mark.parametrize("pictures", [1, 3, 8, 12, 20, 100])
def test_many_pictures_lie_evenly(pictures: int) -> None:
    rows = sorted({row for row, _ in effect._passes(pictures, (0.1, 0.3, 0.5, 0.7, 0.9))})
    assert len(rows) == min(8, pictures)
    gaps = [b - a for a, b in itertools.pairwise([*rows, pictures])]
    assert max(gaps) - min(gaps) <= 1


def test_the_adapter_is_left_as_it_was(pipe: Any) -> None:
    model, backbone = pipe.transformer, backbone_of(pipe)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    grid = backbone.grid(model, latents)
    masks = torch.ones(1, grid[0] * grid[1])
    with torch.no_grad():
        found = effects(model, backbone, latents, backbone.encode_prompts(pipe, PROMPTS[:1]), masks)
    assert not any(p.requires_grad or p.grad is not None for p in model.parameters())
    assert all((values["effect_beside"] == 0).all() for values in found.values())  # nothing lies beside
