"""Steering keeps the same promises on every model family: what is multiplied where, when and on which words."""

import functools
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pipelines import CAPTIONS, FAMILIES, SIZE, Family
from torch import Tensor

import atomtune
from atomtune.adapter import Adapter
from atomtune.backbones import backbone_of, denoiser, word_tokens
from atomtune.cli import main
from atomtune.errors import UserError
from atomtune.steering import Steer
from atomtune.tuner import AtomConfig, AtomLinear, activate, atom_layers, attach, base_only, record, remove_adapter

PROMPTS = ["a kite", "Kite, a kite", CAPTIONS[0], *(f"a kite{' and a house' * n}" for n in range(2, 7))]
"""Of different lengths, all with a kite."""
LEFT = np.tile([1, 1, 0, 0], (4, 1))
EITHER = [family.name for family in FAMILIES if family.name in ("sd3", "lumina2")]
"""One whose guidance has both branches in one forward, and one that has two."""


def adapt(pipe: Any, sites: tuple[str, ...], name: str = "default") -> Adapter:
    """Random atoms, with statistics that say nothing."""
    torch.manual_seed(len(name))
    attach(denoiser(pipe), AtomConfig(n_atoms=8, target_modules=list(sites), threshold=0.0), name)
    for layer in atom_layers(pipe, name).values():
        layer.dictionary(name).atoms.data.normal_(std=0.3)
    keys = ("effect", "mean", "density", "purity", "norm")
    return Adapter(pipe, {site: {key: torch.ones(8) for key in keys} for site in atom_layers(pipe, name)}, name)


def lent(pipe: Any) -> Iterator[Adapter]:
    """An adapter at every site of a family; nothing of a steering is left after the test."""
    model = denoiser(pipe)
    yield adapt(pipe, backbone_of(pipe).sites)
    assert not model._forward_pre_hooks
    assert "encode_prompt" not in vars(pipe)
    for name in list(model.peft_config):  # type: ignore[arg-type]
        assert not any(layer.steering for layer in atom_layers(pipe, name).values())
        remove_adapter(pipe, name)


@pytest.fixture(params=EITHER)
def adapter(request: pytest.FixtureRequest, pipes: dict[str, Any]) -> Iterator[Adapter]:
    yield from lent(pipes[request.param])


@pytest.fixture(scope="module", params=FAMILIES, ids=lambda family: family.name)
def family(request: pytest.FixtureRequest) -> Family:
    return request.param


@pytest.fixture
def any_adapter(family: Family, pipes: dict[str, Any]) -> Iterator[Adapter]:
    """The same of every family."""
    yield from lent(pipes[family.name])


@torch.no_grad()
def predict(pipe: Any, prompts: list[str], *times: float) -> Tensor:
    backbone, s = backbone_of(pipe), torch.tensor(times or (0.5,)).expand(len(prompts))
    shape = backbone.encode_pictures(pipe, torch.zeros(1, 3, 64, 64)).shape[1:]
    latents = torch.randn(len(prompts), *shape, generator=torch.Generator().manual_seed(0))
    return backbone.predict(denoiser(pipe), latents, s, backbone.encode_prompts(pipe, prompts))


def factors(adapter: Adapter, call: Callable[[], Any]) -> dict[str, list[Tensor]]:
    """What codes were multiplied by in the forwards of a call, by site; NaN where none fired."""
    after: dict[AtomLinear, list[Tensor]] = {layer: [] for layer in atom_layers(adapter.pipe).values()}
    real = AtomLinear._codes

    def spy(layer: AtomLinear, *args: Any) -> Tensor:
        after[layer].append(real(layer, *args))
        return after[layer][-1]

    with pytest.MonkeyPatch.context() as patch, record(adapter.pipe) as recording:
        patch.setattr(AtomLinear, "_codes", spy)
        call()
    before = zip(recording.codes.items(), after.values(), strict=True)
    return {site: [new / old for new, old in zip(news, olds, strict=True)] for (site, olds), news in before}


