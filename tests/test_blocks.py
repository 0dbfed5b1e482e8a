"""blocks.py: its layers against plain PyTorch, and the four candidates against the paper."""

from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import grad

from blocks import CANDIDATES, BatchNorm, DepthwiseConv, DepthwiseFunction, ShuffleSplit

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
KERNELS = {"shuffle3": [1, 3, 1], "shuffle5": [1, 5, 1], "shuffle7": [1, 7, 1]}
KERNELS["xception"] = [3, 1, 3, 1, 3, 1]
SHAPES = [(64, 64, 1), (16, 64, 1), (16, 64, 2)]

each_layout = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)


def noise(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=dtype)


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
@pytest.mark.parametrize(("kernel", "stride"), [*product([3, 5, 7], [1, 2])])
@pytest.mark.parametrize("size", [(8, 8), (7, 7), (5, 9), (6, 3), (2, 1), (1, 1)])
def test_depthwise_and_its_gradients_equal_conv2ds(size, stride, kernel, layout):
    """The module and the function; for the weight alone, without gradients, and in bf16."""
    conv = DepthwiseConv(6, kernel, stride).double()
    x = noise(2, 6, *size).contiguous(memory_format=layout)
    variables = [x.detach().requires_grad_(), conv.weight]
    expected = F.conv2d(*variables, stride=stride, padding=kernel // 2, groups=6)
    upstream = noise(*expected.shape)
    references = grad(expected, variables, upstream)
    for out in (conv(variables[0]), DepthwiseFunction.apply(*variables, stride)):
        torch.testing.assert_close(out, expected)
        torch.testing.assert_close(grad(out, variables, upstream), references)
    out = DepthwiseFunction.apply(x, conv.weight, stride)
    torch.testing.assert_close(grad(out, conv.weight, upstream), references[1:])
    with torch.no_grad():
        torch.testing.assert_close(conv(x), expected)
    variables = [x.float().requires_grad_(), conv.float().weight]
    with torch.autocast("cpu", torch.bfloat16):
        out = conv(variables[0])
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
    ours.track_running_stats = theirs.track_running_stats = tracked
    for side in range(5, 8):
        x = noise(4, 6, side, side, dtype=torch.float32)
        assert torch.equal(ours.train()(x), theirs.train()(x))
        assert torch.equal(ours.eval()(x), theirs.eval()(x))
    assert ours.num_batches_tracked == (3 if momentum is None and tracked else 0)
    ours.num_batches_tracked.copy_(theirs.num_batches_tracked)
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=0, atol=0)


@each_layout
@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize(("channels", "out", "stride"), SHAPES)
@pytest.mark.parametrize("size", [(9, 9), (8, 8), (7, 5), (1, 1)])
def test_a_block_and_its_gradients_are_those_of_the_paper(
    name, channels, out, stride, size, layout
):
    """The projection's depthwise kernel is the candidate's: 3x3 in the xception block.

    A channel shuffle of views fails in channels_last (mit-han-lab/temporal-shift-module#235).
    """
    torch.manual_seed(0)
    block = CANDIDATES[name](channels, out, stride, False).double().to(memory_format=layout)
    x = noise(4, channels, *size).contiguous(memory_format=layout).requires_grad_()
    kernels, half = KERNELS[name], out // 2
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
    computed, expected = block(x), torch.cat((kept, by_hand(block.main, main, stride)), 1)
    assert computed.shape == (4, out, *(len(range(0, side, stride)) for side in size))
    torch.testing.assert_close(computed, expected)
    variables, upstream = [x, *block.parameters()], noise(*computed.shape)
    gradients = (grad(output, variables, upstream) for output in (computed, expected))
    torch.testing.assert_close(*gradients)
