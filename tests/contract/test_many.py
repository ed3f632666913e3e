"""Several adapters in one batch: each row as alone, in training and in serving."""

import os
import re
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tuner_models import Plain

import atomtune
from atomtune.cli import main
from atomtune.errors import UserError
from atomtune.serving import Server
from atomtune.training import config, many
from atomtune.training.many import Job, train_many
from atomtune.training.options import TrainOptions
from atomtune.tuner import BASE, AtomConfig, activate, assigned, atom_layers, attach

SITES = ("layers.0.attn.to_q", "layers.1.attn.to_v")


CONCEPTS = ("sks dog", "zyx bird")
SMALL: dict[str, Any] = {"steps": 4, "n_atoms": 4, "lr": 0.05, "batch_size": 2, "unrelated_pictures": 4}


def _options(concept: str, **fields: Any) -> TrainOptions:
    return TrainOptions(concept, sites=SITES, **SMALL | fields)


@pytest.fixture(scope="module")
def root(bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two concepts trained by themselves, and together."""
    folder = tmp_path_factory.mktemp("many")
    pipe = atomtune.open_pipeline(str(bases["lumina2"]))
    jobs = []
    for concept, shade in zip(CONCEPTS, (60, 200), strict=True):
        data = folder / concept[:3]
        data.mkdir()
        for i in range(2):
            Image.new("RGB", (64, 64), (shade, 90 * i, 255 - shade)).save(data / f"{i}.png")
            (data / f"{i}.txt").write_text(f"a {concept} on a {('red', 'very dark blue')[i]} background")
        atomtune.train(pipe, data, folder / f"alone-{concept[:3]}", _options(concept), progress=False).remove()
        jobs.append(Job(data, folder / f"many-{concept[:3]}", _options(concept)))
    assert train_many(pipe, jobs, progress=False) == [job.out for job in jobs]
    assert not hasattr(pipe.transformer, "peft_config")
    return folder


@pytest.mark.parametrize("concept", ["sks", "zyx"])
def test_trained_together_as_alone(root: Path, concept: str) -> None:
    alone, many = (load_file(root / f"{how}-{concept}/adapter_model.safetensors") for how in ("alone", "many"))
    assert alone.keys() == many.keys()
    for key, value in alone.items():
        torch.testing.assert_close(many[key], value, rtol=1e-3, atol=1e-4, msg=key)
    assert (root / f"many-{concept}/log.jsonl").read_text().count("\n") == 4
    assert (root / f"many-{concept}/checkpoints/step-000004").is_dir()


def _jobs(root: Path, out: Path, **fields: Any) -> list[Job]:
    return [Job(root / concept[:3], out / concept[:3], _options(concept, **fields)) for concept in CONCEPTS]


def _same(root: Path, out: Path) -> None:
    """What was trained there is what was trained together in one go."""
    for concept in CONCEPTS:
        expected, found = (
            load_file(folder / "adapter_model.safetensors")
            for folder in (root / f"many-{concept[:3]}", out / concept[:3])
        )
        for key, value in expected.items():
            torch.testing.assert_close(found[key], value, rtol=1e-3, atol=1e-4, msg=key)


def test_checkpointed_gradients_are_each_row_s_own(root: Path, bases: dict[str, Path], tmp_path: Path) -> None:
    pipe = atomtune.open_pipeline(str(bases["lumina2"]))
    train_many(pipe, _jobs(root, tmp_path, gradient_checkpointing=True), progress=False)
    _same(root, tmp_path)


def test_stopped_together_they_go_on(
    root: Path,
    bases: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Ctrl-C ends the step and keeps it; one whose last checkpoint is gone catches up."""
    pipe, jobs = atomtune.open_pipeline(str(bases["lumina2"])), _jobs(root, tmp_path)
    step = many._step

    def pressed(runs: Any, number: int, plain: Any) -> Any:
        if number == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return step(runs, number, plain)

    monkeypatch.setattr(many, "_step", pressed)
    with pytest.raises(KeyboardInterrupt):
        train_many(pipe, jobs, progress=False)
    monkeypatch.undo()
    assert "stopped after step 2; go on with the same command and --resume" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "zyx/checkpoints/step-000002")
    train_many(pipe, jobs, resume=True, progress=False)
    _same(root, tmp_path)
    written = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    train_many(pipe, jobs, resume=True, progress=False)
    assert written == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    (tmp_path / "zyx").rename(tmp_path / ".zyx.previous")  # killed while the finished adapter took its place
    train_many(pipe, jobs, resume=True, progress=False)
    assert written == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}


