"""blocks.py: the two autograd functions against plain PyTorch, and the four candidates against their definition."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blocks import (
    CANDIDATES,
    BatchNorm,
    DepthwiseConv,
    DepthwiseFunction,
    ShuffleSplit,
    capture_blocks,
    release_blocks,
)
from model import Supernet

LAYOUTS = [torch.contiguous_format, torch.channels_last]
SHAPES = {"stride1": (64, 64, 1), "widening": (16, 64, 1), "stride2": (16, 64, 2)}
KERNELS = {
    "shuffle3": [1, 3, 1],
    "shuffle5": [1, 5, 1],
    "shuffle7": [1, 7, 1],
    "xception": [3, 1, 3, 1, 3, 1],
}

each_layout = pytest.mark.parametrize("layout", LAYOUTS, ids=["contiguous", "channels_last"])
each_candidate = pytest.mark.parametrize("name", KERNELS)
each_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
each_kernel = pytest.mark.parametrize("kernel", [3, 5, 7])
each_stride = pytest.mark.parametrize("stride", [1, 2])


def noise(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=dtype)


def build(shape: tuple[int, int, int], name: str) -> nn.Module:
    """A candidate with weights that keep the signal's size, in the order (in, out, stride) of `shape`."""
    torch.manual_seed(0)
    return CANDIDATES[name](*shape, False)


def by_hand(chain: nn.Sequential, x: Tensor, stride: int) -> Tensor:
    """A chain as the paper's code has it: BN after every convolution, ReLU after the 1x1 ones only."""
    for weight in (parameter for parameter in chain.parameters() if parameter.ndim == 4):
        if weight.shape[-1] == 1:
            x = F.relu(F.batch_norm(F.conv2d(x, weight), None, None, training=True))
        else:
            x = F.conv2d(
                x, weight, stride=stride, padding=weight.shape[-1] // 2, groups=len(weight)
            )
            x, stride = F.batch_norm(x, None, None, training=True), 1
    return x


@each_layout
@pytest.mark.parametrize("used", [(0, 1), (0,), (1,)])
@pytest.mark.parametrize("size", [(2, 8, 5, 5), (1, 2, 1, 1), (3, 6, 4, 1)])
def test_shuffle_split_and_its_gradient_equal_two_slices(
    size: tuple[int, ...], used: tuple[int, ...], layout: torch.memory_format
) -> None:
    """Also where the network uses only one half; the gradient lies in memory as the input does."""
    x, gradients = noise(*size).contiguous(memory_format=layout).requires_grad_(), []
    ours, slices = ShuffleSplit.apply(x), (x[:, 0::2], x[:, 1::2])
    for parts in (ours, slices):
        loss = sum((parts[i] * (noise(*parts[i].shape) + i)).sum() for i in used)
        gradients += torch.autograd.grad(loss, x)
    assert all(torch.equal(half, part) for half, part in zip(ours, slices, strict=True))
    assert torch.equal(*gradients) and gradients[0].stride() == x.stride()


