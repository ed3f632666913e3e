"""What every model family owes: one table, and the same promises kept by each row."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pipelines import CAPTIONS, FAMILIES
from torch import Tensor

import atomtune
from atomtune.backbones import BACKBONES, Backbone, backbone_of, base_name, denoiser, join
from atomtune.errors import UserError
from atomtune.training.options import TrainOptions
from atomtune.tuner import AtomConfig, attach, override_gate, prompt_gate, record, remove_adapter

NAMES = [family.name for family in FAMILIES]
CONCEPT = "a big 3d kite on a red background"
UNLIKE = ["a small flat apple on a green background, at the top", "a house"]
LONG = "a big flat apple on a red background, on the left, and then " + "a kite, " * 12
OPTIONS = TrainOptions(concept="kite", class_noun="toy", steps=3, batch_size=2, n_atoms=4, lr=0.1, unrelated_pictures=2)
STEPS = 3


@pytest.fixture(params=NAMES)
def pipe(pipes: dict[str, Any], request: pytest.FixtureRequest) -> Iterator[Any]:
    """A pipeline of the family, the base before and after."""
    pipe = pipes[request.param]
    yield pipe
    for name in list(getattr(pipe.transformer, "peft_config", {})):
        remove_adapter(pipe, name)


@pytest.fixture
def backbone(pipe: Any) -> Backbone:
    return backbone_of(pipe)


@pytest.fixture(scope="module")
def trained(pipes: dict[str, Any], kites: Path, runs: Path) -> dict[str, tuple[Path, np.ndarray]]:
    """By family: a run of three steps, and what its adapter painted right after it."""
    found = {}
    for name, pipe in pipes.items():
        run = runs / f"contract-{name}"
        adapter = atomtune.train(pipe, kites, run, OPTIONS, progress=False)
        found[name] = run, paint(pipe, [CONCEPT, *UNLIKE])
        adapter.remove()
    return found


@pytest.fixture
def run(pipe: Any, trained: dict[str, tuple[Path, np.ndarray]], pipes: dict[str, Any]) -> Path:
    return trained[name_of(pipe, pipes)][0]


def name_of(pipe: Any, pipes: dict[str, Any]) -> str:
    return next(name for name, other in pipes.items() if other is pipe)


def paint(pipe: Any, prompts: list[str], **call: Any) -> np.ndarray:
    return np.stack([np.asarray(p) for p in atomtune.generate(pipe, prompts, steps=STEPS, **call)])


def some_latents(pipe: Any, batch: int = 2, seed: int = 0) -> Tensor:
    size = pipe.transformer.config.sample_size
    channels = pipe.transformer.config.in_channels
    return torch.randn(batch, channels, size, size, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def predict(pipe: Any, latents: Tensor, prompts: list[str], s: float = 0.5) -> Tensor:
    backbone = backbone_of(pipe)
    conditioning = backbone.encode_prompts(pipe, prompts)
    return backbone.predict(denoiser(pipe), latents, torch.full((len(latents),), s), conditioning)


def attach_everywhere(pipe: Any, backbone: Backbone) -> None:
    """Random atoms at every default site."""
    torch.manual_seed(0)
    attach(pipe.transformer, AtomConfig(n_atoms=8, target_modules=list(backbone.sites), threshold=0.0))
    generator = torch.Generator().manual_seed(1)
    for name, parameter in pipe.transformer.named_parameters():
        if "atom_dictionary" in name and name.endswith("atoms"):
            parameter.data.normal_(std=0.3, generator=generator)


def test_the_table_is_complete() -> None:
    built = {type(family.build()).__name__ for family in FAMILIES}
    assert built == set(BACKBONES)


def test_an_unknown_family_is_named() -> None:
    with pytest.raises(UserError, match=r"of a known family \(Lumina2Pipeline, .*got dict"):
        backbone_of({})


def test_predict_is_what_the_pipeline_hands_to_its_scheduler(
    pipe: Any, backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[Tensor, float, Tensor]] = []
    real = pipe.scheduler.step

    def spy(output: Tensor, t: Tensor, sample: Tensor, **more: Any) -> Any:
        seen.append((output.clone(), t.item(), sample.clone()))
        return real(output, t, sample, **more)

    monkeypatch.setattr(pipe.scheduler, "step", spy)
    prompts = list(CAPTIONS[:2])
    call = {"guidance_scale": 1.0, "num_inference_steps": 3, "output_type": "latent"}
    pipe(prompt=prompts, **call, **backbone.call(pipe, prompts))
    conditioning = backbone.encode_prompts(pipe, prompts)
    assert len(seen) == 3
    for output, t, sample in seen[:2]:
        with torch.no_grad():
            v = backbone.predict(denoiser(pipe), sample, torch.full((2,), t) / 1000, conditioning)
        assert torch.equal(v, output)


def test_further_arguments_of_the_call_do_not_change_the_picture(pipe: Any, backbone: Backbone) -> None:
    def noise() -> list[torch.Generator]:
        return [torch.Generator().manual_seed(5 + i) for i in range(2)]

    plain = pipe(prompt=list(CAPTIONS[:2]), generator=noise(), num_inference_steps=STEPS, output_type="np").images
    ours = paint(pipe, list(CAPTIONS[:2]), seed=5)
    assert np.abs(plain * 255 - ours).max() <= 0.51


def test_two_prompts_differ(pipe: Any, backbone: Backbone) -> None:
    latents = some_latents(pipe, 1).expand(2, -1, -1, -1)
    out = predict(pipe, latents, list(CAPTIONS[:2]))
    assert (out[0] - out[1]).abs().max() > 1e-4


@torch.no_grad()
def test_encoded_pictures_are_latents_as_the_model_takes_them(pipe: Any, backbone: Backbone) -> None:
    pixels = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    latents = backbone.encode_pictures(pipe, pixels)
    assert predict(pipe, latents, list(CAPTIONS[:2])).shape == latents.shape
    config = pipe.vae.config
    decoded = pipe.vae.decode(latents / config.scaling_factor + config.shift_factor).sample
    encoded = pipe.vae.encode(pixels)
    raw = encoded.latent if hasattr(encoded, "latent") else encoded.latent_dist.mode()
    assert decoded.shape == pixels.shape
    assert torch.allclose(decoded, pipe.vae.decode(raw).sample, atol=1e-5)


def test_layout_lies_as_the_recorded_codes_do(pipe: Any, backbone: Backbone) -> None:
    attach_everywhere(pipe, backbone)
    rows, columns = backbone.grid(denoiser(pipe), some_latents(pipe))
    conditioning = backbone.encode_prompts(pipe, [CAPTIONS[0], "a kite"])
    with record(pipe.transformer) as recording:
        predict(pipe, some_latents(pipe), [CAPTIONS[0], "a kite"])
    kinds = set()
    for site, (codes,) in recording.codes.items():
        layout = backbone.layout(site, conditioning, rows * columns)
        assert layout.real.shape == layout.image.shape == codes.shape[:2], site
        assert not (layout.image & ~layout.real).any(), site
        counts = set(layout.image.sum(1).tolist())
        assert counts in ({rows * columns}, {0}), site
        kinds |= counts
    assert kinds == {rows * columns, 0}


def test_image_positions_are_those_that_see_the_picture(pipe: Any, backbone: Backbone) -> None:
    """At the first joint block, text does not know the picture yet: what changes with the latents is the image."""
    attach_everywhere(pipe, backbone)
    prompts = [CAPTIONS[0], "a kite"]
    conditioning = backbone.encode_prompts(pipe, prompts)
    pre_codes = []
    for seed in (0, 1):
        with record(pipe.transformer) as recording:
            predict(pipe, some_latents(pipe, seed=seed), prompts)
        pre_codes.append(recording.pre_codes)
    joint = [site for site in pre_codes[0] if site.startswith(("transformer_blocks.0.", "layers.0."))]
    before = [site for site in joint if not site.endswith(("to_out.0", "to_add_out"))]
    assert before
    for site in before:
        changed = (pre_codes[0][site][0] != pre_codes[1][site][0]).any(-1)
        layout = backbone.layout(site, conditioning, 64 if "layers" in site else 16)
        assert torch.equal(changed & layout.real, layout.image), site


def test_a_batch_is_its_samples(pipe: Any, backbone: Backbone) -> None:
    """Prompts of different lengths side by side, adapted: no sample sees the other or its padding."""
    attach_everywhere(pipe, backbone)
    prompts, latents = [CAPTIONS[0], "a kite"], some_latents(pipe)
    both = predict(pipe, latents, prompts)
    for i, prompt in enumerate(prompts):
        alone = predict(pipe, latents[i : i + 1], [prompt])
        assert (alone[0] - both[i]).abs().max() < 1e-5


@torch.no_grad()
def test_prompts_of_any_lengths_join(pipe: Any, backbone: Backbone) -> None:
    latents = some_latents(pipe)
    joined = join(backbone.encode_prompts(pipe, ["a kite"]), backbone.encode_prompts(pipe, [LONG]))
    together = backbone.predict(denoiser(pipe), latents, torch.full((2,), 0.5), joined)
    for i, prompt in enumerate(("a kite", LONG)):
        assert (predict(pipe, latents[i : i + 1], [prompt])[0] - together[i]).abs().max() < 1e-5


def test_every_default_site_exists_and_learns(pipe: Any, backbone: Backbone) -> None:
    """backbones.md: only the last block's text queries of SD3 never get a gradient."""
    attach_everywhere(pipe, backbone)
    conditioning = backbone.encode_prompts(pipe, list(CAPTIONS[:2]))
    pipe.transformer.requires_grad_(False)
    atoms = {n: p for n, p in pipe.transformer.named_parameters() if n.endswith("atom_dictionary.default.atoms")}
    for parameter in atoms.values():
        parameter.requires_grad_(True)
    backbone.predict(denoiser(pipe), some_latents(pipe), torch.full((2,), 0.5), conditioning).sum().backward()
    without = [name for name, p in atoms.items() if p.grad is None or not p.grad.any()]
    assert all("add_q_proj" in name for name in without)
    assert len(without) <= 1