def test_an_adapter_of_the_user_stays(root: Path, bases: dict[str, Path], tmp_path: Path) -> None:
    pipe = atomtune.open_pipeline(str(bases["lumina2"]))
    attach(pipe, AtomConfig(n_atoms=2, target_modules=list(SITES)), "job0")
    with pytest.raises(UserError, match="'job0' is already attached"):
        train_many(pipe, _jobs(root, tmp_path), progress=False)
    assert atom_layers(pipe, "job0")


def test_a_file_of_concepts(
    root: Path, bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command trains what the call does, and puts a run beside the others where no `out` is given."""
    monkeypatch.chdir(tmp_path)
    shared = config.text({"base": bases["lumina2"], "device": "cpu", "sites": SITES, **SMALL})
    tables = "".join(
        f"[[concepts]]\n{config.text({'data': root / concept[:3], 'concept': concept})}" for concept in CONCEPTS
    )
    Path("file.toml").write_text(shared + tables)
    assert main(["many", "file.toml"]) == 0
    for concept in CONCEPTS:
        name = f"{concept[:3]}/adapter_model.safetensors"
        assert (Path("runs") / name).read_bytes() == (root / f"many-{name}").read_bytes()
        run = (Path("runs") / concept[:3] / "config.toml").read_text()
        assert f'concept = "{concept}"' in run
        assert 'device = "cpu"' in run


def test_a_mistake_in_one_concept_leaves_the_folders_of_all_free(
    root: Path, bases: dict[str, Path], tmp_path: Path
) -> None:
    pipe = atomtune.open_pipeline(str(bases["lumina2"]))
    bare = tmp_path / "bare"
    bare.mkdir()
    Image.new("RGB", (64, 64)).save(bare / "0.png")
    jobs = [Job(data, tmp_path / "runs" / data.name, _options("sks dog")) for data in (root / "sks", bare)]
    with pytest.raises(UserError, match="caption"):
        train_many(pipe, jobs, progress=False)
    assert not (tmp_path / "runs/sks").exists()
    assert not getattr(pipe.transformer, "peft_config", None)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("steps = 3", r"there must be a \[\[concepts\]\] table for each concept, got None"),
        ("concepts = 3", r"there must be a \[\[concepts\]\] table"),
        ("[[concepts]]", r"\[\[concepts\]\] 1: `data` must be a folder of pictures, got none"),
        ("stebs = 3\n[[concepts]]\ndata = 'a'", "unknown option 'stebs'. Did you mean `steps`"),
        ("[[concepts]]\ndata = 'a'\nsteps = 3", r"\[\[concepts\]\] 1: unknown option 'steps'"),
        ("[[concepts]]\ndata = 'a'\nconcept = {a = 1}", "`concept` must be a value"),
    ],
)
def test_a_file_that_says_nothing_of_use(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, message: str
) -> None:
    (tmp_path / "file.toml").write_text(text)
    assert main(["many", str(tmp_path / "file.toml")]) == 2
    err = capsys.readouterr().err
    assert re.search(message, err), err
    assert err.count("\n") == 1


@pytest.mark.parametrize("field", [{"sparsity": 0.1}, {"sparsifier": "batch_topk", "k": 2}, {"buckets": True}])
def test_what_cannot_be_trained_together(field: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=next(iter(field)) if len(field) == 1 else "batch_topk"):
        train_many(None, [Job(Path("a"), Path("b"), _options("sks", **field))])


def test_options_that_differ() -> None:
    jobs = [Job(Path("a"), Path(out), _options("sks", n_atoms=n)) for out, n in (("b", 4), ("c", 8))]
    with pytest.raises(UserError, match="`n_atoms` must be the same"):
        train_many(None, jobs)


@pytest.fixture
def plain() -> Plain:
    torch.manual_seed(0)
    return Plain().eval()


@pytest.mark.parametrize("sizes", [(4, 4), (4, 6)])
@pytest.mark.parametrize("sparsifier", ["relu", "topk", "jumprelu"])
def test_rows_have_adapters_of_their_own(plain: Plain, sizes: tuple[int, int], sparsifier: str) -> None:
    x = torch.randn(5, 8, requires_grad=True)
    expected_base = plain(x)
    for name, size in zip("ab", sizes, strict=True):
        attach(plain, AtomConfig(n_atoms=size, k=2, sparsifier=sparsifier, threshold=0.1, target_modules=["up"]), name)
        for layer in atom_layers(plain, name).values():
            torch.nn.init.normal_(layer.dictionary(name).atoms)
    names = ["a", "a", "b", BASE, "a"]
    alone = {}
    for name in "ab":
        activate(plain, name)
        alone[name] = plain(x)
    with assigned(plain, names):
        mixed = plain(x)
    for row, name in enumerate(names):
        if name == BASE:
            assert torch.equal(mixed[row], expected_base[row])
        else:
            torch.testing.assert_close(mixed[row], alone[name][row], rtol=1e-4, atol=1e-5)
    mixed.sum().backward()
    with pytest.raises(UserError, match="No atom adapter 'nobody'"), assigned(plain, ["nobody"]):
        pass


def test_serving(root: Path, bases: dict[str, Path]) -> None:
    pipe = atomtune.open_pipeline(str(bases["lumina2"]))
    folders = {name: root / f"alone-{name[:3]}" for name in ("sks", "zyx", "sks-2")}
    requests = [("sks", "a sks dog"), (None, "a sks dog"), ("zyx", "a zyx bird"), ("sks-2", "a sks dog")]
    call = {"num_inference_steps": 2}
    plain = atomtune.generate(pipe, [prompt for _, prompt in requests], seed=[0, 0, 1, 0], batch_size=2, **call)
    server = Server(pipe, folders, held=2)
    painted = server.generate(requests, seeds=[0, 0, 1, 0], **call)
    assert list(server.slots) == ["zyx", "sks-2"]
    assert server.loads == 3
    assert np.array_equal(painted[1], plain[1])
    server.close()
    for at in (0, 2, 3):
        adapter = atomtune.load(pipe, folders[requests[at][0] or ""])
        (alone,) = atomtune.generate(pipe, [requests[at][1]], seed=[0, 0, 1, 0][at], **call)
        adapter.remove()
        assert np.abs(np.asarray(alone, int) - np.asarray(painted[at], int)).max() <= 1
        assert not np.array_equal(alone, plain[at]), "there is something to serve"
    with pytest.raises(UserError, match=r"No adapter is named 'sk'\. Did you mean `sks`"):
        server.generate([("sk", "a")], seeds=[0])
    for wrong, told in (
        ({"batch_size": 0}, "`batch_size` must be at least 1"),
        ({"seeds": [0, -1]}, "at least 0 and b"),
    ):
        with pytest.raises(UserError, match=told):
            server.generate([("sks", "a"), (None, "a")], **{"seeds": [0, 1]} | wrong)
    assert server.loads == 3
    three = Server(pipe, {}, held=1).generate(
        [(None, "a")] * 3, seeds=[0, 1, 2], steps=1, negative_prompt=["x", "y", "z"]
    )
    one = atomtune.generate(pipe, "a", seed=2, steps=1, negative_prompt=["z"])
    assert np.array_equal(three[2], one[0])
