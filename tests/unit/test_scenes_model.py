"""The embedded model: a plain diffusers folder, quiet, small, and ready for its default arguments."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, Lumina2Pipeline

import atomtune
from atomtune.backbones import EMBEDDED, base_name
from atomtune.scenes.model import PREFIX, build_tokenizer, folder
from atomtune.scenes.world import CLASS_OF, OBJECTS, RESERVED, TUNING, caption, scene
from atomtune.training.options import TrainOptions
from atomtune.training.prepare import default_side, unrelated_list

ASSETS = folder().parent


@pytest.fixture(scope="module")
def pipe() -> Lumina2Pipeline:
    return atomtune.open_pipeline(EMBEDDED)


def test_plain_diffusers_loads_it_and_paints_with_default_arguments() -> None:
    pipe = DiffusionPipeline.from_pretrained(folder())
    assert type(pipe) is Lumina2Pipeline
    picture = pipe("a big flat apple on a red background, on the left", num_inference_steps=2).images[0]
    assert picture.size == (64, 64)
    assert np.asarray(picture).std() > 5


def test_it_opens_without_a_word() -> None:
    """In a fresh process, where libraries say things once; progress bars are all that may be seen."""
    code = "import torch, atomtune; pipe = atomtune.open_pipeline('embedded'); assert pipe.dtype == torch.float32"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    said = [line for line in re.split(r"[\r\n]|\x1b\[A", done.stderr) if line.strip() and "it/s]" not in line]
    assert said == []


def test_it_is_known_by_its_name(pipe: Lumina2Pipeline) -> None:
    assert base_name(pipe) == EMBEDDED
    assert default_side(pipe) == 64
    assert type(pipe) is Lumina2Pipeline
    assert atomtune.open_pipeline(EMBEDDED, "bfloat16").dtype == torch.bfloat16


def test_all_weights_are_small_and_in_half_precision() -> None:
    from safetensors import safe_open

    files = [path for path in ASSETS.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 25 * 2**20
    assert not [path for path in files if path.suffix in (".bin", ".pt", ".pkl", ".ckpt")]
    for path in (ASSETS / "model").rglob("*.safetensors"):
        with safe_open(path, "pt") as weights:
            assert {weights.get_slice(key).get_dtype() for key in weights.keys()} == {"F16"}, path  # noqa: SIM118


def test_weights_are_finite(pipe: Lumina2Pipeline) -> None:
    for module in (pipe.transformer, pipe.text_encoder, pipe.vae):
        assert all(p.isfinite().all() for p in module.parameters())


def test_its_unrelated_prompts_are_captions_of_known_objects(pipe: Lumina2Pipeline) -> None:
    prompts = unrelated_list(pipe, TrainOptions())
    assert len(prompts) > 300
    unseen = re.compile(rf"\b({'|'.join(map(re.escape, {*RESERVED, *TUNING} - {'mouse'}))})\b")
    assert not [prompt for prompt in prompts if unseen.search(prompt)]
    assert any(name in " ".join(prompts) for name in OBJECTS)


def test_the_tokenizer_knows_every_name_and_any_other_text(pipe: Lumina2Pipeline) -> None:
    tokenizer = pipe.tokenizer
    text = f"{PREFIX}a naïve café — 東京, 100%"
    assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True).replace(PREFIX, "").strip() == (
        "a naïve café — 東京, 100%"
    )
    prefix = tokenizer(PREFIX, add_special_tokens=False).input_ids
    assert len(prefix) == 1
    for name in CLASS_OF:
        ids = tokenizer(f"a {name}", add_special_tokens=False).input_ids
        assert not any(token.startswith("<") for token in tokenizer.convert_ids_to_tokens(ids)), name
        assert len(ids) <= 1 + (2 if name in OBJECTS else 4), name
    longest = max(len(tokenizer(PREFIX + caption(scene(name))).input_ids) for name in CLASS_OF)
    assert longest <= 32


def test_the_tokenizer_is_made_the_same_again(pipe: Lumina2Pipeline, tmp_path: Path) -> None:
    text = caption(scene("kite"))
    assert build_tokenizer()(PREFIX + text).input_ids == pipe.tokenizer(PREFIX + text).input_ids