def same(found: Tensor, expected: Tensor) -> bool:
    fired = ~found.isnan()
    return bool(fired.any()) and torch.allclose(found[fired], expected.expand_as(found)[fired], atol=1e-6)


def test_nothing_is_the_base_and_all_is_the_adapted_bit_for_bit(any_adapter: Adapter) -> None:
    run = functools.partial(predict, any_adapter.pipe, PROMPTS[:2])
    adapted = run()
    with base_only(any_adapter.pipe):
        base = run()
    assert not torch.equal(adapted, base)
    black = Image.new("1", (9, 5), 0)
    off = [[Steer(where=black, words="")]]
    off += [
        [Steer(strength=0)],
        [Steer(time=(0, 0.4))],
        [Steer(f"L{i}", 0) for i in range(len(any_adapter.statistics))],
    ]
    white = Image.new("1", (9, 5), 1)
    on = [[], [Steer(strength=1.0)], [Steer(time=(0.4, 1)), Steer("to_v", 1, where=LEFT)], [Steer(where=white)]]
    for steer, expected in [(steer, base) for steer in off] + [(steer, adapted) for steer in on]:
        with any_adapter.using(steer=steer):
            assert torch.equal(run(), expected), steer
        assert torch.equal(run(), adapted)


def test_where_multiplies_the_picture_tokens_as_its_rule_says(any_adapter: Adapter) -> None:
    pipe, backbone, prompts = any_adapter.pipe, backbone_of(any_adapter.pipe), PROMPTS[:3]
    grid = rows, columns = backbone.grid(denoiser(pipe), backbone.encode_pictures(pipe, torch.zeros(1, 3, 64, 64)))
    tokens = torch.rand(rows, columns, generator=torch.Generator().manual_seed(1))
    tokens[0], tokens[-1, 1:] = 0, 1
    conditioning = backbone.encode_prompts(pipe, prompts)
    for strength, within, beyond in ((None, 1, 0), (2.5, 2.5, 1), (0, 0, 1)):
        with any_adapter.using(steer=[Steer(strength=strength, where=np.kron(tokens, np.ones((2, 3))))]):
            found = factors(any_adapter, lambda: predict(pipe, prompts))
        for site, (factor,) in found.items():
            layout = backbone.layout(site, conditioning, grid)
            expected = torch.ones(layout.image.shape)
            if layout.image.any():
                own = layout.resample(tokens.view(1, -1), grid).flatten()
                expected[layout.image] = (own * (within - beyond) + beyond).repeat(len(prompts))
            assert same(factor, expected.unsqueeze(-1)), site


def test_time_is_the_time_of_each_row(any_adapter: Adapter) -> None:
    with any_adapter.using(steer=[Steer("to_v", 3, time=(0.3, 0.6)), Steer(time=(0.5, 1.0))]):
        found = factors(any_adapter, lambda: predict(any_adapter.pipe, PROMPTS[:4], 0.299, 0.3, 0.6, 0.61))
    for site, (factor,) in found.items():
        expected = torch.tensor([0.0, 0, 3, 1] if site.endswith("to_v") else [0.0, 0, 1, 1])
        assert same(factor, expected[:, None, None]), site


def test_words_are_those_of_the_prompt_in_the_branch_that_has_it(adapter: Adapter) -> None:
    pipe, backbone, prompts = adapter.pipe, backbone_of(adapter.pipe), PROMPTS[:2]
    with adapter.using(steer=[Steer(strength=3, words="KITE")]):
        found = factors(adapter, lambda: pipe(prompt=prompts, num_inference_steps=1, output_type="latent"))
    for site, forwards in found.items():
        rows = [row for factor in forwards for row in factor]
        # SD3: one forward, the branch without words first; Lumina2: two forwards, and text lies before the picture.
        said, silent = (rows[2:], rows[:2]) if len(forwards) == 1 else (rows[:2], rows[2:])
        assert all(same(row, torch.ones(())) for row in silent), site
        for row, prompt in zip(said, prompts, strict=True):
            expected = torch.ones(len(row), 1)
            if "add_" in site or site.startswith(("context_refiner", "layers")):
                expected[word_tokens(backbone.readings(pipe, prompt), "kite")] = 3
            assert same(row, expected), site


