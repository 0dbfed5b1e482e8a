"""Started by torchrun in test_ranks.py: supernet.py, for each rank in $FOLDER/<rank>."""

import json
import os

import torch
from torchvision.datasets import CIFAR10

import supernet
from utils import run_script


def leave_weights(model):
    """Replaces supernet.release_blocks, the last call of a training."""
    torch.save(model.state_dict(), "weights.pth")


os.chdir(os.path.join(os.environ["FOLDER"], os.environ["RANK"]))
for name, value in json.loads(os.environ["CIFAR10"]).items():
    setattr(CIFAR10, name, value)
supernet.release_blocks, supernet.EVALUATION_BATCH = leave_weights, 6
run_script(supernet.main)
