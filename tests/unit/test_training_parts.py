"""Options, objective, preparation and the gate's training, each alone."""

import dataclasses
import hashlib
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
from PIL import Image

import atomtune
from atomtune.backbones import BACKBONES, backbone_of
from atomtune.backbones.base import autoencoded
from atomtune.backbones.noising import flow, scheduled
from atomtune.data.folder import Scan, Skipped
from atomtune.errors import UserError
from atomtune.training import gating, run_folder
from atomtune.training.batch import generator_of, lots_of
from atomtune.training.masks import surprise
from atomtune.training.objective import DENSITIES, error, mean_l0, real_positions, sparsity, times
from atomtune.training.options import TrainOptions
from atomtune.training.prepare import gate_prompts, mentions, pictured, prepare, spoken, unrelated_list
from atomtune.training.start import discriminants
from atomtune.tuner import AtomConfig, attach, prompt_gate, remove_adapter

# --------------------------------------------------------------------------------------------------- options


def test_options_survive_json() -> None:
    options = TrainOptions(
        concept="kite", sites=("a", "b"), unrelated=Path("x/y.txt"), sample_prompts=("p",), sample_every=9
    )
    assert TrainOptions.from_json(options.to_json()) == options
    assert TrainOptions.from_json(TrainOptions().to_json()) == TrainOptions()


def test_the_essence_leaves_out_what_is_off_and_nothing_else() -> None:
    options = TrainOptions(concept="kite", distill=0.0, data_start=True)
    essence = options.essence()
    assert TrainOptions.from_dict(essence) == options
    assert essence["distill"] == 0, "off, and not by default"
    assert essence["silence"] == options.silence
    assert "prior" not in essence


def test_an_unknown_option_of_a_saved_run_is_an_error() -> None:
    with pytest.raises(UserError, match=r"Unknown option 'stepz'.* Did you mean `steps`"):
        TrainOptions.from_json('{"stepz": 9}')
    with pytest.raises(UserError, match="`steps` must be int, got 'many'"):
        TrainOptions.from_json('{"steps": "many"}')


def test_options_that_came_later_leave_the_essence_as_stored_results_know_it() -> None:
    """Stored benchmark cells are found by it: a key that changes here loses every one of them."""
    known = {
        "batch_size",
        "checkpoint_every",
        "contain",
        "distill",
        "gate",
        "grad_accumulation",
        "keep_checkpoints",
        "lr",
    }
    known |= {"margin", "max_grad_norm", "mixed_precision", "n_atoms", "nested", "silence", "sparsifier", "steps"}
    assert TrainOptions().essence().keys() == known | {"threshold", "unrelated_pictures"}
    text = json.dumps(
        TrainOptions(concept="kite", sparsifier="topk", k=3, distill=0.0, seed=2).essence(), sort_keys=True
    )
    assert hashlib.sha256(text.encode()).hexdigest()[:12] == "9a57c0e41629"
    assert "optimizer" not in TrainOptions().essence()
    assert TrainOptions(optimizer="lion", floor=0.0).essence().items() >= {"optimizer": "lion", "floor": 0.0}.items()
    assert TrainOptions(unrelated_batch=0).essence()["unrelated_batch"] == 0, "none at all is not the default"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("steps", 0),
        ("batch_size", 0),
        ("n_atoms", 0),
        ("k", 0),
        ("resolution", 0),
        ("sample_every", 0),
        ("grad_accumulation", -1),
        ("checkpoint_every", 0),
        ("keep_checkpoints", 0),
        ("validate_every", 0),
        ("patience", 0),
        ("held_out", -1),
        ("warmup", 1.5),
        ("floor", -0.1),
        ("ema", 1.0),
        ("ema", math.nan),
        ("optimizer", "adam"),
        ("schedule", "cosin"),
        ("trackers", ("tensorbord",)),
        ("hub", "me"),
        ("unrelated_batch", -1),
        ("unrelated_pictures", 0),
        ("silence", -0.1),
        ("sparsity", math.nan),
        ("distill", math.inf),
        ("dead", -1.0),
        ("lr", 0.0),
        ("lr", math.nan),
        ("threshold", math.nan),
        ("inner", -1.0),
        ("prior", math.inf),
        ("max_grad_norm", 0.0),
        ("margin", math.inf),
        ("mixed_precision", "fp8"),
        ("concept", "  "),
        ("seed", -1),
        ("seed", 2**40),
    ],
)
def test_options_that_cannot_work_name_their_field(name: str, value: Any) -> None:
    with pytest.raises(UserError, match=f"`{name}` must be"):
        dataclasses.replace(TrainOptions(), **{name: value})


