"""LoRA out and in: every door that loads an export, the oracle of the regression, and what a user gets wrong."""

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import atomtune
from atomtune import lora
from atomtune.backbones import backbone_of, denoiser
from atomtune.cli import main
from atomtune.data.folder import scan
from atomtune.errors import UserError
from atomtune.lora import captions, export_lora, fit_autoencoder, import_lora, learned
from atomtune.steering import Steer
from atomtune.training.ends import attach_atoms
from atomtune.training.options import TrainOptions
from atomtune.tuner import atom_layers
from atomtune.tuner.lora import error_of, factors, lora_of, reduced_rank

PROMPT = "a big 3d kite on a red background"
Predict = Callable[[], Tensor]


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lora, "PICTURES", 2)
    monkeypatch.setattr(lora, "FIT_STEPS", 300)


@pytest.fixture(scope="module", params=["sd3", "lumina2"])
def pipe(request: pytest.FixtureRequest, bases: dict[str, Path]) -> Any:
    return atomtune.open_pipeline(str(bases[request.param]))


@pytest.fixture(scope="module")
def predict(pipe: Any) -> Predict:
    return predictor(pipe)


def predictor(pipe: Any) -> Predict:
    """What the pipeline's model answers to one input, whatever is attached to it."""
    backbone = backbone_of(pipe)
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    words = backbone.encode_prompts(pipe, [PROMPT])

    @torch.no_grad()
    def predict() -> Tensor:
        return backbone.predict(denoiser(pipe), latents, torch.tensor([0.5]), words)

    return predict


def random_atoms(pipe: Any, n_atoms: int, **fields: Any) -> atomtune.Adapter:
    """An adapter at every site of the family, whose atoms all do something."""
    attach_atoms(pipe, backbone_of(pipe), TrainOptions(n_atoms=n_atoms), **fields)
    torch.manual_seed(3)
    for layer in atom_layers(pipe).values():
        nn.init.normal_(layer.dictionary("default").atoms, std=0.1)
    return atomtune.Adapter(pipe, {})


def random_lora(pipe: Any, folder: Path, sites: tuple[str, ...] = ("attn.to_q", "attn.to_out.0")) -> Path:
    """A LoRA of rank 2 as diffusers itself trains and saves it, its keys without a prefix."""
    base = denoiser(pipe)
    base.add_adapter(LoraConfig(r=2, lora_alpha=8, target_modules=list(sites)), "theirs")
    torch.manual_seed(4)
    for name, parameter in base.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    base.save_lora_adapter(folder, "theirs")
    base.unload_lora()
    return folder / "pytorch_lora_weights.safetensors"


# ---------------------------------------------------------------------------------------------------- export


def test_dense_atoms_leave_exactly_and_by_every_door(pipe: Any, predict: Predict, tmp_path: Path) -> None:
    """The dials are part of what leaves; a rank above the number of atoms changes nothing."""
    adapter = random_atoms(pipe, 3, sparsifier="dense", normalize=False, encoder_bias=False)
    for layer in atom_layers(pipe).values():
        layer.atom_strength["default"][0] = 0.5
    adapted, sites, folder = predict(), set(atom_layers(pipe)), str(tmp_path / "lora")
    done = export_lora(adapter, folder, [PROMPT], rank=5, steps=1)
    adapter.remove()
    base, model = predict(), pipe.transformer
    assert (done.lost_in_all < 1e-9, set(done.lost)) == (True, sites)
    assert not torch.allclose(base, adapted, atol=1e-2)
    doors: tuple[Callable[[], Any], ...] = (
        lambda: pipe.load_lora_weights(folder),
        lambda: model.load_lora_adapter(folder, use_safetensors=True),
        lambda: PeftModel.from_pretrained(model, folder),
    )
    for door in doors:
        door()
        assert set(factors(model, next(iter(model.peft_config)))) == sites
        torch.testing.assert_close(predict(), adapted, rtol=1e-4, atol=1e-5)
        model.unload_lora()
        assert torch.equal(predict(), base)


