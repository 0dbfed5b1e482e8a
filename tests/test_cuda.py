"""CUDA only: blocks in graphs learn what plain blocks learn, and fp32 and bf16 rank alike."""

import copy
import random
import re
from types import SimpleNamespace
from unittest.mock import DEFAULT, Mock, patch

import pytest
import torch
import torch.nn.functional as F

import blocks
import random_search
import supernet
from blocks import capture_blocks
from data.datasets import load_dataset
from data.loaders import Batches
from data.records import load_checkpoint, read_metrics, standard_error
from model import SearchSpace, Supernet

NEEDED = "needs a CUDA device; name this file"
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason=NEEDED)
SIZE, BATCH = 16, 64
DEVICE = torch.device("cuda:0")
USED = "used for the blocks"


@pytest.fixture(scope="module", autouse=True)
def exact():
    """fp32 means fp32 on every GPU."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


@pytest.fixture(scope="module")
def captured():
    """A captured network, a plain one with the same weights, and what capturing changed."""
    torch.manual_seed(0)
    graphed = Supernet(10, SIZE).to(DEVICE)
    found = SimpleNamespace(graphed=graphed, plain=copy.deepcopy(graphed))
    found.space = SearchSpace(found.plain)
    found.random_states = [torch.cuda.get_rng_state(DEVICE)]
    found.line = capture_blocks(graphed, images(0), 10**9)
    found.random_states.append(torch.cuda.get_rng_state(DEVICE))
    found.state_after = copy.deepcopy(graphed.state_dict())
    found.gradients_after = [p.grad for p in graphed.parameters()]
    return found


@pytest.fixture
def pair(captured):
    """Both networks as they were at first."""
    for model in (captured.graphed, captured.plain):
        model.load_state_dict(captured.state_after)
        model.zero_grad(set_to_none=True)
        model.train()
    return captured


def images(seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(BATCH, 3, SIZE, SIZE, generator=generator).to(DEVICE)


def backward(model, choice, seed):
    """Adds the gradients of one batch."""
    labels = torch.randint(10, (BATCH,), generator=torch.Generator().manual_seed(seed)).to(DEVICE)
    F.cross_entropy(model(images(seed), choice), labels).backward()


def same(state, other):
    return all(torch.equal(value, other[name]) for name, value in state.items())


def test_capturing_leaves_no_trace(captured):
    assert captured.line == USED
    assert same(captured.state_after, captured.plain.state_dict())
    assert all(gradient is None for gradient in captured.gradients_after)
    assert torch.equal(*captured.random_states)


def test_the_first_gradients_agree(pair):
    """And blocks off the path have none, or momentum and weight decay would move them."""
    gradients = []
    for model in (pair.plain, pair.graphed):
        for seed in range(2):
            model.zero_grad(set_to_none=True)
            backward(model, pair.space.sample(random.Random(seed)), seed)
        on_path = [(name, p.grad) for name, p in model.named_parameters() if p.grad is not None]
        gradients.append(dict(on_path))
    plain, graphed = gradients
    assert plain.keys() == graphed.keys()
    for name, gradient in plain.items():
        assert (graphed[name] - gradient).norm() <= 1e-4 * gradient.norm(), name
    for name, buffer in pair.plain.named_buffers():
        assert torch.allclose(buffer, pair.graphed.get_buffer(name), rtol=1e-4, atol=1e-6), name


def test_training_stays_as_close_as_two_plain_runs(pair):
    """Rounding grows with the steps; a plain run that begins one rounding away tells how much."""
    beside = copy.deepcopy(pair.plain)
    with torch.no_grad():
        for p in beside.parameters():
            p.mul_(1 + torch.finfo(p.dtype).eps)
    weights = []
    for model in (pair.plain, beside, pair.graphed):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=3e-4)
        rng = random.Random(0)
        for step in range(20):
            optimizer.zero_grad(set_to_none=True)
            backward(model, pair.space.sample(rng), step)
            optimizer.step()
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    plain, other, graphed = weights
    assert (graphed - plain).norm() <= 2 * (other - plain).norm()


def test_validation_takes_any_batch_and_no_graph(pair):
    dataset = load_dataset("digits", ".", SIZE)
    batches = Batches(dataset, dataset.search, 37, DEVICE)
    paths = [pair.space.sample(random.Random(i)) for i in range(len(batches))]
    for own in (False, True):
        models = pair.plain, pair.graphed
        plain, graphed = (supernet.evaluate(m, batches, paths, own)["loss"] for m in models)
        assert graphed == pytest.approx(plain, rel=1e-3)


@pytest.mark.parametrize("how", ["no room", "runs out"])
def test_too_little_memory_means_no_graphs(how, monkeypatch):
    """The sixth graph does not fit; released blocks take batches of any size again."""
    model = Supernet(10, 8).to(DEVICE)
    before = copy.deepcopy(model.state_dict())
    if how == "no room":
        monkeypatch.setattr(blocks, "GRAPH_BYTES", 2**40)
    capture = Mock(wraps=torch.cuda.make_graphed_callables)
    capture.side_effect = [DEFAULT] * 5 + [torch.OutOfMemoryError("CUDA out of memory")]
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", capture)
    line = capture_blocks(model, torch.zeros(8, 3, 8, 8, device=DEVICE), 10**9)
    assert re.match("not used: .*(memory|GiB)", line)
    assert same(model.state_dict(), before)
    for number in range(4):
        model(torch.zeros(5, 3, 8, 8, device=DEVICE), (number,) * 20).sum().backward()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Digits with graphs, in bf16, interrupted after 6 of 8 epochs and resumed."""
    out = tmp_path_factory.mktemp("runs")
    flags = f"--dataset digits --epochs 8 --batch_size 64 --out_dir {out} --exp_name cuda".split()
    stopped = patch.object(supernet, "check_finite", side_effect=[None] * 6 + [KeyboardInterrupt])
    with patch.object(blocks, "GRAPH_CALLS", 1):
        with stopped, pytest.raises(KeyboardInterrupt):
            supernet.main(flags)
        supernet.main([*flags, "--resume"])
    return out / "cuda"


