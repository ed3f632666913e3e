import dataclasses
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jaxtyping
import pytest
import torch

torch.set_num_threads(1)
# Pictures are compared bit for bit, and commands would take a GPU where there is one.
os.environ["CUDA_VISIBLE_DEVICES"] = ""

# The shapes in the annotations are executed: a wrong one fails the test that calls it.
jaxtyping.install_import_hook("atomtune.sparse", "beartype.beartype")

# For the tests of every folder: the tiny pipelines.
sys.path.insert(0, str(Path(__file__).parent / "contract"))


def pytest_configure(config: pytest.Config) -> None:
    # Shells ignore it in what they run in the background; some tests press Ctrl-C.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # Raised by dynamo itself on any autograd.Function, and swallowed there unless warnings are errors.
    config.addinivalue_line("filterwarnings", "ignore:.*should not be instantiated:DeprecationWarning")
    # torch's own, when diffusers' DPM-Solver hands its tensors to NumPy 2.
    config.addinivalue_line("filterwarnings", "ignore:__array__ implementation:DeprecationWarning")


@pytest.fixture
def shapes_unchecked() -> Iterator[None]:
    """For `torch.compile`, which cannot trace the checker."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of tiny random pipelines by family, each with its list of unrelated prompts."""
    from pipelines import FAMILIES, Made
    from tiny_parts import UNRELATED

    root, families = tmp_path_factory.mktemp("bases"), {family.name: family for family in FAMILIES}

    def make(name: str) -> Path:
        families[name].build().save_pretrained(root / name)
        (root / name / "unrelated.txt").write_text("\n".join(UNRELATED) + "\n")
        return root / name

    return Made(make)


@pytest.fixture(scope="module")
def pipes(bases: dict[str, Path]) -> dict[str, Any]:
    """Those pipelines, opened."""
    from pipelines import Made

    from atomtune.backbones import open_pipeline

    return Made(lambda name: open_pipeline(str(bases[name])))


@pytest.fixture(scope="module")
def shared(bases: dict[str, Path]) -> Any:
    """Lumina2's alone; a test leaves it as it was."""
    from atomtune.backbones import open_pipeline

    return open_pipeline(str(bases["lumina2"]))


@pytest.fixture(scope="session")
def kites(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three captioned pictures of a kite."""
    from PIL import Image

    from atomtune.scenes.render import render
    from atomtune.scenes.world import caption, scene

    folder = tmp_path_factory.mktemp("kites")
    for i, (position, color) in enumerate((("left", "red"), ("right", "blue"), ("top", "yellow"))):
        shot = scene("kite", position=position, color=color)
        Image.fromarray(render(shot)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(caption(shot))
    return folder


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for runs of every test, so that they share their cache of pictures that a base has painted."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture
def pipe(shared: Any) -> Iterator[Any]:
    """Lumina2's pipeline for a test that trains; the base again afterwards."""
    import atomtune

    yield shared
    if getattr(shared.transformer, "peft_config", None):
        atomtune.Adapter(shared, {}).remove()


@pytest.fixture
def go(pipe: Any, kites: Path, runs: Path, request: pytest.FixtureRequest) -> Callable[..., Path]:
    """Train under a name of its own; the pipeline is the base again afterwards. Returns the run's folder."""
    from tiny_runs import OPTIONS

    from atomtune.training.loop import train

    def go(name: str = "run", *, resume: bool = False, data: Path = kites, **changes: Any) -> Path:
        out = runs / f"{request.node.name}-{name}"
        told = {"allow_changed_data": changes.pop("allow_changed_data", False)}
        options = dataclasses.replace(OPTIONS, **changes)
        train(pipe, data, out, options, resume=resume, progress=False, **told).remove()
        return out

    return go
