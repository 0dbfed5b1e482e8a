"""Started by torchrun in test_ranks.py: supernet.py, with what each rank trained saved in $LEFT."""

import json
import os
import sys
from pathlib import Path

import torch
from torchvision.datasets import CIFAR10

sys.path.insert(0, str(Path(__file__).parent.parent))
import supernet
from utils import rank, run_script

EVALUATION_BATCH = 6  # so that every rank has some of the few images to validate on
trained_alone = supernet.train


def train(model, *rest):
    trained_alone(model, *rest)
    moved = [name for name, parameter in model.named_parameters() if parameter.grad is not None]
    left = {"weights": model.state_dict(), "moved": moved}
    torch.save(left, Path(os.environ["LEFT"], f"{rank()}.pth"))


if __name__ == "__main__":
    for name, value in json.loads(os.environ["CIFAR10"]).items():
        setattr(CIFAR10, name, value)
    supernet.train, supernet.EVALUATION_BATCH = train, EVALUATION_BATCH
    run_script(supernet.main)
