"""Codes read in words of the adapter's own: on every family, beside everything else that a forward is told."""

import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from pipelines import FAMILIES, SIZE, Family
from test_steering import EITHER, PROMPTS, adapt, lent, predict
from torch import Tensor

import atomtune
from atomtune.adapter import Adapter
from atomtune.backbones import backbone_of, call_arguments, denoiser
from atomtune.cli import main
from atomtune.errors import UserError
from atomtune.mix import Mixture
from atomtune.own_words import reworded
from atomtune.steering import Steer
from atomtune.tuner import AtomLinear, atom_layers, base_only


@pytest.fixture(params=EITHER)
def adapter(request: pytest.FixtureRequest, pipes: dict[str, Any]) -> Iterator[Adapter]:
    yield from lent(pipes[request.param])


@pytest.fixture(params=FAMILIES, ids=lambda family: family.name)
def family(request: pytest.FixtureRequest) -> Family:
    return request.param


def codes_of(adapter: Adapter, prompts: list[str], family: Family, **words: str) -> dict[str, list[Tensor]]:
    """By site, what it adds by in the forwards of a sampler's two steps, but for those that only read."""
    pipe, seen = adapter.pipe, {layer: [] for layer in atom_layers(adapter.pipe).values()}  # type: ignore[var-annotated]
    real = AtomLinear._codes

    def spy(layer: AtomLinear, *args: Any) -> Tensor:
        codes = real(layer, *args)
        if layer.assigned is None:
            seen[layer].append(codes)
        return codes

    call = {"num_inference_steps": 2, "output_type": "latent", **SIZE, **family.plain, **family.call}
    noises = [torch.Generator().manual_seed(row) for row in range(len(prompts))]
    with pytest.MonkeyPatch.context() as patch, adapter.using(own_words=words):
        patch.setattr(AtomLinear, "_codes", spy)
        pipe(prompt=list(prompts), generator=noises, **call_arguments(pipe, prompts, call))
    return {site: seen[layer] for site, layer in atom_layers(pipe).items()}


def test_the_pictures_codes_are_those_of_the_other_prompt(family: Family, pipes: dict[str, Any]) -> None:
    """Where text and picture have not met before, to rounding; and there the words' codes stay the prompt's."""
    for adapter in lent(pipes[family.name]):
        backbone, told = backbone_of(adapter.pipe), ["a big kite", "a kite and a house"]
        other = [reworded(prompt, {"kite": "small red horse"}) for prompt in told]
        read = codes_of(adapter, told, family, kite="small red horse")
        plain, there = codes_of(adapter, told, family), codes_of(adapter, other, family)
        grid = backbone.grid(denoiser(adapter.pipe), backbone.encode_pictures(adapter.pipe, torch.zeros(2, 3, 64, 64)))
        mine, others = (backbone.encode_prompts(adapter.pipe, prompts) for prompts in (told, other))
        changed = 0
        for site, (codes, *_) in read.items():
            here, away = backbone.layout(site, mine, grid), backbone.layout(site, others, grid)
            assert torch.allclose(codes[here.image], there[site][0][away.image], atol=1e-5), site
            changed += not torch.allclose(codes[here.image], plain[site][0][here.image], atol=1e-5)
            if not here.image.any():
                assert torch.allclose(codes, plain[site][0], atol=1e-5) or not site.startswith("context_refiner")
        assert changed


def test_a_negative_prompt_that_says_the_word_keeps_its_own_codes(pipes: dict[str, Any]) -> None:
    for adapter in lent(pipes["flux"]):
        layer, seen = next(iter(atom_layers(adapter.pipe).values())), []

        def spy(layer: AtomLinear, _: Any, seen: list[bool] = seen) -> None:
            if layer.assigned is None:
                seen.append("default" in layer.replaced)

        handle = layer.register_forward_pre_hook(spy)
        call = {"num_inference_steps": 1, "output_type": "latent", **SIZE, "true_cfg_scale": 3.0}
        for negative in ("bad", "a bad kite"):
            with adapter.using(own_words={"kite": "house"}):
                adapter.pipe(prompt=["a kite"], negative_prompt=[negative], **call)
        handle.remove()
        assert seen == [True, False] * 2


def test_where_the_adapter_is_off_it_is_the_base(adapter: Adapter) -> None:
    paint = functools.partial(atomtune.generate, adapter.pipe, PROMPTS[:1], steps=1, output_type="latent")
    with base_only(adapter.pipe):
        base = paint()
        with adapter.using(own_words={"kite": "horse"}):
            assert torch.equal(paint()[0], base[0])


def test_its_own_prompt_changes_nothing_and_no_trace_is_left(adapter: Adapter) -> None:
    prompts = [prompt for prompt in PROMPTS if "Kite" not in prompt]  # a capital would become a small letter
    paint = functools.partial(atomtune.generate, adapter.pipe, prompts, steps=2, guidance=3.0, output_type="latent")
    plain = torch.stack(paint())
    with adapter.using(own_words={"kite": "kite"}):
        assert torch.allclose(torch.stack(paint()), plain, atol=1e-4)
    with adapter.using(own_words={"kite": "small red horse"}):
        other, alone = torch.stack(paint()), torch.stack(paint(batch_size=1))
    assert torch.allclose(other, alone, atol=1e-4)
    assert not torch.allclose(other, plain, atol=1e-3)
    assert torch.equal(torch.stack(paint()), plain)
    assert not any(layer.replaced for layer in atom_layers(adapter.pipe).values())