def test_words_of_every_family_lie_where_its_sites_see_them(family: Family, any_adapter: Adapter) -> None:
    """With guidance where the family has it: what is said in the prompt is not in the other branch."""
    pipe, backbone, prompts = any_adapter.pipe, backbone_of(any_adapter.pipe), PROMPTS[:2]
    call = {"num_inference_steps": 2, "output_type": "latent", **SIZE, **(family.guided or family.plain), **family.call}
    conditioning = backbone.encode_prompts(pipe, prompts)
    latents = backbone.encode_pictures(pipe, torch.zeros(2, 3, 64, 64))
    grid = backbone.grid(denoiser(pipe), latents)
    with any_adapter.using(steer=[Steer(strength=3, words="KITE")]):
        found = factors(any_adapter, lambda: pipe(prompt=list(prompts), **call))
    spelled = [word_tokens(backbone.readings(pipe, prompt), "kite") for prompt in prompts]
    raised = 0
    for site, forwards in found.items():
        layout = backbone.layout(site, conditioning, grid)
        texts = [(real & ~image).nonzero().flatten() for real, image in zip(layout.real, layout.image, strict=True)]
        rows = [row for factor in forwards for row in factor]
        wanted = [set(at[k].tolist()) for at, k in zip(texts, map(torch.tensor, spelled), strict=True) if len(at)]
        seen = [{i for i, value in enumerate(((row - 3).abs() < 1e-3).any(-1).tolist()) if value} for row in rows]
        assert all(not got or any(got <= want for want in wanted) for got in seen), site
        raised += sum(map(bool, seen))
        if family.guided and wanted:
            assert sum(map(bool, seen)) <= len(rows) // 2, site
    assert raised or backbone.family == "Qwen-Image"  # whose default sites see no text


@pytest.fixture
def apart(pipes: dict[str, Any]) -> Iterator[Adapter]:
    """Of a family that encodes negative prompts by themselves."""
    yield from lent(pipes["flux"])


def test_a_negative_prompt_that_says_the_word_is_not_steered(apart: Adapter) -> None:
    call = {"num_inference_steps": 1, "output_type": "latent", **SIZE, "true_cfg_scale": 3.0}
    said = []
    for negative in ("bad", "a bad kite"):
        with apart.using(steer=[Steer(strength=3, words="kite")]):
            found = factors(apart, lambda n=negative: apart.pipe(prompt=["a red kite"], negative_prompt=[n], **call))
        said.append({site: [bool(((f - 3).abs() < 1e-3).any()) for f in fs] for site, fs in found.items()})
    assert said[0] == said[1]
    assert any(first for first, _ in said[0].values())
    assert not any(second for _, second in said[0].values())


def test_a_later_batch_or_call_without_the_words_is_told(adapter: Adapter) -> None:
    for prompts, size in ((["a kite", "a boat"], 2), (["a kite", "a boat"], 1), (["a boat", "a kite"], 1)):
        for dials in ({"steer": [Steer(words="kite")]}, {"own_words": {"kite": "horse"}}):
            with adapter.using(**dials):
                atomtune.generate(adapter.pipe, ["a kite"], steps=1)
                with pytest.raises(UserError, match="'a boat'"):
                    atomtune.generate(adapter.pipe, prompts, steps=1, batch_size=size)
                atomtune.generate(adapter.pipe, ["a kite"], steps=1)


