"""blocks.py: its layers against plain PyTorch, and the four candidates against the paper."""

import copy
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import grad

import blocks
from blocks import CANDIDATES, BatchNorm, DepthwiseConv, DepthwiseFunction, ShuffleSplit
from model import SPACES, Supernet

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
KERNELS = {"shuffle3": [1, 3, 1], "shuffle5": [1, 5, 1], "shuffle7": [1, 7, 1]}
KERNELS["xception"] = [3, 1, 3, 1, 3, 1]

SHAPES = [(64, 64, 1), (16, 64, 1), (16, 64, 2)]
BLOCKS = [(name, *shape) for name, shape in product(KERNELS, SHAPES)]

each_layout = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
each_block = pytest.mark.parametrize(("name", "channels", "out", "stride"), BLOCKS)
each_conv = pytest.mark.parametrize(("kernel", "stride"), [*product([3, 5, 7], [1, 2])])


def noise(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=dtype)


def build(name: str, *shape: int) -> nn.Module:
    """A candidate without scales and shifts, so that all its parameters are convolution weights."""
    torch.manual_seed(0)
    return CANDIDATES[name](*shape, False)


def by_hand(chain: nn.Sequential, x: Tensor, stride: int) -> Tensor:
    """As in the official code: BatchNorm after every convolution, ReLU after the 1x1 ones only."""
    for weight in chain.parameters():
        if weight.shape[-1] == 1:
            x = F.relu(F.batch_norm(F.conv2d(x, weight), None, None, training=True))
        else:
            x = F.conv2d(x, weight, None, stride, weight.shape[-1] // 2, groups=len(weight))
            x, stride = F.batch_norm(x, None, None, training=True), 1
    return x


@each_layout
@pytest.mark.parametrize("used", [(0, 1), (0,), (1,)])
@pytest.mark.parametrize("size", [(2, 8, 5, 5), (1, 2, 1, 1), (3, 6, 4, 1)])
def test_shuffle_split_and_its_gradient_equal_two_slices(size, used, layout):
    """Also with a loss on one half only; the gradient has the input's memory format."""
    x, gradients = noise(*size).contiguous(memory_format=layout).requires_grad_(), []
    ours, slices = ShuffleSplit.apply(x), (x[:, 0::2], x[:, 1::2])
    for parts in (ours, slices):
        loss = sum((parts[i] * (noise(*parts[i].shape) + i)).sum() for i in used)
        gradients += grad(loss, x)
    assert all(torch.equal(half, part) for half, part in zip(ours, slices, strict=True))
    assert torch.equal(*gradients) and gradients[0].stride() == x.stride()


@each_layout
@each_conv
@pytest.mark.parametrize("size", [(8, 8), (7, 7), (5, 9), (6, 3), (2, 1), (1, 1)])
def test_depthwise_and_its_gradients_equal_conv2ds(size, stride, kernel, layout):
    """The module and the function, also without gradients and for the weight's gradient alone."""
    conv = DepthwiseConv(6, kernel, stride).double()
    x = noise(2, 6, *size, dtype=torch.float64).contiguous(memory_format=layout)
    variables = [x.detach().requires_grad_(), conv.weight]
    expected = F.conv2d(*variables, stride=stride, padding=kernel // 2, groups=6)
    upstream = noise(*expected.shape, dtype=torch.float64)
    references = grad(expected, variables, upstream)
    for out in (conv(variables[0]), DepthwiseFunction.apply(*variables, stride)):
        torch.testing.assert_close(out, expected)
        torch.testing.assert_close(grad(out, variables, upstream), references)
    out = DepthwiseFunction.apply(x, conv.weight, stride)
    torch.testing.assert_close(grad(out, conv.weight, upstream), references[1:])
    with torch.no_grad():
        torch.testing.assert_close(conv(x), expected)


@each_conv
def test_depthwise_gradients_in_bf16_are_close_to_those_in_fp32(kernel, stride):
    conv, x = DepthwiseConv(6, kernel, stride), noise(4, 6, 9, 9).requires_grad_()
    expected = F.conv2d(x, conv.weight, stride=stride, padding=kernel // 2, groups=6)
    variables, upstream = (x, conv.weight), noise(*expected.shape)
    references = grad(expected, variables, upstream)
    with torch.autocast("cpu", torch.bfloat16):
        out = conv(x)
    assert out.dtype == torch.bfloat16
    for ours, reference in zip(grad(out, variables, upstream.bfloat16()), references, strict=True):
        assert ours.dtype == torch.float32
        assert (ours - reference).norm() < 0.01 * reference.norm()


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("tracked", [False, True])
def test_batchnorm_differs_from_torchs_in_the_count_only(affine, momentum, tracked):
    """Outputs and buffers in training and evaluation; a cumulative average still counts."""
    options = {"affine": affine, "momentum": momentum}
    ours, theirs = BatchNorm(6, **options), nn.BatchNorm2d(6, **options)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    ours.track_running_stats = theirs.track_running_stats = tracked
    for seed in range(3):
        x = noise(4, 6, 5, 5 + seed)
        assert torch.equal(ours.train()(x), theirs.train()(x))
        assert torch.equal(ours.eval()(x), theirs.eval()(x))
    assert torch.equal(ours.running_mean, theirs.running_mean)
    assert torch.equal(ours.running_var, theirs.running_var)
    assert ours.num_batches_tracked == (3 if momentum is None and tracked else 0)


@each_block
@pytest.mark.parametrize("size", [(9, 9), (8, 8), (7, 5), (1, 1)])
def test_a_block_is_the_one_in_the_paper(name, channels, out, stride, size):
    """The projection's depthwise kernel is the candidate's: 3x3 in the xception block."""
    block, kernels, half = build(name, channels, out, stride).double(), KERNELS[name], out // 2
    x = noise(4, channels, *size, dtype=torch.float64)
    if stride == 1:
        branch, kept, main = channels // 2, x[:, 0::2], x[:, 1::2]
    else:
        branch, kept, main = channels, by_hand(block.projection, x, 2), x
        assert [w.shape[-1] for w in block.projection.parameters()] == [max(kernels), 1]
    shapes = [weight.shape for weight in block.main.parameters()]
    assert [shape[-1] for shape in shapes] == kernels
    widths = [shape[:2] for shape in shapes if shape[1] > 1]  # depthwise weights have a 1 there
    middle = [(half, half)] * (kernels.count(1) - 2)
    assert widths == [(half, branch), *middle, (out - branch, half)]
    computed = block(x)
    assert computed.shape == (4, out, *(len(range(0, side, stride)) for side in size))
    torch.testing.assert_close(computed, torch.cat((kept, by_hand(block.main, main, stride)), 1))


@each_block
def test_channels_last_computes_the_same_as_contiguous(name, channels, out, stride):
    """A channel shuffle of views fails in this layout (mit-han-lab/temporal-shift-module#235)."""
    results = []
    for layout in LAYOUTS.values():
        block = build(name, channels, out, stride).to(memory_format=layout)
        x = noise(4, channels, 8, 8).contiguous(memory_format=layout).requires_grad_()
        y = block(x)
        (y * noise(*y.shape)).sum().backward()
        results.append([y, x.grad, *(parameter.grad for parameter in block.parameters())])
    assert all(tensor.isfinite().all() for result in results for tensor in result)
    torch.testing.assert_close(results[1][0], results[0][0], rtol=0, atol=1e-4)
    for contiguous, channels_last in zip(*results, strict=True):
        assert (channels_last - contiguous).norm() <= 1e-4 * contiguous.norm()


def test_the_candidates_keep_their_numbers():
    """Choices and checkpoints refer to the candidates by this order."""
    assert SPACES["spos_small"].candidates == SPACES["spos_large"].candidates == list(KERNELS)


def test_cuda_graphs_are_not_used_on_a_cpu_and_nothing_changes():
    model, x, choice = Supernet(10, 32).eval(), noise(2, 3, 8, 8), (0,) * 20
    before, logits = copy.deepcopy(model.state_dict()), model(x, choice)
    line = blocks.capture_blocks(model, x, 10**9)
    assert line.startswith("not used: ") and "cpu" in line
    for _ in range(2):
        assert not any(module.training or "forward" in vars(module) for module in model.modules())
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
        assert all(p.grad is None and p.requires_grad for p in model.parameters())
        assert torch.equal(model(x, choice), logits)
        blocks.release_blocks(model)
