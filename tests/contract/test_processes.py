"""Two processes under torchrun have the gradients that one has over twice the batches."""

import os
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

SCRIPT = str(Path(__file__).with_name("gradients_script.py"))
LAUNCH = "-m torch.distributed.run --standalone --nproc-per-node 2"


def test_gradients_of_two_processes_equal_those_of_one(bases: dict[str, Path], kites: Path, runs: Path) -> None:
    found = []
    for name, start, accumulation in (("one", [], "2"), ("two", LAUNCH.split(), "1")):
        out = runs / f"{name}.safetensors"
        command = [sys.executable, *start, SCRIPT, str(bases["sd3"]), str(kites), str(out), accumulation]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)
        assert done.returncode == 0, done.stderr[-2000:]
        found.append(load_file(out))
    one, two = found
    assert one.keys() == two.keys()
    assert len(one) > 40
    for key, gradient in one.items():
        torch.testing.assert_close(two[key], gradient, rtol=1e-4, atol=1e-7)