@each_layout
@each_kernel
@each_stride
@pytest.mark.parametrize("size", [(8, 8), (7, 7), (5, 9), (6, 3), (2, 1), (1, 1)])
def test_depthwise_and_its_gradients_equal_conv2ds(
    size: tuple[int, int], stride: int, kernel: int, layout: torch.memory_format
) -> None:
    """Through the module and the function, without gradients, and with the weight's gradient alone."""
    conv = DepthwiseConv(6, kernel, stride).double()
    x = noise(2, 6, *size, dtype=torch.float64).contiguous(memory_format=layout)
    variables = [x.detach().requires_grad_(), conv.weight]
    expected = F.conv2d(*variables, stride=stride, padding=kernel // 2, groups=6)
    upstream = noise(*expected.shape, dtype=torch.float64)
    references = torch.autograd.grad(expected, variables, upstream)
    for out in (conv(variables[0]), DepthwiseFunction.apply(*variables, stride)):
        torch.testing.assert_close(out, expected)
        torch.testing.assert_close(torch.autograd.grad(out, variables, upstream), references)
    alone = torch.autograd.grad(
        DepthwiseFunction.apply(x, conv.weight, stride), conv.weight, upstream
    )
    torch.testing.assert_close(alone, references[1:])
    with torch.no_grad():
        torch.testing.assert_close(conv(x), expected)


@each_stride
@each_kernel
def test_depthwise_in_bf16_has_the_gradients_of_fp32_within_its_precision(
    kernel: int, stride: int
) -> None:
    conv, x = DepthwiseConv(6, kernel, stride), noise(4, 6, 9, 9).requires_grad_()
    expected = F.conv2d(x, conv.weight, stride=stride, padding=kernel // 2, groups=6)
    upstream = noise(*expected.shape)
    references = torch.autograd.grad(expected, (x, conv.weight), upstream)
    with torch.autocast("cpu", torch.bfloat16):
        out = conv(x)
    assert out.dtype == torch.bfloat16
    for gradient, reference in zip(
        torch.autograd.grad(out, (x, conv.weight), upstream.bfloat16()), references, strict=True
    ):
        assert gradient.dtype == torch.float32
        assert (gradient - reference).norm() < 0.01 * reference.norm()


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("tracked", [False, True])
def test_batchnorm_is_torchs_but_for_the_count(
    affine: bool, momentum: float | None, tracked: bool
) -> None:
    """Outputs and buffers, in training and then in evaluation; a cumulative mean needs the count and has it."""
    ours, theirs = (
        kind(6, affine=affine, momentum=momentum) for kind in (BatchNorm, nn.BatchNorm2d)
    )
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    ours.track_running_stats = theirs.track_running_stats = tracked
    for seed in range(3):
        x = noise(4, 6, 5, 5 + seed)
        assert torch.equal(ours.train()(x), theirs.train()(x))
        assert torch.equal(ours.eval()(x), theirs.eval()(x))
    assert torch.equal(ours.running_mean, theirs.running_mean) and torch.equal(
        ours.running_var, theirs.running_var
    )
    assert ours.num_batches_tracked == (3 if momentum is None and tracked else 0)


@each_candidate
@each_shape
@pytest.mark.parametrize("size", [(9, 9), (8, 8), (7, 5), (1, 1)])
def test_a_block_computes_what_the_paper_says(
    name: str, shape: tuple[int, int, int], size: tuple[int, int]
) -> None:
    channels, out, stride = shape
    block, x = build(shape, name).double(), noise(4, channels, *size, dtype=torch.float64)
    if stride == 1:
        kept, main = x[:, 0::2], x[:, 1::2]
    else:
        kept, main = by_hand(block.projection, x, 2), x
    computed = block(x)
    assert computed.shape == (4, out, *(len(range(0, side, stride)) for side in size))
    torch.testing.assert_close(computed, torch.cat((kept, by_hand(block.main, main, stride)), 1))


@each_candidate
@each_shape
def test_a_block_has_the_kernels_and_widths_of_its_candidate(
    name: str, shape: tuple[int, int, int]
) -> None:
    """The projection's depthwise kernel is the candidate's: 3x3 in the xception block."""
    channels, out, stride = shape
    branch, half = channels if stride == 2 else channels // 2, out // 2
    main = [
        (module.weight, module.groups)
        for module in build(shape, name).main
        if isinstance(module, nn.Conv2d)
    ]
    assert [weight.shape[-1] for weight, _ in main] == KERNELS[name]
    widths = [weight.shape[:2] for weight, groups in main if groups == 1]
    assert widths == [
        (half, branch),
        *[(half, half)] * (KERNELS[name].count(1) - 2),
        (out - branch, half),
    ]
    if stride == 2:
        projection = [
            module for module in build(shape, name).projection if isinstance(module, nn.Conv2d)
        ]
        assert [conv.kernel_size[0] for conv in projection] == [max(KERNELS[name]), 1]


@each_candidate
@each_shape
def test_channels_last_computes_what_contiguous_does(
    name: str, shape: tuple[int, int, int]
) -> None:
    """mit-han-lab/temporal-shift-module#235: a channel shuffle written with views failed in this layout."""
    results = []
    for layout in LAYOUTS:
        block = build(shape, name).to(memory_format=layout)
        x = noise(4, shape[0], 8, 8).contiguous(memory_format=layout).requires_grad_()
        out = block(x)
        (out * noise(*out.shape)).sum().backward()
        results.append([out, x.grad, *(parameter.grad for parameter in block.parameters())])
    assert all(tensor.isfinite().all() for result in results for tensor in result)
    torch.testing.assert_close(results[1][0], results[0][0], rtol=0, atol=1e-4)
    for contiguous, channels_last in zip(*results, strict=True):
        assert (channels_last - contiguous).norm() <= 1e-4 * contiguous.norm()


def test_the_candidates_come_in_the_order_of_their_numbers() -> None:
    """A choice's numbers and a checkpoint's keys mean these."""
    assert list(CANDIDATES) == list(KERNELS)


def test_cuda_graphs_are_not_used_on_a_cpu_and_nothing_changes() -> None:
    model, x = Supernet(10, 32).eval(), noise(2, 3, 8, 8)
    before, logits = copy.deepcopy(model.state_dict()), model(x, (0,) * 20)
    line = capture_blocks(model, x, 10**9)
    assert line.startswith("not used: ") and "cpu" in line
    for _ in range(2):
        assert not any(module.training or "forward" in vars(module) for module in model.modules())
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
        assert all(
            parameter.grad is None and parameter.requires_grad for parameter in model.parameters()
        )
        assert torch.equal(model(x, (0,) * 20), logits)
        release_blocks(model)