def test_a_unet_leaves_and_comes_back(bases: dict[str, Path], tmp_path: Path) -> None:
    """Its part of the pipeline has another name, and diffusers loads nothing of a LoRA for the wrong one."""
    pipe = atomtune.open_pipeline(str(bases["sdxl"]))
    predict, folder = predictor(pipe), tmp_path / "lora"
    adapter = random_atoms(pipe, 2, sparsifier="dense", normalize=False, encoder_bias=False)
    adapted = predict()
    export_lora(adapter, folder, [PROMPT], rank=2, steps=1)
    adapter.remove()
    assert not torch.allclose(predict(), adapted, atol=1e-2)
    pipe.load_lora_weights(str(folder))
    torch.testing.assert_close(predict(), adapted, rtol=1e-4, atol=1e-5)
    pipe.unet.unload_lora()
    with lora_of(pipe, folder) as parts:
        assert parts
        torch.testing.assert_close(predict(), adapted, rtol=1e-4, atol=1e-5)


def test_an_export_is_near_and_says_how_far_it_is(pipe: Any, predict: Predict, tmp_path: Path) -> None:
    adapter = random_atoms(pipe, 6, threshold=0.0)
    wrong = ({"rank": 0}, "`rank` must be between 1 and"), ({"rank": 10**4}, r"smallest site \(\d+\), got 10000")
    for options, message in (*wrong, ({"rank": 1, "weight": math.nan}, "`weight` must be a number")):
        with pytest.raises(UserError, match=message):
            export_lora(adapter, tmp_path, [PROMPT], **options)
    assert not list(tmp_path.iterdir())
    adapted, lost = predict(), []
    for rank in (1, 5):
        done = export_lora(adapter, tmp_path, [PROMPT], rank=rank, steps=2, weight=0.1)
        assert all(0 <= share <= 1 for share in done.lost.values())
        assert min(done.drift_before, done.drift_after) > 0, "no gate holds it back"
        lost.append(done.lost_in_all)
        assert torch.equal(predict(), adapted), "nothing else is left attached"
    assert 1 > lost[0] > lost[1] > 0
    adapter.remove()
    base = predict()
    pipe.load_lora_weights(str(tmp_path))
    assert (predict() - adapted).norm() < 0.7 * (base - adapted).norm()
    pipe.transformer.unload_lora()


def test_dense_atoms_that_are_limited_are_no_lora(pipe: Any, tmp_path: Path) -> None:
    """Where a dial leaves nothing, there is nothing to export; where it leaves some, the least squares see that."""
    adapter = random_atoms(pipe, 3, sparsifier="dense", normalize=False, encoder_bias=False)
    seen = {name: torch.ones(3) for name in ("effect", "density", "purity")}
    adapter.statistics = dict.fromkeys(atom_layers(pipe), seen)
    whole = export_lora(adapter, tmp_path / "whole", [PROMPT], rank=3, steps=1)
    with (
        adapter.using(steer=[Steer(strength=0)]),
        pytest.raises(UserError, match="`prompt` must make atoms fire"),
    ):
        export_lora(adapter, tmp_path / "none", [PROMPT], rank=3, steps=1)
    with adapter.using(steer=[Steer(time=(0.99, 1.0), strength=0.5)]):
        half = export_lora(adapter, tmp_path / "half", [PROMPT], rank=3, steps=1)
    assert half.drift_before < whole.drift_before
    adapter.remove()


def test_prompts_that_no_atom_hears_are_told(pipe: Any, tmp_path: Path) -> None:
    adapter = random_atoms(pipe, 4, sparsifier="relu")
    for layer in atom_layers(pipe).values():
        layer.dictionary("default").bias.data.fill_(1e6)
    with pytest.raises(UserError, match="`prompt` must make atoms fire, got 'a big 3d kite") as told:
        export_lora(adapter, tmp_path / "lora", [PROMPT], rank=2, steps=1)
    adapter.remove()
    assert "\n" not in str(told.value)
    assert not (tmp_path / "lora").exists()