# ------------------------------------------------------------------------------------------------- objective


def test_noised_runs_from_the_picture_to_noise() -> None:
    """Complaint 20: a weight that is wrong for the prediction's kind."""
    latents, noise = torch.randn(3, 4, 2, 2), torch.randn(3, 4, 2, 2)
    x, v = flow(latents, torch.tensor([0.0, 0.25, 1.0]), noise)
    assert torch.equal(x[0], latents[0])
    assert torch.allclose(x[1], 0.75 * latents[1] + 0.25 * noise[1])
    assert torch.equal(x[2], noise[2])
    # Along the straight path the velocity takes any point back to the picture.
    assert torch.allclose(x[1] - 0.25 * v[1], latents[1], atol=1e-6)
    assert error(v, v) == 0
    assert error(v + 2, v).item() == pytest.approx(4.0)


def test_the_loss_is_a_float32_mean() -> None:
    v = torch.zeros(2, 4, 2, 2, dtype=torch.float16)
    assert error(v + 300, v).item() == pytest.approx(90000.0)


@pytest.mark.parametrize("name", DENSITIES)
def test_times_are_drawn_as_their_density_says(name: str) -> None:
    """Complaint 19, weights of time steps that do nothing: against the distribution functions, at nine places."""
    drawn = DENSITIES[name](20000, torch.Generator().manual_seed(0))
    assert ((drawn > 0) & (drawn < 1)).all()
    for s in (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9):
        normal = 0.5 * (1 + math.erf(math.log(s / (1 - s)) / math.sqrt(2)))
        want = {"uniform": s, "logit_normal": normal}[name]
        assert (drawn <= s).float().mean().item() == pytest.approx(want, abs=0.012)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_a_shift_moves_the_times_as_the_sampler_does(shift: float) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    backbone = dataclasses.replace(BACKBONES["ZImagePipeline"], shift=shift)
    drawn = DENSITIES["uniform"](1000, torch.Generator().manual_seed(0))
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=drawn.numpy())
    moved = times(backbone, 1000, torch.Generator().manual_seed(0))
    assert torch.allclose(moved, scheduler.sigmas[:-1], atol=1e-6)
    assert torch.equal(moved, drawn) == (shift == 1)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_the_target_of_a_scheduler_leads_back_to_the_picture(kind: str) -> None:
    """Against DDIM's own step from the noised latents to the clean ones."""
    from types import SimpleNamespace

    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(prediction_type=kind, clip_sample=False)
    scheduler.set_timesteps(1000)
    noised = scheduled(SimpleNamespace(scheduler=scheduler))["noised"]
    latents, noise = torch.randn(3, 4, 2, 2), torch.randn(3, 4, 2, 2)
    x, target = noised(latents, torch.tensor([0.1, 0.5, 0.9]), noise)
    for row, step in enumerate((100, 500, 900)):
        clean = scheduler.step(target[row], step, x[row]).pred_original_sample
        assert torch.allclose(clean, latents[row], atol=1e-4)
    same, _ = noised(latents, 0.5, noise)
    assert torch.equal(same[1], x[1])


def test_a_scheduler_that_predicts_something_else_is_told() -> None:
    from types import SimpleNamespace

    from diffusers import DDIMScheduler

    with pytest.raises(UserError, match="predicts epsilon or v_prediction, got 'sample'"):
        scheduled(SimpleNamespace(scheduler=DDIMScheduler(prediction_type="sample")))


def test_padding_counts_in_no_term() -> None:
    pixart = next(b for b in BACKBONES.values() if b.family == "PixArt-Sigma")
    words = {"encoder_hidden_states": torch.zeros(3, 4, 8), "encoder_attention_mask": torch.tensor([[1, 1, 0, 0]] * 3)}
    codes = torch.ones(3, 4, 2)
    codes[:, 2:] = 100.0
    found = real_positions({"b.attn2.to_k": [codes]}, pixart, words, (2, 2), slice(0, 2))
    assert found["b.attn2.to_k"].shape == (4, 2)
    assert sparsity(found, {"b.attn2.to_k": torch.ones(2, 4)}) == 2 * 2
    codes[:, 2:] = 0.0
    assert mean_l0(real_positions({"b.attn2.to_k": [codes]}, pixart, words, (2, 2), slice(None))) == 2


