"""Two processes under torchrun have the gradients that one has over twice the batches, the base whole or shared."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

SCRIPT = str(Path(__file__).with_name("gradients_script.py"))
LAUNCH = "-m torch.distributed.run --standalone --nproc-per-node 2"


def launch(*command: str) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *command], env=environment, capture_output=True, text=True, check=False, timeout=600
    )
    assert done.returncode == 0, done.stderr[-2000:]


def gradients(bases: dict[str, Path], kites: Path, out: Path, start: str, *more: str) -> dict[str, Tensor]:
    launch(*start.split(), SCRIPT, str(bases["sd3"]), str(kites), str(out), *more)
    return load_file(out)


@pytest.fixture(scope="module")
def one(bases: dict[str, Path], kites: Path, runs: Path) -> dict[str, Tensor]:
    return gradients(bases, kites, runs / "one.safetensors", "", "2")


@pytest.mark.parametrize("how", ["ddp", "fsdp2"])
def test_gradients_of_two_processes_equal_those_of_one(
    one: dict[str, Tensor], bases: dict[str, Path], kites: Path, runs: Path, how: str
) -> None:
    more = ["shard"] if how == "fsdp2" else []
    two = gradients(bases, kites, runs / f"{how}.safetensors", LAUNCH, "1", *more)
    assert one.keys() == two.keys()
    assert len(one) > 40
    for key, gradient in one.items():
        torch.testing.assert_close(two[key], gradient, rtol=1e-4, atol=1e-7)


def test_a_shared_base_trains_validates_samples_and_saves(bases: dict[str, Path], kites: Path, runs: Path) -> None:
    run = runs / "shared"
    small = (
        "--concept kite --steps 2 --n-atoms 2 --batch-size 1 --unrelated-pictures 2 --sites to_q to_out.0 --device cpu"
    )
    often = "--shard --validate-every 1 --sample-every 2 --sample-prompts kite"
    where = ["--base", str(bases["lumina2"]), "--data", str(kites), "--out", str(run)]
    launch(*LAUNCH.split(), "-m", "atomtune", "train", *where, *small.split(), *often.split())
    config = json.loads((run / "adapter_config.json").read_text())
    assert not config["base_fingerprint"].startswith("partial:"), "it was read while the base was whole"
    assert (run / "samples/step-000002-0.png").is_file()
    logs = [(run / name).read_text().splitlines() for name in ("log.jsonl", "log-1.jsonl")]
    scores = [[json.loads(line)["validation_score"] for line in lines] for lines in logs]
    assert scores[0] == scores[1]
    assert len(scores[0]) == 2