def test_the_regression_is_the_textbooks() -> None:
    """Izenman's: least squares, then the best low rank of what is fitted. And no other factors come closer."""
    torch.manual_seed(0)
    x, codes = torch.randn(200, 7).double() @ torch.randn(7, 7).double(), torch.rand(200, 4).double()
    atoms = torch.randn(4, 5).double()
    codes += torch.relu(x[:, :4])
    z, y = torch.cat([x, codes], 1), codes @ atoms
    fitted = torch.linalg.lstsq(x, y).solution
    _, _, v = torch.linalg.svd(x @ fitted, full_matrices=False)
    for rank in (1, 2, 4):
        down, up = reduced_rank(z.T @ z, atoms, rank)
        assert down.shape == (rank, 7)
        best = fitted @ v[:rank].T @ v[:rank]
        error, energy = error_of(down, up, z.T @ z, atoms)
        assert error == pytest.approx((x @ down.T @ up - y).square().sum().item())
        assert energy == pytest.approx(y.square().sum().item())
        assert error == pytest.approx((x @ best - y).square().sum().item(), rel=1e-3)


# ---------------------------------------------------------------------------------------------------- import


def test_a_lora_comes_in_as_components_exactly(pipe: Any, predict: Predict, tmp_path: Path) -> None:
    """Diffusers' file with its scale, and PEFT's folder with its config; as the loaders themselves have it."""
    file = random_lora(pipe, tmp_path / "theirs")
    peft = tmp_path / "peft"
    peft.mkdir()
    named = {f"base_model.model.{key}": tensor for key, tensor in load_file(file).items()}
    save_file(named, peft / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 8, "target_modules": ["attn.to_q", "attn.to_out.0"]}
    (peft / "adapter_config.json").write_text(json.dumps(config))
    pipe.transformer.load_lora_adapter(str(file), prefix=None, use_safetensors=True)
    theirs = predict()
    pipe.transformer.unload_lora()
    base = predict()
    for path in (file, file.parent, peft):
        adapter, lost = import_lora(pipe, path, [PROMPT], exact=True, steps=1)
        torch.testing.assert_close(predict(), theirs, rtol=1e-4, atol=1e-4)
        assert (lost, len(adapter.atoms)) == (0, 2 * len(atom_layers(pipe)))
        with adapter.using(density=0):
            assert torch.equal(predict(), base)
        adapter.remove()
        assert torch.equal(predict(), base)


def test_the_fit_does_not_depend_on_how_lora_shares_its_sizes() -> None:
    """Two of eight directions do nearly nothing, and one matrix is a thousand times the other."""
    torch.manual_seed(0)
    x, down, up = torch.randn(500, 12), torch.randn(8, 12), torch.randn(8, 10)
    up[6:] *= 1e-4
    sizes = torch.logspace(-3, 3, 8)[:, None]
    for left, right in ((down, up), (down * sizes, up / sizes)):
        rows, (error, energy) = fit_autoencoder(left, right, x @ left.T, 0)
        assert energy == pytest.approx((x @ down.T @ up).square().sum().item(), rel=1e-3)
        added = torch.relu(x @ rows["encoder"].T - rows["bias"]) @ rows["atoms"]
        assert error == pytest.approx((added - x @ down.T @ up).square().sum().item(), rel=1e-2)
        assert error < 0.15 * energy


