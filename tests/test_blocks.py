"""blocks.py: the two autograd functions against plain PyTorch, and the four candidates against their definition."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blocks import CANDIDATES, BatchNorm, Block, DepthwiseConv, DepthwiseFunction, ShuffleSplit

LAYOUTS = [torch.contiguous_format, torch.channels_last]
SHAPES = {"stride1": (64, 64, 1), "widening": (16, 64, 1), "stride2": (16, 64, 2)}
MAPS = [(8, 8), (7, 7), (5, 9), (6, 3), (2, 1), (1, 1)]

each_layout = pytest.mark.parametrize("layout", LAYOUTS, ids=["contiguous", "channels_last"])
each_candidate = pytest.mark.parametrize("name", ["shuffle3", "shuffle5", "shuffle7", "xception"])
each_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
each_geometry = pytest.mark.parametrize(
    ("kernel", "stride", "size"), [(kernel, stride, size) for kernel in (3, 5, 7) for stride in (1, 2) for size in MAPS]
)


def noise(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=dtype)


def build(shape: tuple[int, int, int], name: str, affine: bool = False) -> Block:
    """A candidate with weights that keep the signal's size, in the order (in, out, stride) of `shape`."""
    torch.manual_seed(0)
    return Block(*shape, affine, **CANDIDATES[name])