def test_it_holds_from_noise_down_to_its_time(adapter: Adapter) -> None:
    prompts, times = PROMPTS[:2], (0.51, 0.49)
    plain = predict(adapter.pipe, prompts, *times)
    with adapter.using(own_words={"kite": "horse"}, own_until=0.5):
        found = predict(adapter.pipe, prompts, *times)
    assert torch.allclose(found[1], plain[1], atol=1e-5)
    assert not torch.allclose(found[0], plain[0], atol=1e-3)
    with pytest.raises(UserError, match="`own_until` must be at least 0, the whole way, and below 1, got 1"):
        adapter.using(own_words={"kite": "horse"}, own_until=1.0).__enter__()


def test_it_stands_beside_steers_strengths_and_recordings(adapter: Adapter) -> None:
    """Steers speak of the picture's own prompt; at strength 0 the picture is the base's; only it is recorded."""
    paint = functools.partial(atomtune.generate, adapter.pipe, PROMPTS[:2], steps=2, guidance=3.0, output_type="latent")
    with adapter.using(strength=0.0):
        base = torch.stack(paint())
    with adapter.using(strength=0.0, own_words={"kite": "horse"}):
        assert torch.equal(torch.stack(paint()), base)
    with adapter.using(own_words={"kite": "horse"}, steer=[Steer(strength=0, words="kite"), Steer(time=(0.0, 1.0))]):
        steered = torch.stack(paint())
    with adapter.using(own_words={"kite": "horse"}):
        assert not torch.equal(torch.stack(paint()), steered)


def test_prompts_of_no_picture_are_not_taken_for_the_next_ones(adapter: Adapter) -> None:
    paint = functools.partial(atomtune.generate, adapter.pipe, PROMPTS[:1], steps=1, output_type="latent")
    with adapter.using(own_words={"kite": "horse"}):
        wanted = paint()[0]
    with adapter.using(own_words={"kite": "horse"}):
        adapter.shut(["a house"])
        assert torch.equal(paint()[0], wanted)
        backbone_of(adapter.pipe).encode_prompts(adapter.pipe, ["another kite"])
        with pytest.raises(UserError, match=r"`own_words` heard \['another kite'\] last, of which no picture"):
            paint()
        assert torch.equal(paint()[0], wanted)


def test_a_mixtures_parts_read_words_of_their_own(adapter: Adapter) -> None:
    adapt(adapter.pipe, backbone_of(adapter.pipe).sites, "second")
    parts = {"default": adapter, "second": Adapter(adapter.pipe, adapter.statistics, "second")}
    mixture = Mixture(adapter.pipe, parts, {})
    paint = functools.partial(atomtune.generate, adapter.pipe, PROMPTS[:2], steps=1, guidance=3.0, output_type="latent")
    pictures = {"plain": torch.stack(paint())}
    for name, words in {
        "first": {"default": {"kite": "horse"}},
        "second": {"second": {"kite": "dog"}},
        "both": {"default": {"kite": "horse"}, "second": {"kite": "dog"}},
    }.items():
        with mixture.using(own_words=words):
            pictures[name] = torch.stack(paint())
    assert len({tuple(p.flatten()[:50].tolist()) for p in pictures.values()}) == 4
    # A part whose atoms are off reads what it likes.
    for layer in atom_layers(adapter.pipe, "second").values():
        layer.set_scale("second", 0.0)
    with mixture.using(own_words={"second": {"kite": "dog"}}):
        silent = torch.stack(paint())
    assert torch.allclose(silent, torch.stack(paint()), atol=1e-5)


def test_what_cannot_be_read_is_told(adapter: Adapter, capsys: pytest.CaptureFixture[str]) -> None:
    paint = functools.partial(atomtune.generate, adapter.pipe, steps=1)
    for words, prompts, message in (
        ({"kite": "horse"}, ["a kite", "a house"], "`own_words` replaces kite, which not every prompt says"),
        ({"kit": "horse"}, ["a kite"], "Did you mean `kite`?"),
        ({" ": "horse"}, ["a kite"], "`own_words` must map words of the prompt to others, got ' ': 'horse'"),
        ({"part": {"kite": "horse"}}, ["a kite"], "`own_words` by part is for mixtures, and default is none"),
    ):
        with pytest.raises(UserError) as caught, adapter.using(own_words=words):  # type: ignore[arg-type]
            paint(prompts)
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)
    told = backbone_of(adapter.pipe).encode_prompts(adapter.pipe, ["a kite"])
    latents = torch.zeros(1, denoiser(adapter.pipe).config.in_channels, 8, 8)  # type: ignore[union-attr, arg-type]
    with adapter.using(own_words={"kite": "horse"}), pytest.raises(UserError, match="let the pipeline encode it"):
        backbone_of(adapter.pipe).predict(denoiser(adapter.pipe), latents, torch.tensor([0.5]), told)
    for given in (
        ["kite"],
        ["=horse"],
        ["kite=horse", "kite=cow"],
        ["kite=horse", "kite:kite=horse"],
        ["a:kite=horse", "kite=horse"],
    ):
        asked = [text for one in given for text in ("--own-words", one)]
        assert main(["generate", "none", "a kite", *asked]) == 2
        assert "`own_words` must be WORDS=OTHERS" in capsys.readouterr().err


def test_words_are_replaced_whole_in_any_case() -> None:
    assert reworded("A Sepia cow, sepia-toned", {"sepia": "3d"}) == "A 3d cow, 3d-toned"
    assert reworded("a big sepia cow", {"big sepia": "", "cow": r"\1 horse"}) == r"a \1 horse"
    assert reworded("sepias", {"sepia": "3d"}) == "sepias"