def test_a_run_with_graphs_learns_and_continues(trained):
    log = (trained / "log.txt").read_text()
    assert log.count(USED) == 2 and "resuming after epoch 6" in log
    rows = read_metrics(trained / "metrics.csv")
    assert [row["epoch"] for row in rows] == list(range(1, 9))
    assert rows[-1]["train_acc"] > rows[5]["train_acc"] > 30


def test_a_single_architecture_trains_with_graphs(tmp_path, monkeypatch):
    monkeypatch.setattr(blocks, "GRAPH_CALLS", 1)
    flags = f"--dataset digits --epochs 2 --out_dir {tmp_path} --exp_name alone".split()
    supernet.main([*flags, "--choice", "-".join("0123" * 5)])
    assert USED in (tmp_path / "alone" / "log.txt").read_text()
    network = torch.export.load(tmp_path / "alone" / "model.pt2").module()
    assert network(torch.zeros(3, 3, SIZE, SIZE, dtype=torch.uint8)).shape == (3, 10)


def test_scores_hardly_depend_on_precision_and_graphs(trained, monkeypatch):
    """By at most one standard error on average over 24 paths."""
    monkeypatch.setattr(blocks, "GRAPH_CALLS", 1)
    checkpoint, found = load_checkpoint(trained / "last.pth"), {}
    dataset = load_dataset("digits", ".", SIZE)
    for precision, graphs in (("fp32", False), ("fp32", True), ("bf16", True)):
        model = Supernet(10, SIZE)
        model.load_state_dict(checkpoint["model"])
        how = DEVICE, 0, precision
        calibration = random_search.calibration_batches(dataset, 1000, 4, *how)
        batches = Batches(dataset, dataset.search, 1000, *how)
        model.to(DEVICE, memory_format=batches.memory_format)
        scorer = random_search.Scorer(model, calibration, batches)
        if graphs:
            assert scorer.capture(1000) == USED
        paths = sorted(SearchSpace(model).sample_distinct(random.Random(0), 24))
        accuracies = [score["accuracy"] for score in scorer.score(paths)]
        found[precision, graphs] = torch.tensor(accuracies)
    plain = found["fp32", False]
    error = standard_error(plain.mean().item(), len(dataset.search))
    assert (found["fp32", True] - plain).abs().mean() <= error / 4
    assert (found["bf16", True] - plain).abs().mean() <= error
