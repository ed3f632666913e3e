"""Every example runs, on a tiny pipeline, and leaves what it says."""

from pathlib import Path

import pytest
from PIL import Image

import atomtune
from atomtune.scenes.render import render
from atomtune.scenes.world import scene
from atomtune.training.options import TrainOptions

EXAMPLES = Path(__file__).parents[2] / "examples"
LEFT = {
    "dial": ("0.0.png", "curve.svg", "small/adapter_config.json"),
    "edit": ("strips/01.png", "pictures/01-03.png", "run/adapter_config.json", "another.png"),
    "exchange": ("lora.png", "atoms/adapter_config.json"),
    "many": ("dog-0/adapter_config.json", "dog-1/log.jsonl", "first.png", "base.png", "second.png"),
    "mix": ("both.png", "halves.png", "fewer.png", "parts/mixture.json", "one/adapter_config.json"),
    "see": ("*.png",),
    "steer": ("off.png", "early.png", "left.png", "words.png", "all.png"),
    "surgery": ("notes.json",),
}
"""Files under runs/examples/ of each."""


@pytest.fixture(scope="module")
def workplace(bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the examples speak of: pictures of a dog, an adapter of it, and one of a style."""
    folder = tmp_path_factory.mktemp("examples")
    (folder / "my-dog").mkdir()
    for i, color in enumerate(("red", "blue")):
        Image.fromarray(render(scene("mouse", "3d", "big", "middle", color))).save(folder / f"my-dog/{i}.png")
        (folder / f"my-dog/{i}.txt").write_text(f"a sks dog on a {color} background")
    pipe = atomtune.open_pipeline(str(bases["lumina2"]))
    sites = ("layers.0.attn.to_q", "layers.1.attn.to_v")
    for name in ("my-dog", "my-style"):
        options = TrainOptions("sks dog", steps=3, n_atoms=4, lr=0.1, batch_size=1, unrelated_pictures=2, sites=sites)
        atomtune.train(pipe, folder / "my-dog", folder / "runs" / name, options, progress=False).remove()
    return folder


def test_every_example_is_tried() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} == set(LEFT)


@pytest.mark.parametrize("name", LEFT)
def test_an_example_runs(name: str, workplace: Path, bases: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    code = (EXAMPLES / f"{name}.py").read_text(encoding="utf-8")
    assert code.count("# %%") >= 3
    assert code.count('"embedded"') == 1
    monkeypatch.chdir(workplace)
    exec(compile(code.replace('"embedded"', repr(str(bases["lumina2"]))), f"{name}.py", "exec"), {})
    folder = workplace / "runs/examples" / {"exchange": "lora"}.get(name, name)
    for left in LEFT[name]:
        assert list(folder.glob(left)), left
