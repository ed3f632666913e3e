"""Every instrument gives the same numbers in a batch of 1 and of 8, compiled or not, and on an adapter read again.

And all atoms off is the base, on again the adapted, bit for bit, wherever the dial is.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pipelines import CAPTIONS

import atomtune
from atomtune import atoms as at
from atomtune.adapter import Adapter
from atomtune.backbones import backbone_of
from atomtune.editing.sweep import blended
from atomtune.lora import grams
from atomtune.measure import code_maps, maps, painting, regions
from atomtune.measure.edits import alignment
from atomtune.steering import Steer
from atomtune.tuner import AtomConfig, atom_layers, attach, base_only, prompt_gate, remove_adapter

SITES = ["layers.0.attn.to_q", "noise_refiner.0.attn.to_q", "context_refiner.0.attn.to_q"]
PROMPTS = [*CAPTIONS, "a kite", "kite", "a red kite", "a kite and a house"]
HALF = Image.fromarray(np.uint8(255 * np.tile(np.repeat([1, 0], 32), (64, 1))))


@pytest.fixture(scope="module")
def adapter(pipes: dict[str, Any]) -> Iterator[Adapter]:
    """Random atoms behind a gate that stands half open, measured."""
    pipe = pipes["lumina2"]
    torch.manual_seed(0)
    config = {"gate_input": "encoder_hidden_states", "gate_mask": "encoder_attention_mask", "gate_dim": 192}
    attach(pipe.transformer, AtomConfig(n_atoms=4, target_modules=SITES, threshold=0.5, **config))
    for layer in atom_layers(pipe).values():
        torch.nn.init.normal_(layer.dictionary("default").atoms, std=1.0)
    prompt_gate(pipe.transformer).bias.data.fill_(0.0)  # type: ignore[union-attr]
    yield Adapter(pipe, measured(pipe))
    remove_adapter(pipe)


def given(pipe: Any) -> tuple[Any, ...]:
    """Eight noises as pictures, and their prompts."""
    latents = torch.randn(8, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    return pipe, backbone_of(pipe), latents, backbone_of(pipe).encode_prompts(pipe, PROMPTS)


def measured(pipe: Any) -> at.Statistics:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("atomtune.effect.PASSES", 4)
        return at.measure(*given(pipe), times=(0.3, 0.7), repeats=1)


def paint(adapter: Adapter, batch: int, **dials: Any) -> torch.Tensor:
    with adapter.using(**dials):
        pictures = atomtune.generate(
            adapter.pipe, PROMPTS, steps=1, guidance=3.0, batch_size=batch, output_type="latent"
        )
    return torch.stack(pictures)  # type: ignore[arg-type]


def blend(adapter: Adapter, batch: int) -> torch.Tensor:
    with blended(adapter.pipe, 0.3):
        return paint(adapter, batch)


def shares(adapter: Adapter, batch: int) -> Any:
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    rows = regions.attribution(adapter.pipe, adapter.atoms.ranked, picture, PROMPTS[0], HALF, top=20, batch_size=batch)
    return [list(row.values())[1:] for row in sorted(rows, key=lambda row: row["atom"])]


def curve(adapter: Adapter, batch: int) -> Any:
    call = {"densities": (0.25, 0.5), "seeds": (0, 1), "num_inference_steps": 1, "batch_size": batch}
    return [list(r.values()) for r in painting.density_curve(adapter.pipe, adapter.atoms.ranked, PROMPTS[:2], **call)]


def strip(adapter: Adapter, batch: int) -> Any:
    call = {"num_inference_steps": 1, "batch_size": batch}
    return painting.strips(adapter.pipe, adapter.atoms.ranked, ["L0[1]"], PROMPTS[0], **call)["L0[1]"][0]


SEEING: dict[str, Callable[[Adapter, int], Any]] = {
    "measure": lambda a, n: [s[k] for s in measured(a.pipe).values() for k in ("effect", "mean", "maximum")],
    "fired": lambda a, n: list(maps.fired(*given(a.pipe), a.atoms.ranked, batch_size=n)[0].values()),
    "code_maps": lambda a, n: list(code_maps(*given(a.pipe), a.atoms.ranked, batch_size=n).values()),
    "attribution": shares,
    "alignment": lambda a, n: alignment(a.pipe, given(a.pipe)[2], PROMPTS, PROMPTS[0], batch_size=n),
    "strips": strip,
    "density_curve": curve,
    "export": lambda a, n: list(grams(a, PROMPTS, steps=1, batch_size=n).values()),
    "generate": paint,
    "density by site": lambda a, n: paint(a, n, density={"L0": 0.5, "noise_refiner.0.attn.to_q": 0.25}),
    "purity": lambda a, n: paint(a, n, purity=0.5, strength=0.8),
    "steer": lambda a, n: paint(a, n, steer=[Steer("L0", 3, where=HALF), Steer(time=(0.2, 1)), Steer(words="kite")]),
    "blended": blend,
}
"""Instruments that see or paint, each with the size of its batches."""


def numbers(name: str, adapter: Adapter, batch: int) -> list[np.ndarray]:
    found = SEEING[name](adapter, batch)
    return [np.asarray(one, np.float64) for one in (found if isinstance(found, list) else [found])]


def close(some: list[np.ndarray], others: list[np.ndarray]) -> bool:
    size = max(float(np.nanmax(np.abs(one))) for one in some)
    pairs = zip(some, others, strict=True)
    return all(np.allclose(a, b, atol=1e-4 * max(1.0, size), rtol=1e-3, equal_nan=True) for a, b in pairs)


@pytest.fixture(autouse=True)
def kites(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """A steer on words needs them in every prompt."""
    if "steer" in request.node.name:
        monkeypatch.setattr(f"{__name__}.PROMPTS", [p if "kite" in p else f"{p} and a kite" for p in PROMPTS])


@pytest.mark.parametrize("name", SEEING)
def test_a_batch_changes_nothing(adapter: Adapter, name: str) -> None:
    assert close(numbers(name, adapter, 8), numbers(name, adapter, 1))


@pytest.mark.parametrize("name", SEEING)
def test_an_adapter_read_again_is_the_same_bit_for_bit(adapter: Adapter, name: str, tmp_path: Path) -> None:
    before = numbers(name, adapter, 8)
    adapter.save(tmp_path / "saved")
    adapter.remove()
    again = atomtune.load(adapter.pipe, tmp_path / "saved")
    assert all(np.array_equal(a, b, equal_nan=True) for a, b in zip(before, numbers(name, again, 8), strict=True))


# One of each way into a forward: a recorder, plain, rows with strengths of their own, hooks on layers and on the model.
@pytest.mark.usefixtures("shapes_unchecked")
@pytest.mark.parametrize("warm", [False, True], ids=["fresh", "warm"])
@pytest.mark.parametrize("name", ["fired", "alignment", "strips", "export", "generate", "blended"])
def test_compiled_it_is_the_same(adapter: Adapter, name: str, warm: bool) -> None:
    """Also where a graph was made for these shapes before the instrument puts its hooks in."""
    torch._dynamo.reset()
    expected, plain = numbers(name, adapter, 8), adapter.pipe.transformer
    adapter.pipe.transformer = torch.compile(plain, backend="eager")
    try:
        if warm:
            for rows in (5, 8):
                paint(adapter, rows)
        assert close(expected, numbers(name, adapter, 8))
    finally:
        adapter.pipe.transformer = plain


def test_off_is_the_base_and_on_again_the_adapted_bit_for_bit(adapter: Adapter) -> None:
    on = paint(adapter, 8)
    with base_only(adapter.pipe):
        base = paint(adapter, 8)
    sites = {f"L{a.site}" for a in adapter.atoms}
    off: list[dict[str, Any]] = [
        {"density": 0.0},
        {"density": dict.fromkeys(sites, 0.0)},
        {"strength": 0.0},
        {"atoms": {a.name: 0.0 for a in adapter.atoms}},
        {"steer": [Steer(strength=0.0)]},
    ]
    for dials in off:
        assert torch.equal(paint(adapter, 8, **dials), base), dials
        assert torch.equal(paint(adapter, 8), on)
    assert not torch.equal(on, base)
    assert torch.equal(paint(adapter, 8, density=dict.fromkeys(sites, 1.0), purity=0.0), on)
    with blended(adapter.pipe, 0.0):
        assert torch.equal(paint(adapter, 8), base)
    with blended(adapter.pipe, 1.0):
        assert torch.equal(paint(adapter, 8), on)