def by_hand(chain: nn.Sequential, x: Tensor, stride: int) -> Tensor:
    """A chain as design.md section 3 words it: BN after every convolution, ReLU after the 1x1 ones only."""
    for weight in (parameter for parameter in chain.parameters() if parameter.ndim == 4):
        if weight.shape[-1] == 1:
            x = F.relu(F.batch_norm(F.conv2d(x, weight), None, None, training=True))
        else:
            x = F.conv2d(x, weight, stride=stride, padding=weight.shape[-1] // 2, groups=len(weight))
            x, stride = F.batch_norm(x, None, None, training=True), 1
    return x


@each_layout
@pytest.mark.parametrize("size", [(2, 8, 5, 5), (1, 2, 1, 1), (3, 6, 4, 1)])
def test_shuffle_split_equals_two_slices(size: tuple[int, ...], layout: torch.memory_format) -> None:
    ours = noise(*size).contiguous(memory_format=layout).requires_grad_()
    plain = ours.detach().clone().requires_grad_()
    halves, slices = ShuffleSplit.apply(ours), (plain[:, 0::2], plain[:, 1::2])
    weights = [noise(*part.shape) + i for i, part in enumerate(slices)]
    for half, part in zip(halves, slices, strict=True):
        assert torch.equal(half, part)
    for parts in (halves, slices):
        sum((part * weight).sum() for part, weight in zip(parts, weights, strict=True)).backward()
    assert torch.equal(ours.grad, plain.grad)


@each_layout
def test_shuffle_split_gradient_has_the_inputs_layout(layout: torch.memory_format) -> None:
    x = noise(2, 8, 5, 5).contiguous(memory_format=layout).requires_grad_()
    even, odd = ShuffleSplit.apply(x)
    (grad,) = torch.autograd.grad(even.sum() + 2 * odd.sum(), x)
    assert grad.stride() == x.stride() and grad.is_contiguous(memory_format=layout)


@pytest.mark.parametrize("half", [0, 1])
def test_shuffle_split_gradient_of_an_unused_half_is_zero(half: int) -> None:
    x = noise(2, 6, 3, 3).requires_grad_()
    (grad,) = torch.autograd.grad(ShuffleSplit.apply(x)[half].sum(), x)
    expected = torch.zeros_like(x)
    expected[:, half::2] = 1
    assert torch.equal(grad, expected)


@each_geometry
@pytest.mark.parametrize("through", ["function", "module"])
def test_depthwise_equals_conv2d(through: str, kernel: int, stride: int, size: tuple[int, int]) -> None:
    channels = 6
    conv = DepthwiseConv(channels, kernel, stride).double()
    ours = [noise(2, channels, *size, dtype=torch.float64).requires_grad_(), conv.weight]
    plain = [tensor.detach().clone().requires_grad_() for tensor in ours]
    out = conv(ours[0]) if through == "module" else DepthwiseFunction.apply(*ours, stride)
    expected = F.conv2d(*plain, stride=stride, padding=kernel // 2, groups=channels)
    torch.testing.assert_close(out, expected)
    upstream = noise(*expected.shape, dtype=torch.float64)
    gradients = torch.autograd.grad(out, ours, upstream)
    for gradient, reference in zip(gradients, torch.autograd.grad(expected, plain, upstream), strict=True):
        torch.testing.assert_close(gradient, reference)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kernel", [3, 5, 7])
def test_depthwise_in_bf16_has_the_gradients_of_fp32_within_its_precision(kernel: int, stride: int) -> None:
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


@each_layout
@pytest.mark.parametrize("kernel", [3, 5, 7])
def test_depthwise_weight_gradient_needs_no_input_gradient(kernel: int, layout: torch.memory_format) -> None:
    x = noise(2, 6, 7, 5, dtype=torch.float64).contiguous(memory_format=layout)
    weight = noise(6, 1, kernel, kernel, dtype=torch.float64).requires_grad_()
    DepthwiseFunction.apply(x, weight, 2).square().sum().backward()
    plain = weight.detach().clone().requires_grad_()
    F.conv2d(x, plain, stride=2, padding=kernel // 2, groups=6).square().sum().backward()
    assert x.grad is None
    torch.testing.assert_close(weight.grad, plain.grad)


@pytest.mark.parametrize("kernel", [3, 5, 7])
def test_depthwise_is_the_same_without_gradients(kernel: int) -> None:
    conv, x = DepthwiseConv(6, kernel, 1), noise(2, 6, 7, 7)
    expected = F.conv2d(x, conv.weight, padding=kernel // 2, groups=6)
    with torch.no_grad():
        torch.testing.assert_close(conv(x), expected)


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("tracked", [False, True])
def test_batchnorm_is_torchs_but_for_the_count(affine: bool, momentum: float | None, tracked: bool) -> None:
    """Outputs and buffers, in training and then in evaluation; a cumulative mean needs the count and has it."""
    ours, theirs = (kind(6, affine=affine, momentum=momentum) for kind in (BatchNorm, nn.BatchNorm2d))
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    ours.track_running_stats = theirs.track_running_stats = tracked
    for seed in range(3):
        x = noise(4, 6, 5, 5 + seed)
        assert torch.equal(ours.train()(x), theirs.train()(x))
        assert torch.equal(ours.eval()(x), theirs.eval()(x))
    assert torch.equal(ours.running_mean, theirs.running_mean) and torch.equal(ours.running_var, theirs.running_var)
    assert ours.num_batches_tracked == (3 if momentum is None and tracked else 0)


@each_candidate
@each_shape
def test_a_block_is_what_the_design_says(name: str, shape: tuple[int, int, int]) -> None:
    channels, _, stride = shape
    block, x = build(shape, name).double(), noise(4, channels, 9, 9, dtype=torch.float64)
    if stride == 1:
        kept, main = x[:, 0::2], x[:, 1::2]
    else:
        kept, main = by_hand(block.projection, x, 2), x
    torch.testing.assert_close(block(x), torch.cat((kept, by_hand(block.main, main, stride)), 1))


@each_shape
@pytest.mark.parametrize(
    ("name", "depthwise", "pointwise"),
    [("shuffle3", [3], 2), ("shuffle5", [5], 2), ("shuffle7", [7], 2), ("xception", [3, 3, 3], 3)],
)
def test_the_main_branch_has_the_kernels_and_widths_of_its_candidate(
    name: str, depthwise: list[int], pointwise: int, shape: tuple[int, int, int]
) -> None:
    channels, out, stride = shape
    branch = channels if stride == 2 else channels // 2
    convs = [module for module in build(shape, name).main if isinstance(module, nn.Conv2d)]
    assert [conv.kernel_size[0] for conv in convs if conv.groups > 1] == depthwise
    widths = [(conv.in_channels, conv.out_channels) for conv in convs if conv.groups == 1]
    assert len(widths) == pointwise
    assert widths[0] == (branch, out // 2) and widths[-1] == (out // 2, out - branch)
    assert set(widths[1:-1]) <= {(out // 2, out // 2)}


@each_candidate
def test_the_projection_has_the_kernel_of_its_candidate(name: str) -> None:
    """3x3 in the xception block."""
    kernels = [conv.kernel_size for conv in build(SHAPES["stride2"], name).projection if isinstance(conv, nn.Conv2d)]
    side = {"shuffle5": 5, "shuffle7": 7}.get(name, 3)
    assert kernels == [(side, side), (1, 1)]


@each_candidate
@each_shape
@pytest.mark.parametrize("size", [(8, 8), (7, 5), (1, 1)])
def test_a_block_widens_and_halves_as_asked(name: str, shape: tuple[int, int, int], size: tuple[int, int]) -> None:
    channels, out, stride = shape
    height, width = (len(range(0, side, stride)) for side in size)
    assert build(shape, name)(noise(3, channels, *size)).shape == (3, out, height, width)


@each_candidate
@pytest.mark.parametrize("shape", [SHAPES["stride1"], SHAPES["widening"]], ids=["stride1", "widening"])
def test_even_channels_pass_unchanged_at_stride_1(name: str, shape: tuple[int, int, int]) -> None:
    x = noise(2, shape[0], 6, 6)
    out = build(shape, name)(x)
    assert torch.equal(out[:, : shape[0] // 2], x[:, 0::2])


@each_candidate
@each_shape
def test_channels_last_computes_what_contiguous_does(name: str, shape: tuple[int, int, int]) -> None:
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


@each_candidate
@each_shape
@pytest.mark.parametrize("affine", [False, True])
def test_no_convolution_has_a_bias_and_batchnorm_scales_only_if_asked(
    name: str, shape: tuple[int, int, int], affine: bool
) -> None:
    modules = list(build(shape, name, affine).modules())
    convs = [module for module in modules if isinstance(module, nn.Conv2d)]
    norms = [module for module in modules if isinstance(module, nn.BatchNorm2d)]
    assert all(conv.bias is None for conv in convs) and len(norms) == len(convs)
    for norm in norms:
        assert [parameter is not None for parameter in (norm.weight, norm.bias)] == [affine, affine]


def test_the_candidates_come_in_the_order_of_their_numbers() -> None:
    """A choice's numbers and a checkpoint's keys mean these."""
    assert list(CANDIDATES) == ["shuffle3", "shuffle5", "shuffle7", "xception"]