@pytest.mark.parametrize("family_name", ["flux", "klein", "qwen_image"])
def test_a_clock_that_is_told_in_bfloat16_has_that_much_slack(pipes: dict[str, Any], family_name: str) -> None:
    pipe, s = pipes[family_name], torch.linspace(0, 1, 501)
    given = {"hidden_states": torch.zeros(501, 4, 4), "img_ids": torch.zeros(4, 3), "img_shapes": [[(1, 2, 2)]]}
    heard = {
        dtype: backbone_of(pipe).heard(denoiser(pipe), given | {"timestep": (s * 1000).to(dtype) / 1000})
        for dtype in (torch.float32, torch.bfloat16)
    }
    exact, rough = heard.values()
    assert (exact.s - s).abs().max() < exact.slack < 1.1e-4
    assert exact.slack < (rough.s - s).abs().max() < rough.slack < 0.005


def test_steers_multiply_each_other_and_keep_to_their_adapter(adapter: Adapter) -> None:
    other = adapt(adapter.pipe, ("to_q",), "second")
    activate(adapter.pipe, "default", "second")
    steer = [Steer(["L0[3]", "L1"], 2), Steer("L0", 0.5), Steer(strength=3, time=(0.2, 0.7))]
    with adapter.using(steer=steer), other.using(steer=[Steer("L0", 0)]), adapter.using(steer=[Steer("L1[2]", 5)]):
        predict(adapter.pipe, PROMPTS[:2])
        found = [layer.steering["default"][0, 0].tolist() for layer in atom_layers(adapter.pipe).values()]
        assert found[:3] == [[1.5] * 3 + [3] + [1.5] * 4, [6] * 2 + [30] + [6] * 5, [3]]
        first, *others = atom_layers(adapter.pipe, "second").values()
        assert not first.steering["second"].any()
        assert not any("second" in layer.steering for layer in others)


def test_a_batch_paints_what_its_pictures_alone_do(adapter: Adapter) -> None:
    """With guidance: both branches in one batch, or in two forwards."""
    paint = functools.partial(atomtune.generate, adapter.pipe, PROMPTS, steps=2, guidance=3.0, output_type="latent")
    plain = torch.stack(paint())
    with adapter.using(steer=[Steer("to_v", 3, time=(0.4, 1)), Steer(where=LEFT), Steer("L1[2]", 2, words="kite")]):
        together, alone = torch.stack(paint()), torch.stack(paint(batch_size=1))
    assert torch.allclose(together, alone, atol=1e-4)
    assert ((together - plain).abs().amax((1, 2, 3)) > 0.01).all()


