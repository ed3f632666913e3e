"""What every model family owes: one table, and the same promises kept by each row."""

import copy
import json
import math
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pipelines import CAPTIONS, FAMILIES, SIZE, Family, Made
from torch import Tensor, nn

import atomtune
from atomtune.adapter import Adapter
from atomtune.atoms import measure
from atomtune.backbones import (
    BACKBONES,
    Backbone,
    backbone_of,
    base_name,
    call_arguments,
    denoiser,
    join,
    named,
    placed,
    token_texts,
    word_tokens,
)
from atomtune.backbones.base import denoiser_name
from atomtune.errors import UserError
from atomtune.steering import Steer
from atomtune.training.options import TrainOptions
from atomtune.tuner import (
    AtomConfig,
    atom_layers,
    attach,
    override_gate,
    prompt_gate,
    record,
    remove_adapter,
)

CONCEPT = "a big 3d kite on a red background"
UNLIKE = ["a small flat apple on a green background, at the top", "a house"]
LONG = "a big flat apple on a red background, on the left, and then " + "a kite, " * 12
OPTIONS = TrainOptions(
    concept="kite",
    class_noun="toy",
    steps=3,
    batch_size=2,
    n_atoms=4,
    lr=0.1,
    unrelated_pictures=2,
    resolution=64,
    data_start=True,
    inner=0.1,
)
STEPS = 2


@pytest.fixture(scope="module", params=FAMILIES, ids=lambda family: family.name)
def family(request: pytest.FixtureRequest) -> Family:
    """Tests of one family follow each other, so that its pipeline is made once."""
    return request.param


@pytest.fixture
def pipe(family: Family, pipes: dict[str, Any]) -> Iterator[Any]:
    """A pipeline of the family, the base before and after."""
    pipe = pipes[family.name]
    yield pipe
    for name in list(getattr(denoiser(pipe), "peft_config", {})):
        remove_adapter(pipe, name)


@pytest.fixture
def backbone(pipe: Any) -> Backbone:
    return backbone_of(pipe)


@pytest.fixture(scope="module")
def trained(pipes: dict[str, Any], kites: Path, runs: Path) -> dict[str, tuple[Path, np.ndarray]]:
    """By family: a run of three steps, and what its adapter painted right after it."""

    def train(name: str) -> tuple[Path, np.ndarray]:
        run, family = runs / f"contract-{name}", next(f for f in FAMILIES if f.name == name)
        # The base's own pictures, which gate and silence need, at two steps and not at fifty.
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("atomtune.training.encode.generate", partial(atomtune.generate, steps=STEPS))
            adapter = atomtune.train(pipes[name], kites, run, OPTIONS, progress=False)
        pictures = paint(pipes[name], family, [CONCEPT, *UNLIKE])
        adapter.remove()
        return run, pictures

    return Made(train)


@pytest.fixture
def run(family: Family, trained: dict[str, tuple[Path, np.ndarray]]) -> Path:
    return trained[family.name][0]


def paint(pipe: Any, family: Family, prompts: list[str], guided: bool = False, **call: Any) -> np.ndarray:
    """Pictures without guidance, or with it where the family has any."""
    how = dict(family.guided or family.plain if guided else family.plain)
    if "negative_prompt" in how:
        how["negative_prompt"] = [""] * len(prompts)
    return np.stack([np.asarray(p) for p in atomtune.generate(pipe, prompts, steps=STEPS, **SIZE, **how, **call)])