# ----------------------------------------------------------------------------------------------- preparation

UNRELATED = tuple(f"a {word} on a table" for word in ("cup", "plate", "spoon", "lamp", "book", "fork", "vase", "bowl"))


def test_gate_prompts_open_with_the_name_and_shut_without_it() -> None:
    options = TrainOptions(concept="sks Dog", class_noun="dog")
    opening, shutting = gate_prompts(("a sks dog in snow", "my SKS dog"), UNRELATED, options)
    assert all("sks dog" in prompt.lower() for prompt in opening)
    assert not any("sks dog" in prompt.lower() for prompt in shutting)
    assert {"a in snow", "my", "a dog in snow", "my dog", "dog", "a dog", ""} <= set(shutting)
    assert set(UNRELATED) <= set(shutting)
    assert len(set(shutting)) == len(shutting)


def test_a_name_said_twice_is_taken_out_twice() -> None:
    options = TrainOptions(concept="sks dog", class_noun="dog")
    _, shutting = gate_prompts(("a sks dog beside another sks  dog",), UNRELATED, options)
    assert {"a beside another", "a dog beside another dog"} <= set(shutting)


@pytest.mark.parametrize(
    ("text", "name", "there"),
    [
        ("a box", "ox", False),
        ("an Ox, grazing", "ox", True),
        ("the category", "cat", False),
        ("a <sks> dog", "<sks>", True),
        ("一只小猫在草地上", "小猫", True),
        ("İİ kedi burada", "kedi", True),
    ],
)
def test_a_name_is_found_in_whole_words(text: str, name: str, there: bool) -> None:
    assert mentions(text, name) is there


@pytest.mark.parametrize("noun", ["sks dog", "SKS  dog", "big sks dog"])
def test_a_class_noun_that_says_the_name(noun: str) -> None:
    with pytest.raises(UserError, match="`class_noun` must not say the concept's name, 'sks dog'"):
        TrainOptions(concept="sks dog", class_noun=noun)


def test_without_a_class_noun_only_the_name_is_taken_out() -> None:
    _, shutting = gate_prompts(("a sks dog in snow",), UNRELATED, TrainOptions(concept="sks dog"))
    assert set(shutting) == {"", "a in snow", *UNRELATED}


@pytest.fixture(scope="module")
def pipe(bases: dict[str, Path]) -> Any:
    return atomtune.open_pipeline(str(bases["lumina2"]))


def test_unrelated_prompts_come_from_the_user_the_base_or_the_package(pipe: Any, tmp_path: Path) -> None:
    own = tmp_path / "own.txt"
    own.write_text("\n".join(UNRELATED) + "\n\n")
    assert unrelated_list(pipe, TrainOptions(unrelated=own)) == UNRELATED
    assert len(unrelated_list(pipe, TrainOptions())) == 8
    assert len(unrelated_list(object(), TrainOptions())) > 50
    own.write_text("only one\n")
    with pytest.raises(UserError, match="at least 5 prompts"):
        unrelated_list(pipe, TrainOptions(unrelated=own))


def test_unrelated_prompts_with_the_concept_are_left_out(pipe: Any, kites: Path, runs: Path, tmp_path: Path) -> None:
    own = tmp_path / "own.txt"
    own.write_text("\n".join([f"a Kite, number {i}" for i in range(6)]))
    options = TrainOptions(concept="kite", unrelated=own, unrelated_pictures=2)
    with pytest.raises(UserError, match="all of them name it"):
        prepare(pipe, backbone_of(pipe), kites, options, runs / "no")


def test_captions_of_any_length_train_together(pipe: Any, kites: Path, runs: Path, tmp_path: Path) -> None:
    """A long caption is encoded to more tokens than the unrelated prompts are."""
    import shutil

    data = tmp_path / "data"
    shutil.copytree(kites, data)
    (data / "1.txt").write_text("a kite, " + "and a red house beside a small green clock, " * 6)
    options = TrainOptions(
        concept="kite", steps=1, batch_size=3, n_atoms=2, sites=("layers.0.attn.to_q",), unrelated_pictures=2
    )
    adapter = atomtune.train(pipe, data, runs / "long", options, progress=False)
    adapter.remove()