@pytest.mark.usefixtures("shapes_unchecked")
def test_compiled_it_is_the_same_and_one_graph_serves_all_steers(adapter: Adapter) -> None:
    torch._dynamo.reset()
    pipe, plain = adapter.pipe, adapter.pipe.transformer
    steers = (
        [Steer("to_v", 3, where=LEFT), Steer("to_q", 2, time=(0.2, 0.6)), Steer("L1", 3, words="kite")],
        [Steer("to_v", 0, where=1 - LEFT), Steer("to_q", time=(0.7, 1.0)), Steer("L1", 5, words="a")],
    )
    expected, graphs = [], set()
    for steer in steers:
        with adapter.using(steer=steer):
            expected.append(predict(pipe, PROMPTS[:2], 0.5, 0.8))
    # Lumina2's own forward reads lengths into Python.
    pipe.transformer = torch.compile(plain, fullgraph=hasattr(pipe, "tokenizer_3"), backend="eager")
    for steer, output in zip(steers, expected, strict=True):
        with adapter.using(steer=steer):
            assert torch.allclose(predict(pipe, PROMPTS[:2], 0.5, 0.8), output, atol=1e-5)
        graphs.add(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    pipe.transformer = plain
    assert len(graphs) == 1


def test_a_steer_that_says_nothing_sound_is_told() -> None:
    table: list[tuple[dict[str, Any], str]] = [
        ({}, "must have a `strength` or a limit"),
        ({"strength": math.nan}, "`strength` must be a finite number, got nan"),
        ({"time": (0.6, 0.6)}, "`time` must be (from, to) with 0 <= from < to <= 1, got (0.6, 0.6)"),
        ({"time": (0.6, 0.3)}, "`time` must be"),
        ({"time": (math.nan, 1)}, "`time` must be"),
        ({"words": " "}, "`words` must be some of the prompt's words, or empty for none, got ' '"),
        ({"where": Image.new("RGB", (4, 4))}, "`where` must be a picture of mode L or 1, got RGB. Convert it"),
        ({"where": np.ones((4, 4, 1))}, "`where` must be (height, width), got (4, 4, 1)"),
        ({"where": LEFT * 255}, "`where` must lie in [0, 1], got 0 to 255"),
        ({"where": LEFT * math.nan}, "`where` must lie in [0, 1], got nan"),
    ]
    for fields, message in table:
        with pytest.raises(UserError, match=re.escape(message)):
            Steer(**fields)


def test_what_is_not_there_is_told_with_what_is_close(adapter: Adapter) -> None:
    for atoms, message in (
        ("L0[9]", r"no atom L0\[9\]. Did you mean `L0\["),
        (["to_v", "too_q"], "no site 'too_q'. Did you mean .*to_q"),
        ("L99", "no site 'L99'. Did you mean `L"),
    ):
        with pytest.raises(UserError, match=message), adapter.using(steer=[Steer(atoms, 0)]):
            pass
    backbone, pipe = backbone_of(adapter.pipe), adapter.pipe
    given = backbone.encode_prompts(pipe, ["a kite"])
    with adapter.using(steer=[Steer(words="kit")]):
        with pytest.raises(UserError, match=r"got 'kit' for 'a kite'. Did you mean `kite`"):
            atomtune.generate(pipe, ["a kite"], steps=1)
        with pytest.raises(UserError, match="`words` needs the prompt's text"):
            backbone.predict(pipe.transformer, torch.zeros(1, 4, 8, 8), torch.ones(1), given)


def test_the_command_line_says_the_same(bases: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    base, run, mask = str(bases["lumina2"]), tmp_path / "run", tmp_path / "mask.png"
    adapter = adapt(atomtune.open_pipeline(base), ("to_q", "to_v"))
    adapter.save(run)
    Image.fromarray((LEFT * 255).astype(np.uint8)).save(mask)
    Image.open(mask).convert("P").save(tmp_path / "colour.png")
    asked = ["generate", str(run), "a kite", "--base", base, "--steps=2", "--out", str(tmp_path / "out")]
    for options, dials in (
        ("--site to_v=0 --atom L2[2]=3", {"atoms": {"L2[2]": 3}, "steer": [Steer("to_v", 0)]}),
        (f"--strength 2 --where {mask}", {"steer": [Steer(strength=2, where=LEFT)]}),
        ("--strength 2 --site L1=3 --words kite", {"strength": 2, "steer": [Steer("L1", 3, words="kite")]}),
        ("--time 0.9-1.0", {"steer": [Steer(time=(0.9, 1))]}),
        (f"--where {mask} --words=", {"steer": [Steer(where=LEFT, words="")]}),
        (f"--where {tmp_path / 'colour.png'}", {"steer": [Steer(where=LEFT)]}),
    ):
        assert main([*asked, *options.split()]) == 0
        with adapter.using(**dials):
            picture = np.asarray(atomtune.generate(adapter.pipe, ["a kite"], steps=2)[0])
        assert np.array_equal(picture, np.asarray(Image.open(capsys.readouterr().out.strip()))), options
    for options, message in (
        ("--site=to_v", "`site` must be like L17=2.5, each name once, got 'to_v'"),
        ("--time=0.5", "`time` must be like 0.6-1.0, got 0.5"),
        (f"--where={run}", "`where` must be a picture file, got"),
    ):
        assert main([*asked, options]) == 2
        assert f"error: {message}" in capsys.readouterr().err
