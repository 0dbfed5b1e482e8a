"""data/spos_cifar10.pth, the trained supernet that comes with the repository."""

import pytest
import torch
import torch.nn.functional as F

import supernet
from conftest import ROOT, noise
from data.records import format_choice, load_checkpoint
from model import SPACES, Supernet

PUBLISHED = ROOT / "data/spos_cifar10.pth"
# With the BatchNorm statistics of the images themselves.
MIXED = (0, 1, 2, 3) * 5
LOSSES = {(1,) * 20: 3.6018, MIXED: 3.5731}


def images() -> torch.Tensor:
    """32 fixed images: blocks of 8 x 8 pixels in random colours."""
    coarse = torch.from_numpy(noise(32, 3, 4, 4)).float()
    return F.interpolate(coarse, scale_factor=8) / 64 - 2


def test_it_holds_what_a_search_needs_and_nothing_of_a_machine():
    content = load_checkpoint(PUBLISHED)
    assert content.keys() - {"path", "sha256"} == {"model", "args", "data", "epoch", "metrics"}
    args, epochs = content["args"], len(content["metrics"])
    assert content["epoch"] == args["epochs"] == epochs
    assert (args["space"], args["choice"]) == ("spos_small", None)
    assert args["space_layout"] == vars(SPACES["spos_small"])
    assert (args["data_dir"], args["out_dir"]) == ("./data", "runs")
    assert (content["data"]["name"], len(content["data"]["classes"])) == ("cifar10", 10)
    assert PUBLISHED.stat().st_size < 16e6


def test_its_weights_give_known_losses():
    """Another file, layout or block would not."""
    model = Supernet(10, 32, space=SPACES["spos_small"])
    model.load_state_dict(load_checkpoint(PUBLISHED)["model"])
    for choice, loss in LOSSES.items():
        with torch.no_grad():
            logits = model.train()(images(), choice)
        ours = F.cross_entropy(logits, torch.arange(32) % 10).item()
        assert ours == pytest.approx(loss, rel=1e-3)


def test_a_network_may_start_from_it(cifar, tmp_path):
    cifar.install(tmp_path, archive=True, folder=True)
    flags = ["--choice", format_choice(MIXED), "--init_from", str(PUBLISHED)]
    flags += "--epochs 1 --learning_rate 1e-20 --train_on all --workers 0 --exp_name net".split()
    supernet.main([*flags, "--data_dir", str(tmp_path), "--out_dir", str(tmp_path)])
    ours = load_checkpoint(tmp_path / "net/last.pth")["model"]
    theirs = load_checkpoint(PUBLISHED)["model"]
    shared = [key for key, value in ours.items() if value.ndim > 1]
    assert len(shared) == 82  # 67 of a network of shuffle blocks, and 3 more in each xception
    assert all(torch.equal(ours[key], theirs[key].float()) for key in shared)