def test_latents_are_cached_by_content(pipe: Any, kites: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = TrainOptions(unrelated_pictures=2)
    first = prepare(pipe, backbone_of(pipe), kites, options, tmp_path / "a")

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("encoded although it is cached")

    monkeypatch.setattr("atomtune.training.encode.generate", never)
    monkeypatch.setattr(pipe.vae, "encode", never)
    again = prepare(pipe, backbone_of(pipe), kites, options, tmp_path / "b")
    assert torch.equal(first.latents, again.latents)
    assert torch.equal(first.unrelated_latents, again.unrelated_latents)
    with pytest.raises(AssertionError, match="encoded although"):
        prepare(pipe, backbone_of(pipe), kites, dataclasses.replace(options, resolution=32), tmp_path / "c")


# ------------------------------------------------------------------------------------------------------ gate


def test_the_gate_learns_to_tell_prompts_apart(pipe: Any, kites: Path, runs: Path) -> None:
    backbone = backbone_of(pipe)
    options = TrainOptions(concept="kite", class_noun="toy", unrelated_pictures=2)
    material = prepare(pipe, backbone, kites, options, runs / "gate")
    base = pipe.transformer
    width = material.conditioning[backbone.gate_input].shape[-1]
    attach(
        base,
        AtomConfig(
            n_atoms=2,
            target_modules=["layers.0.attn.to_q"],
            gate_input=backbone.gate_input,
            gate_mask=backbone.gate_mask,
            gate_dim=width,
        ),
    )
    gate = prompt_gate(base)
    assert gate is not None
    optimizer = torch.optim.AdamW(gate.parameters(), lr=gating.LEARNING_RATE, weight_decay=0.0)
    generator = torch.Generator().manual_seed(0)
    losses = []
    for _ in range(150):
        loss = gating.loss(base, backbone, material, generator, "default")
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    shares = gating.calibrate(base, backbone, material, "default")
    assert losses[-1] < 0.2 * losses[0]
    assert shares == {"gate_silent_share": 1.0, "gate_open_share": 1.0}
    seen = backbone.encode_prompts(pipe, ["a kite on the moon", "a house on the moon"])
    opened, shut = gate(seen[backbone.gate_input], seen[backbone.gate_mask]).tolist()
    assert (opened, shut) == (1.0, 0.0)
    remove_adapter(base)


def test_what_is_passed_over_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    names = ("a.psd.bak", "b.doc", "c.doc", "d.doc", "e.doc")
    skipped = tuple(Skipped(Path(name), "not a picture") for name in names)
    run_folder.tell(
        Scan((), (*skipped, Skipped(Path("0.txt"), "caption: of 0.png"), Skipped(Path("0.mask.png"), "mask: of 0.png")))
    )
    told = capsys.readouterr()
    assert told.err == "passed over, not a picture: a.psd.bak, b.doc, c.doc and 2 more\n"
    assert told.out == ""


# -------------------------------------------------------------------------------- the subject, and where atoms start


def test_the_base_is_surprised_where_the_subject_is() -> None:
    from atomtune.data.picture import to_tensor
    from atomtune.scenes.render import render, subject_mask
    from atomtune.scenes.world import caption, scene

    pipe = atomtune.open_pipeline("embedded")
    backbone = backbone_of(pipe)
    shots = [scene("kite", "3d", "big", "left", "red"), scene("mouse", "3d", "big", "right", "blue")]
    pixels = torch.stack([to_tensor(Image.fromarray(render(s))) for s in shots])
    latents = backbone.encode_pictures(pipe, pixels)
    conditioning = backbone.encode_prompts(pipe, [caption(s) for s in shots])
    found = surprise(pipe.transformer, backbone, latents, conditioning)
    for mask, shot in zip(found, shots, strict=True):
        true = torch.from_numpy(subject_mask(shot)).view(8, 8, 8, 8).mean((1, 3)).flatten() > 0.2
        both, either = (mask.bool() & true).sum(), (mask.bool() | true).sum()
        assert both / either > 0.5
    alone = surprise(pipe.transformer, backbone, latents[:1], {k: v[:1] for k, v in conditioning.items()})
    assert alone.shape == (1, 64)


def test_a_quarter_of_the_pictures_show_the_class_noun() -> None:
    options = TrainOptions(concept="kite", class_noun="toy", unrelated_pictures=8)
    captions = ("a red kite on a blue background", "a kite")
    others = tuple(f"prompt {i}" for i in range(20))
    assert pictured(captions, others, options) == ("a red toy on a blue background", "a toy", *others[:6])
    assert pictured(captions, others, dataclasses.replace(options, class_noun=None)) == others[:8]
    assert pictured(captions, others, dataclasses.replace(options, concept="ship")) == others[:8], "none names it"


def test_discriminants_tell_the_two_kinds_apart() -> None:
    generator = torch.Generator().manual_seed(0)
    # The concept differs in a direction of small variance, which a difference of means would miss.
    spread = torch.tensor([3.0, 1.0, 1.0, 0.5])
    other = torch.randn(2000, 4, generator=generator) * spread + 3
    own = torch.randn(200, 4, generator=generator) * spread + 3 + torch.tensor([0.0, 0.0, 0.0, 4.0])
    e, b = discriminants(own, other, 6, generator)
    assert e.shape == (6, 4)
    own_codes, other_codes = (torch.relu(x @ e.T - b) for x in (own, other))
    assert (own_codes > 0).any(1).float().mean() > 0.95
    assert (other_codes > 0).float().mean() < 0.02
    assert torch.allclose(other.mean(0) @ e.T - b, torch.full((6,), -1.0), atol=1e-3)


def test_more_atoms_than_positions_still_start() -> None:
    generator = torch.Generator().manual_seed(0)
    e, b = discriminants(torch.randn(2, 4, generator=generator), torch.randn(9, 4, generator=generator), 5, generator)
    assert e.isfinite().all()
    assert b.isfinite().all()


def test_unrelated_pictures_are_sometimes_learned_without_words() -> None:
    prompts = tuple(f"prompt {i}" for i in range(16))
    assert spoken(prompts) == (*prompts[:14], "", "")
    assert spoken(prompts[:3]) == (*prompts[:2], "")
    assert spoken(prompts[:1]) == prompts[:1]


def test_numbers_that_json_made_whole_are_floats_again() -> None:
    assert isinstance(TrainOptions.from_dict({"threshold": 1}).threshold, float)


def test_a_seed_reaches_every_draw() -> None:
    """torch's generator on a CPU reads the lower 32 bits of a seed alone."""
    streams = {
        torch.rand(4, generator=source(dataclasses.replace(TrainOptions(), seed=seed), number)).sum().item()
        for seed in (0, 1, 2, 2**31 - 1)
        for number in (0, 1, 500)
        for source in (generator_of, lots_of)
    }
    assert len(streams) == 4 * 3 * 2


@pytest.mark.parametrize("name", ["EDMEulerScheduler", "FlowMatchEulerDiscreteScheduler"])
def test_a_unet_whose_scheduler_has_no_betas_is_refused(name: str) -> None:
    scheduler = getattr(diffusers, name)()
    with pytest.raises(UserError, match=f"must have a scheduler that adds noise by betas, as DDPM's does, got {name}"):
        scheduled(SimpleNamespace(scheduler=scheduler))


def test_latents_of_an_autoencoder_with_statistics() -> None:
    """As SDXL's pipeline turns them back: latents x std / scale + mean."""

    class Vae:
        dtype = torch.float32
        config = SimpleNamespace(latents_mean=[1.0, 2.0], latents_std=[2.0, 4.0], scaling_factor=0.5)

        def encode(self, pixels: torch.Tensor) -> Any:
            return SimpleNamespace(latent=pixels[:, :2])

    pixels = torch.randn(1, 3, 2, 2)
    found = autoencoded(SimpleNamespace(vae=Vae()), pixels)
    mean, deviation = torch.tensor([1.0, 2.0]).view(1, 2, 1, 1), torch.tensor([2.0, 4.0]).view(1, 2, 1, 1)
    torch.testing.assert_close(found * deviation / 0.5 + mean, pixels[:, :2])


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (
            {"sample_prompts": "a kite", "sample_every": 1},
            r"`sample_prompts` must be tuple\[str, \.\.\.\], got 'a kite'",
        ),
        ({"sites": "to_q"}, "`sites` must be tuple"),
        ({"steps": "300"}, "`steps` must be int, got '300'"),
        ({"sample_prompts": ("a kite",)}, "`sample_prompts` must come with `sample_every`"),
        ({"k": 4}, "`k` must come with the sparsifier topk or batch_topk, got relu"),
        ({"class_noun": "toy"}, "`class_noun` must come with the concept's name, got 'toy' alone"),
    ],
    ids=str,
)
def test_options_that_would_do_nothing_are_told(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=told):
        TrainOptions(**changes)