def test_the_commands_go_out_and_in(
    bases: dict[str, Path], kites: Path, runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    run, lora, atoms = runs / "lora", tmp_path / "lora", tmp_path / "atoms"
    pipe = atomtune.open_pipeline(str(bases["lumina2"]))
    options = TrainOptions("kite", "house", gate=False, steps=3, n_atoms=4, lr=0.1, unrelated_pictures=2)
    options = dataclasses.replace(options, sites=("layers.0.attn.to_q",))
    adapter = atomtune.train(pipe, kites, run, options, progress=False)
    assert captions(adapter, run) == ("a big 3d kite on a yellow background, on the left",)
    with pytest.raises(UserError, match=r"`prompt` or `data` must be given, since .* names no concept with a class"):
        captions(adapter, tmp_path)
    (tmp_path / "options.json").write_text(TrainOptions("kite", "zeppelin").to_json())
    with pytest.raises(UserError, match="since no unrelated prompt says the class noun 'zeppelin'"):
        captions(adapter, tmp_path)
    (tmp_path / "options.json").write_text(TrainOptions("neon", trigger=True).to_json())
    assert all(caption.startswith("neon, ") for caption in learned(kites, tmp_path))
    assert learned(kites, run)[0] == scan(kites).samples[0].caption

    assert main(["export", str(run), "--rank", "2", "--data", str(kites), "--steps", "1", "--out", str(lora)]) == 0
    assert capsys.readouterr().out.split()[1] == "layers.0.attn.to_q"
    assert main(["export", str(run), "--out", str(lora)]) == 2
    assert "`out` must not exist yet" in capsys.readouterr().err

    asked = ["--base", str(bases["lumina2"]), "--steps", "1", "--out", str(atoms)]
    assert main(["import", str(lora), *asked]) == 2
    assert "`prompt` must be given" in capsys.readouterr().err
    assert main(["import", str(lora), "--prompt", PROMPT, *asked]) == 0
    assert capsys.readouterr().out == f"{atoms}\n"
    assert main(["atoms", str(atoms), "--top", "3"]) == 0
    assert "L0[" in capsys.readouterr().out


@pytest.fixture(scope="module")
def theirs(pipe: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    return load_file(random_lora(pipe, tmp_path_factory.mktemp("theirs")))


FOREIGN: dict[str, Callable[[dict[str, Tensor]], dict[str, Tensor]]] = {
    r"keys do not fit, such as .*proj_(q|out)": lambda t: {k.replace("to_", "proj_"): v for k, v in t.items()},
    r"keys do not fit, .*lora_A.*size mismatch": lambda t: {k: v[:, :-1] if "lora_A" in k else v for k, v in t.items()},
    r"1 keys do not fit, such as text_encoder\.x": lambda t: (
        {f"transformer.{k}": v for k, v in t.items()} | {"text_encoder.x": torch.ones(2)}
    ),
    "1 keys do not fit, such as .*lora_A": lambda t: {k: t[k] for k in sorted(t)[1:]},
    "1 keys do not fit, such as .*dora_scale": lambda t: t | {min(t).split("lora")[0] + "dora_scale": torch.ones(3)},
    "holds NaN or infinite values": lambda t: t | {min(t): t[min(t)] * torch.nan},
    "changes nothing": lambda t: {k: v * ("lora_A" in k) for k, v in t.items()},
    r"keys do not fit, such as a\.weight": lambda t: {"a.weight": torch.ones(2)},
}


@pytest.mark.parametrize("message", FOREIGN)
def test_a_foreign_lora_is_one_line_and_leaves_the_base(
    pipe: Any, predict: Predict, theirs: dict[str, Tensor], tmp_path: Path, message: str
) -> None:
    before = predict()
    save_file({k: v.contiguous() for k, v in FOREIGN[message](theirs).items()}, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=message) as caught:
        import_lora(pipe, tmp_path / "x.safetensors", [PROMPT])
    assert "\n" not in str(caught.value)
    assert not getattr(pipe.transformer, "peft_config", None)
    assert torch.equal(predict(), before)


def test_a_lora_of_what_reads_no_tokens_comes_in_too(pipe: Any, predict: Predict, tmp_path: Path) -> None:
    before = predict()
    file = random_lora(pipe, tmp_path, ("attn.to_q", "timestep_embedder.linear_2"))
    for exact in (True, False):
        adapter, _ = import_lora(pipe, file, [PROMPT], exact=exact, steps=1)
        assert any(site.endswith("timestep_embedder.linear_2") for site in adapter.statistics)
        assert not torch.equal(predict(), before)
        adapter.remove()
        assert torch.equal(predict(), before)


def test_what_is_no_safetensors_file_is_not_opened(pipe: Any, tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(b"not at all")
    torch.save({}, tmp_path / "x.bin")
    for name, message in (("x.safetensors", "is broken"), ("x.bin", "pickled"), ("y.safetensors", "there is none")):
        with pytest.raises(UserError, match=message):
            import_lora(pipe, tmp_path / name, [PROMPT])