def some_latents(pipe: Any, batch: int = 2, seed: int = 0) -> Tensor:
    shape = backbone_of(pipe).encode_pictures(pipe, torch.zeros(1, 3, 64, 64)).shape[1:]
    return torch.randn(batch, *shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def predict(pipe: Any, latents: Tensor, prompts: list[str], s: float = 0.5) -> Tensor:
    backbone = backbone_of(pipe)
    conditioning = backbone.encode_prompts(pipe, prompts)
    return backbone.predict(denoiser(pipe), latents, torch.full((len(latents),), s), conditioning)


def attach_everywhere(pipe: Any, backbone: Backbone) -> None:
    """Random atoms at every default site."""
    torch.manual_seed(0)
    attach(denoiser(pipe), AtomConfig(n_atoms=8, target_modules=list(backbone.sites), threshold=0.0))
    generator = torch.Generator().manual_seed(1)
    for layer in atom_layers(pipe).values():
        layer.dictionary("default").atoms.data.normal_(std=0.3, generator=generator)


def as_latents(pipe: Any, packed: Tensor) -> Tensor:
    """What a pipeline hands to its scheduler, unpacked as the pipeline does it."""
    if packed.ndim == 4:
        return packed
    if hasattr(pipe, "_unpack_latents"):
        found = pipe._unpack_latents(packed, 64, 64, pipe.vae_scale_factor)
        return found[:, :, 0] if found.ndim == 5 else found
    return pipe._unpack_latents_with_ids(packed, pipe._prepare_latent_ids(some_latents(pipe, len(packed))))


def as_packed(pipe: Any, latents: Tensor) -> Tensor:
    """The inverse of `as_latents`."""
    if hasattr(pipe, "_unpack_latents"):
        return pipe._pack_latents(latents, *latents.shape)
    return pipe._pack_latents(latents) if hasattr(pipe, "_pack_latents") else latents


def test_the_table_is_complete(bases: dict[str, Path]) -> None:
    classes = [json.loads((bases[f.name] / "model_index.json").read_text())["_class_name"] for f in FAMILIES]
    assert sorted(classes) == sorted(BACKBONES)
    assert len({backbone.family for backbone in BACKBONES.values()}) == len(BACKBONES)


def test_an_unknown_family_is_named() -> None:
    with pytest.raises(UserError, match=r"of a known family \(AuraFlowPipeline, .*got dict"):
        backbone_of({})


def test_predict_is_what_the_pipeline_hands_to_its_scheduler(
    pipe: Any, family: Family, backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[Tensor, float, Tensor]] = []
    scheduler, real = pipe.scheduler, pipe.scheduler.step

    def spy(output: Tensor, t: Tensor, sample: Tensor, **more: Any) -> Any:
        # Euler's sampler scales what it gives to a model that predicts the noise.
        given = scheduler.scale_model_input(sample, t) if hasattr(scheduler, "scale_model_input") else sample
        seen.append((output.clone(), float(t), given.clone()))
        return real(output, t, sample, **more)

    monkeypatch.setattr(scheduler, "step", spy)
    prompts = list(CAPTIONS[:2])
    call = {"num_inference_steps": 3, "output_type": "latent", **SIZE, **family.plain}
    pipe(prompt=list(prompts), **call, **backbone.call(pipe, prompts))
    conditioning = backbone.encode_prompts(pipe, prompts)
    assert len(seen) >= 3
    for output, t, sample in seen[:2]:
        with torch.no_grad():
            found = backbone.predict(denoiser(pipe), as_latents(pipe, sample), torch.full((2,), t) / 1000, conditioning)
        assert torch.equal(found, as_latents(pipe, output))


def test_further_arguments_of_the_call_do_not_change_the_picture(pipe: Any, family: Family) -> None:
    def noise() -> list[torch.Generator]:
        return [torch.Generator().manual_seed(5 + i) for i in range(2)]

    call = {"num_inference_steps": STEPS, "output_type": "np", **SIZE, **family.plain, **family.call}
    plain = pipe(prompt=list(CAPTIONS[:2]), generator=noise(), **call).images
    ours = paint(pipe, family, list(CAPTIONS[:2]), seed=5)
    assert np.abs(plain * 255 - ours).max() <= 0.51


def test_two_prompts_differ(pipe: Any) -> None:
    out = predict(pipe, some_latents(pipe, 1).expand(2, -1, -1, -1), list(CAPTIONS[:2]))
    assert (out[0] - out[1]).abs().max() > 1e-4


@torch.no_grad()
def test_encoded_pictures_are_what_the_pipeline_decodes(
    pipe: Any, family: Family, backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its scheduler hands them on: the picture is what the autoencoder makes of its own latents."""
    pixels = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    latents = backbone.encode_pictures(pipe, pixels)
    assert predict(pipe, latents, [CAPTIONS[0]]).shape == latents.shape
    monkeypatch.setattr(pipe.scheduler, "step", lambda *_, **__: (as_packed(pipe, latents),))
    call = {"num_inference_steps": 2, "output_type": "pt", **SIZE, **family.plain}
    painted = pipe(prompt=[CAPTIONS[0]], **call, **backbone.call(pipe, [CAPTIONS[0]])).images
    video = family.name == "qwen_image"
    encoded = pipe.vae.encode(pixels[:, :, None] if video else pixels)
    raw = encoded.latent if hasattr(encoded, "latent") else encoded.latent_dist.mode()
    decoded = pipe.vae.decode(raw).sample
    expected = (decoded[:, :, 0] if video else decoded) / 2 + 0.5
    assert torch.allclose(torch.as_tensor(painted), expected.clamp(0, 1), atol=1e-5)


def test_layout_lies_as_the_recorded_codes_do(pipe: Any, backbone: Backbone) -> None:
    attach_everywhere(pipe, backbone)
    latents, prompts = some_latents(pipe), [CAPTIONS[0], "a kite"]
    grid, conditioning = backbone.grid(denoiser(pipe), latents), backbone.encode_prompts(pipe, prompts)
    with record(denoiser(pipe)) as recording:
        predict(pipe, latents, prompts)
    kinds = set()
    for site, (codes,) in recording.codes.items():
        codes, layout = placed(backbone, site, codes, conditioning, grid)
        assert layout.real.shape == layout.image.shape == codes.shape[:2], site
        assert not (layout.image & ~layout.real).any(), site
        counts = set(layout.image.sum(1).tolist())
        assert counts in ({math.prod(layout.grid)}, {0}), site
        kinds |= {kind for kind in ("image", "real") if (layout.image == (kind == "image")).any()}
        if layout.image.any():
            masks = torch.rand(2, math.prod(grid))
            assert layout.resample(masks, grid).shape == (2, math.prod(layout.grid))
    assert kinds == {"image", "real"} or backbone.family == "Qwen-Image"  # whose default sites are the picture's


def test_image_positions_are_those_that_see_the_picture(
    pipe: Any, family: Family, backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where text does not know the picture yet, what changes with the latents is the image, token by token."""
    model = denoiser(pipe)
    for name, parameter in model.named_parameters():
        if ".to_add_out." in name:  # else text knows the picture after the first block
            monkeypatch.setattr(parameter, "data", torch.zeros_like(parameter))
    attach_everywhere(pipe, backbone)
    for site, layer in atom_layers(pipe).items():
        if site.endswith(".to_add_out"):
            layer.dictionary("default").atoms.data.zero_()
    latents, prompts = some_latents(pipe), [CAPTIONS[0], "a kite"]
    (rows, columns), conditioning = backbone.grid(model, latents), backbone.encode_prompts(pipe, prompts)
    one_token = latents.clone()
    high, wide = latents.shape[-2] // rows, latents.shape[-1] // columns
    one_token[:, :, high : 2 * high, 2 * wide : 3 * wide] += 0.1
    pre_codes = []
    for x in (latents, some_latents(pipe, seed=1), one_token):
        with record(model) as recording:
            predict(pipe, x, prompts)
        pre_codes.append({site: seen for site, (seen,) in recording.pre_codes.items()})
    first, other, near = pre_codes
    sites = [s for s in first if s.startswith(family.first) and not s.endswith((".to_out.0", ".to_out", "add_out"))]
    assert sites
    pictured = 0
    for site in sites:
        layout = backbone.layout(site, conditioning, (rows, columns))
        assert torch.equal((first[site] != other[site]).any(-1) & layout.real, layout.image), site
        if layout.image.any() and site.startswith(family.first[0]) and "attn2" not in site:
            change = (first[site] - near[site]).abs().sum(-1)[layout.image].view(2, rows, columns)
            if hasattr(pipe, "unet"):  # whose convolutions spread it
                near_by = change[:, : rows // 2, : columns // 2].mean((1, 2))
                assert (near_by > 1.5 * change.mean((1, 2))).all(), site
            else:
                assert change.flatten(1).argmax(1).tolist() == [columns + 2] * 2, site
            pictured += 1
    assert pictured


def test_words_are_the_tokens_that_the_text_encoders_read(pipe: Any, family: Family, backbone: Backbone) -> None:
    prompt = "the kite, kites and a red  kite"
    read: dict[str, list[int]] = {}

    def listen(name: str, _: Any, args: Any, given: dict[str, Any]) -> None:
        read[name] = (args[0] if args else given["input_ids"])[0].tolist()

    handles = [
        getattr(pipe, name).register_forward_pre_hook(partial(listen, name), with_kwargs=True)
        for name in family.readers
    ]
    backbone.encode_prompts(pipe, [prompt])
    for handle in handles:
        handle.remove()
    readings, texts = backbone.readings(pipe, prompt), []
    readers = iter(family.readers)
    for reading in readings:
        own = [text for text, *_ in reading.tokens()]
        if reading.tokenizer is not None:
            ids = read[next(readers)]
            del ids[reading.cut]
            assert len(own) == len(ids) or not reading.padded
            assert own == [reading.tokenizer.decode([token]).strip() for token in ids[: len(own)]]
        texts += own
    assert texts == token_texts(readings)
    for words, spelled in (("kite", "kitekite"), ("RED kite", "redkite")):
        found = "".join(texts[at] for at in word_tokens(readings, words)).lower()
        assert "".join(filter(str.isalpha, found)) == spelled * len(family.readers)
    with pytest.raises(UserError, match=r"got .kit. for .the kite"):
        word_tokens(readings, "kit")


def test_a_forward_is_heard_as_it_was_meant(pipe: Any, backbone: Backbone) -> None:
    """Steering and the export to LoRA know a forward by its arguments alone."""
    model, latents = denoiser(pipe), some_latents(pipe)
    heard: list[Any] = []
    handle = model.register_forward_pre_hook(
        lambda module, args, given: heard.append(backbone.heard(module, named(module, args, given))), with_kwargs=True
    )
    predict(pipe, latents, list(CAPTIONS[:2]), s=0.3)
    handle.remove()
    (one,) = heard
    assert torch.allclose(one.s, torch.full((2,), 0.3))
    assert one.grid == backbone.grid(model, latents)
    attach_everywhere(pipe, backbone)
    conditioning = backbone.encode_prompts(pipe, list(CAPTIONS[:2]))
    for site in atom_layers(pipe):
        told, meant = (backbone.layout(site, c, one.grid) for c in (one.conditioning, conditioning))
        assert torch.equal(told.real, meant.real)
        assert torch.equal(told.image, meant.image)


def test_a_batch_is_its_samples(pipe: Any, backbone: Backbone) -> None:
    """Prompts of different lengths side by side, adapted: no sample sees the other or its padding."""
    attach_everywhere(pipe, backbone)
    prompts, latents = [CAPTIONS[0], "a kite"], some_latents(pipe)
    both = predict(pipe, latents, prompts)
    for i, prompt in enumerate(prompts):
        alone = predict(pipe, latents[i : i + 1], [prompt])
        assert (alone[0] - both[i]).abs().max() < 1e-5


@torch.no_grad()
def test_a_base_in_half_precision_predicts_the_same(pipe: Any, backbone: Backbone) -> None:
    latents, conditioning = some_latents(pipe), backbone.encode_prompts(pipe, list(CAPTIONS[:2]))
    s = torch.tensor([0.3, 0.7])
    x, _ = backbone.noised(latents, s, some_latents(pipe, seed=1))
    whole = backbone.predict(denoiser(pipe), x, s, conditioning)
    half = copy.deepcopy(denoiser(pipe)).bfloat16()
    told = {name: cast(value) for name, value in conditioning.items()}
    noised, target = backbone.noised(cast(latents), s, cast(some_latents(pipe, seed=1)))
    found = backbone.predict(half, noised, s, told)
    assert noised.dtype == target.dtype == found.dtype == torch.bfloat16
    assert (found - whole).abs().mean() < 0.1 * whole.abs().mean()


def test_latents_have_the_denoisers_precision(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The autoencoder is often kept in float32."""
    monkeypatch.setattr(pipe, denoiser_name(pipe), copy.deepcopy(denoiser(pipe)).bfloat16())
    assert backbone_of(pipe).encode_pictures(pipe, torch.zeros(1, 3, 64, 64)).dtype == torch.bfloat16


def cast(value: Any) -> Any:
    """Floats in half precision."""
    if isinstance(value, list):
        return [cast(one) for one in value]
    return value.bfloat16() if value.is_floating_point() else value


@torch.no_grad()
def test_prompts_of_any_lengths_join(pipe: Any, backbone: Backbone) -> None:
    latents = some_latents(pipe)
    joined = join(backbone.encode_prompts(pipe, ["a kite"]), backbone.encode_prompts(pipe, [LONG]))
    together = backbone.predict(denoiser(pipe), latents, torch.full((2,), 0.5), joined)
    for i, prompt in enumerate(("a kite", LONG)):
        assert (predict(pipe, latents[i : i + 1], [prompt])[0] - together[i]).abs().max() < 1e-5


def test_every_default_site_exists_and_learns(pipe: Any, family: Family, backbone: Backbone) -> None:
    attach_everywhere(pipe, backbone)
    conditioning = backbone.encode_prompts(pipe, list(CAPTIONS[:2]))
    denoiser(pipe).requires_grad_(False)
    atoms = {site: layer.dictionary("default").atoms.requires_grad_(True) for site, layer in atom_layers(pipe).items()}
    backbone.predict(denoiser(pipe), some_latents(pipe), torch.full((2,), 0.5), conditioning).sum().backward()
    without = [name for name, p in atoms.items() if p.grad is None or not p.grad.any()]
    assert all(name.endswith(family.mute) for name in without), without


@pytest.mark.parametrize("name", ["sd3", "hunyuan_dit", "sdxl"])
def test_sites_that_read_no_tokens_are_measured(name: str, pipes: dict[str, Any]) -> None:
    """They read the time or the pooled prompt, once a picture."""
    pipe, backbone = pipes[name], backbone_of(pipes[name])
    kinds = {
        "sd3": ("norm1.linear", "to_q"),
        "hunyuan_dit": ("norm1.linear", "to_q"),
        "sdxl": ("time_emb_proj", "to_q"),
    }
    attach(denoiser(pipe), AtomConfig(n_atoms=4, target_modules=list(kinds[name]), threshold=0.0))
    statistics = measure(
        denoiser(pipe), backbone, some_latents(pipe), backbone.encode_prompts(pipe, list(CAPTIONS[:2]))
    )
    steer = [Steer(strength=0.0)]
    with Adapter(pipe, statistics).using(steer=steer):
        predict(pipe, some_latents(pipe), list(CAPTIONS[:2]))
    remove_adapter(pipe)
    without = [site for site in statistics if site.endswith(kinds[name][0])]
    assert without
    for site in without:
        assert statistics[site]["density"].any()
        assert statistics[site]["purity"].isnan().all()


def test_a_negative_prompt_longer_than_the_prompts_is_whole(pipes: dict[str, Any]) -> None:
    """Lumina2 gets a text length just long enough."""
    pipe = pipes["lumina2"]
    call = {"guidance_scale": 20.0, "negative_prompt": [LONG], "num_inference_steps": STEPS, "output_type": "latent"}
    (whole,) = pipe(prompt=["a kite"], generator=torch.Generator().manual_seed(0), **call).images
    (ours,) = atomtune.generate(pipe, ["a kite"], **call)
    (cut,) = atomtune.generate(pipe, ["a kite"], max_sequence_length=32, **call)
    assert (ours - whole).abs().max() < 1e-4 < 1e-2 < (cut - whole).abs().max()


def test_checkpointing_is_refused_where_there_is_none(pipes: dict[str, Any], kites: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="must be off for HunyuanDiT"):
        atomtune.train(pipes["hunyuan_dit"], kites, tmp_path / "run", replace(OPTIONS, gradient_checkpointing=True))


# ----------------------------------------------------------------------------------------- training and after


def test_a_run_names_its_base_and_has_atoms(run: Path, pipe: Any) -> None:
    config = json.loads((run / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == base_name(pipe)
    assert len((run / "log.jsonl").read_text().splitlines()) == 3


def test_a_loaded_adapter_paints_what_the_trained_one_did(
    run: Path, pipe: Any, family: Family, trained: dict[str, tuple[Path, np.ndarray]]
) -> None:
    atomtune.load(pipe, run)
    assert np.array_equal(paint(pipe, family, [CONCEPT, *UNLIKE]), trained[family.name][1])


def test_a_fresh_process_paints_the_same(
    trained: dict[str, tuple[Path, np.ndarray]], bases: dict[str, Path], tmp_path: Path
) -> None:
    jobs = [
        (str(bases[f.name]), str(trained[f.name][0]), str(tmp_path / f"{f.name}.npy"), SIZE | f.plain) for f in FAMILIES
    ]
    code = f"""
import numpy, torch
torch.set_num_threads(1)
import atomtune
for base, run, out, call in {jobs!r}:
    pipe = atomtune.open_pipeline(base)
    atomtune.load(pipe, run)
    pictures = atomtune.generate(pipe, {[CONCEPT, *UNLIKE]!r}, steps={STEPS}, **call)
    numpy.save(out, numpy.stack([numpy.asarray(picture) for picture in pictures]))
"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    for family in FAMILIES:
        assert np.array_equal(np.load(tmp_path / f"{family.name}.npy"), trained[family.name][1]), family.name


def test_density_0_is_the_base_and_1_is_not(run: Path, pipe: Any, family: Family) -> None:
    base = paint(pipe, family, [CONCEPT])
    adapter = atomtune.load(pipe, run)
    with override_gate(denoiser(pipe), 1.0):
        with adapter.using(density=0):
            assert np.array_equal(paint(pipe, family, [CONCEPT]), base)
        with adapter.using(strength=0.0):
            assert np.array_equal(paint(pipe, family, [CONCEPT]), base)
        assert not np.array_equal(paint(pipe, family, [CONCEPT]), base)


def test_where_the_gate_is_shut_pictures_are_the_bases(run: Path, pipe: Any, family: Family) -> None:
    """With guidance, so that the unconditional branch is the base's too."""
    base = paint(pipe, family, UNLIKE, guided=True)
    adapter = atomtune.load(pipe, run)
    assert np.array_equal(paint(pipe, family, UNLIKE, guided=True), base)
    with override_gate(denoiser(pipe), 1.0):
        assert not np.array_equal(paint(pipe, family, UNLIKE, guided=True), base)
    adapter.remove()
    assert np.array_equal(paint(pipe, family, UNLIKE, guided=True), base)


def open_for_concept(pipe: Any) -> None:
    """A gate for the word that tells the two prompts apart."""
    backbone, gate = backbone_of(pipe), prompt_gate(denoiser(pipe))
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


def test_both_branches_of_guidance_have_the_gate_of_the_prompt(run: Path, pipe: Any, family: Family) -> None:
    prompts = [UNLIKE[0], CONCEPT]
    base = paint(pipe, family, prompts, guided=True)
    atomtune.load(pipe, run)
    with override_gate(denoiser(pipe), torch.tensor([0.0, 1.0])):
        expected = paint(pipe, family, prompts, guided=True)
    open_for_concept(pipe)
    gated = paint(pipe, family, prompts, guided=True)
    assert np.array_equal(gated, expected)
    assert np.array_equal(gated[0], base[0])
    assert not np.array_equal(gated[1], base[1])
    alone = paint(pipe, family, [CONCEPT], guided=True)
    with override_gate(denoiser(pipe), 1.0):
        assert np.array_equal(alone, paint(pipe, family, [CONCEPT], guided=True))
    seen = []
    handle = denoiser(pipe).register_forward_pre_hook(lambda *_: seen.append(gates_of(pipe)))
    with atomtune.prompt_gates(pipe, prompts):
        how = {**call_arguments(pipe, prompts, {}), **SIZE, **(family.guided or family.plain)}
        if "negative_prompt" in how:
            how["negative_prompt"] = [""] * len(prompts)
        pipe(prompt=prompts, num_inference_steps=STEPS, num_images_per_prompt=2, **how)
    handle.remove()
    assert all(rows in ([0, 0, 1, 1], [0, 0, 1, 1] * 2) for rows in seen), "several pictures of a prompt have its gate"
    assert seen


def gates_of(pipe: Any) -> list[float]:
    """Of the rows of the forward that has begun."""
    return denoiser(pipe).atom_gate.values.read("default").tolist()


@pytest.mark.parametrize("family", [f for f in FAMILIES if f.guided], indirect=True, ids=lambda f: f.name)
def test_no_words_are_what_guidance_steps_away_from(pipe: Any, backbone: Backbone, family: Family) -> None:
    """What training learns as the branch without words is that branch."""
    told: list[tuple[Tensor, ...]] = []
    base = denoiser(pipe)

    def hear(_: nn.Module, args: Any, given: dict[str, Any]) -> None:
        heard = backbone.heard(base, named(base, args, given)).conditioning
        told.append((heard[backbone.gate_input], heard[backbone.gate_mask] if backbone.gate_mask else None))

    handle = base.register_forward_pre_hook(hear, with_kwargs=True)
    paint(pipe, family, [CONCEPT], guided=True)
    handle.remove()
    own = backbone.encode_prompts(pipe, [""])
    mask = own[backbone.gate_mask][0].bool() if backbone.gate_mask else slice(None)
    wanted = own[backbone.gate_input][0][mask]
    rows = [row[m[i].bool() if m is not None else slice(None)] for embeds, m in told for i, row in enumerate(embeds)]
    assert any(row.shape == wanted.shape and torch.equal(row, wanted) for row in rows)


def test_a_pruned_adapter_reloads_equal(run: Path, pipe: Any, family: Family, tmp_path: Path) -> None:
    adapter = atomtune.load(pipe, run)
    full = len(adapter.atoms)
    with adapter.using(density=0.5):
        dialled = paint(pipe, family, [CONCEPT])
    assert adapter.prune(0.5) == len(adapter.atoms) == -(-full // 2)
    pruned, ranked = paint(pipe, family, [CONCEPT]), list(adapter.atoms)
    # Fewer columns may add up in another order.
    assert np.abs(pruned.astype(int) - dialled).max() <= 1
    adapter.save(tmp_path / "pruned")
    adapter.remove()
    again = atomtune.load(pipe, tmp_path / "pruned")
    assert np.array_equal(paint(pipe, family, [CONCEPT]), pruned)
    assert [a.name for a in again.atoms] == [a.name for a in ranked]