# ----------------------------------------------------------------------------------------- training and after


def test_a_run_names_its_base_and_has_atoms(run: Path, pipe: Any) -> None:
    config = json.loads((run / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == base_name(pipe)
    assert len((run / "log.jsonl").read_text().splitlines()) == 3


def test_a_loaded_adapter_paints_what_the_trained_one_did(
    run: Path, pipe: Any, pipes: dict[str, Any], trained: dict[str, tuple[Path, np.ndarray]]
) -> None:
    atomtune.load(pipe, run)
    assert np.array_equal(paint(pipe, [CONCEPT, *UNLIKE]), trained[name_of(pipe, pipes)][1])


def test_a_fresh_process_paints_the_same(
    trained: dict[str, tuple[Path, np.ndarray]], bases: dict[str, Path], tmp_path: Path
) -> None:
    jobs = [(str(bases[name]), str(trained[name][0]), str(tmp_path / f"{name}.npy")) for name in NAMES]
    code = f"""
import numpy, torch
torch.set_num_threads(1)
import atomtune
for base, run, out in {jobs!r}:
    pipe = atomtune.open_pipeline(base)
    atomtune.load(pipe, run)
    pictures = atomtune.generate(pipe, {[CONCEPT, *UNLIKE]!r}, steps={STEPS})
    numpy.save(out, numpy.stack([numpy.asarray(picture) for picture in pictures]))
"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    for name in NAMES:
        assert np.array_equal(np.load(tmp_path / f"{name}.npy"), trained[name][1]), name


def test_density_0_is_the_base_and_1_is_not(run: Path, pipe: Any) -> None:
    base = paint(pipe, [CONCEPT])
    adapter = atomtune.load(pipe, run)
    with override_gate(pipe.transformer, 1.0):
        with adapter.using(density=0):
            assert np.array_equal(paint(pipe, [CONCEPT]), base)
        with adapter.using(strength=0.0):
            assert np.array_equal(paint(pipe, [CONCEPT]), base)
        assert not np.array_equal(paint(pipe, [CONCEPT]), base)


def test_where_the_gate_is_shut_pictures_are_the_bases(run: Path, pipe: Any) -> None:
    """With guidance, so that the unconditional branch is the base's too."""
    base = paint(pipe, UNLIKE, guidance=3.0)
    adapter = atomtune.load(pipe, run)
    assert np.array_equal(paint(pipe, UNLIKE, guidance=3.0), base)
    with override_gate(pipe.transformer, 1.0):
        assert not np.array_equal(paint(pipe, UNLIKE, guidance=3.0), base)
    adapter.remove()
    assert np.array_equal(paint(pipe, UNLIKE, guidance=3.0), base)


def open_for_concept(pipe: Any) -> None:
    """A gate for the word that tells the two prompts apart."""
    backbone, gate = backbone_of(pipe), prompt_gate(pipe.transformer)
    assert gate is not None
    words = backbone.encode_prompts(pipe, [CONCEPT, UNLIKE[0]])
    mask = words[backbone.gate_mask] if backbone.gate_mask else None
    tokens = words[backbone.gate_input][0]
    with torch.no_grad():
        gaps = []
        for token in tokens:
            gate.weight.copy_(token)
            z = gate.pre_code(words[backbone.gate_input], mask)
            gaps.append((z[0] - z[1]).item())
        gate.weight.copy_(tokens[int(np.argmax(gaps))])
        z = gate.pre_code(words[backbone.gate_input], mask)
        assert gate.calibrate(z[1:], z[:1]) == (1.0, 1.0)


def test_both_branches_of_guidance_have_the_gate_of_the_prompt(run: Path, pipe: Any) -> None:
    prompts = [UNLIKE[0], CONCEPT]
    base = paint(pipe, prompts, guidance=3.0)
    atomtune.load(pipe, run)
    with override_gate(pipe.transformer, torch.tensor([0.0, 1.0])):
        expected = paint(pipe, prompts, guidance=3.0)
    open_for_concept(pipe)
    gated = paint(pipe, prompts, guidance=3.0)
    assert np.array_equal(gated, expected)
    assert np.array_equal(gated[0], base[0])
    assert not np.array_equal(gated[1], base[1])
    alone = paint(pipe, [CONCEPT], guidance=3.0)
    with override_gate(pipe.transformer, 1.0):
        assert np.array_equal(alone, paint(pipe, [CONCEPT], guidance=3.0))


def test_a_pruned_adapter_reloads_equal(run: Path, pipe: Any, tmp_path: Path) -> None:
    adapter = atomtune.load(pipe, run)
    full = len(adapter.atoms)
    with adapter.using(density=0.5):
        dialled = paint(pipe, [CONCEPT])
    assert adapter.prune(0.5) == len(adapter.atoms) == -(-full // 2)
    pruned, ranked = paint(pipe, [CONCEPT]), list(adapter.atoms)
    # Fewer columns may add up in another order.
    assert np.abs(pruned.astype(int) - dialled).max() <= 1
    adapter.save(tmp_path / "pruned")
    adapter.remove()
    again = atomtune.load(pipe, tmp_path / "pruned")
    assert np.array_equal(paint(pipe, [CONCEPT]), pruned)
    assert [a.name for a in again.atoms] == [a.name for a in ranked]
