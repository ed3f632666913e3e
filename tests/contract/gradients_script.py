"""gradients_script.py BASE DATA OUT ACCUMULATION [shard]: the gradients of one step, written by the first process.

With `shard` the processes share the base.
"""

import sys
from pathlib import Path

import torch
from accelerate import PartialState
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor

from atomtune.backbones import backbone_of, open_pipeline
from atomtune.training.encode import weights_key
from atomtune.training.ends import NAME, attach_atoms, training_mode
from atomtune.training.options import TrainOptions
from atomtune.training.prepare import prepare
from atomtune.training.processes import shard
from atomtune.training.run import Run

torch.set_num_threads(1)
base, data, out, accumulation, *shared = sys.argv[1:]
processes = PartialState(cpu=True)
pipe = open_pipeline(base)
options = TrainOptions(
    concept="kite", n_atoms=4, batch_size=1, unrelated_pictures=2, grad_accumulation=int(accumulation)
)
attach_atoms(pipe, backbone_of(pipe), options)
torch.manual_seed(1)
for parameter in (p for n, p in pipe.transformer.named_parameters() if n.endswith(".atoms")):
    torch.nn.init.normal_(parameter, std=0.1)  # so that encoders have gradients too
base_key = weights_key(pipe.transformer)
if shared:
    shard(pipe.transformer, torch.device("cpu"), processes, NAME)
    whole = sum(p.numel() for n, p in pipe.transformer.named_parameters() if "atom_" not in n)
    here = sum(p.to_local().numel() for p in pipe.transformer.parameters() if isinstance(p, DTensor))
    assert here < 0.6 * whole, "each process holds about half of the base"
material = prepare(pipe, backbone_of(pipe), Path(data), options, Path(out).with_suffix(""), base_key)
with training_mode(pipe.transformer, options):
    run = Run(pipe, backbone_of(pipe), material, options, Path(out).parent, processes)
    run.backward(0)
if processes.is_main_process:
    save_file({str(i): p.grad for i, p in enumerate(run.parameters()) if p.grad is not None}, out)
