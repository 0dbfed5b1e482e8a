"""The candidate blocks of a layer: ShuffleNet v2 units with kernels of 3, 5 and 7, and a deeper "xception" unit.

Shapes and the order of operations follow Guo et al., arXiv 1904.00420, and the official code
(megvii-model/SinglePathOneShot). An entry of CANDIDATES is all that a new candidate needs.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def depthwise(channels: int, kernel: int, stride: int, affine: bool) -> list[nn.Module]:
    """Depthwise convolution and BatchNorm, no activation: (N, C, H, W) -> (N, C, H/stride, W/stride)."""
    return [DepthwiseConv(channels, kernel, stride), BatchNorm(channels, affine=affine)]


def pointwise(in_channels: int, out_channels: int, affine: bool) -> list[nn.Module]:
    """1x1 convolution, BatchNorm, ReLU: (N, in, H, W) -> (N, out, H, W)."""
    conv = nn.Conv2d(in_channels, out_channels, kernel_size=1, bias=False)
    return [conv, BatchNorm(out_channels, affine=affine), nn.ReLU(inplace=True)]


class ShuffleBlock(nn.Module):
    """ShuffleNet v2 unit: (N, in, H, W) -> (N, out, H/stride, W/stride).

    At stride 1 the even channels pass unchanged and the odd channels go through the main branch. At stride 2 all
    channels go through both the projection and the main branch.
    """

    def __init__(
        self, in_channels: int, out_channels: int, stride: int, affine: bool, kernel: int, xception: bool = False
    ):
        super().__init__()
        branch = in_channels if stride == 2 else in_channels // 2
        middle, emitted = out_channels // 2, out_channels - branch
        if xception:
            main = [
                *depthwise(branch, kernel, stride, affine),
                *pointwise(branch, middle, affine),
                *depthwise(middle, kernel, 1, affine),
                *pointwise(middle, middle, affine),
                *depthwise(middle, kernel, 1, affine),
                *pointwise(middle, emitted, affine),
            ]
        else:
            main = [
                *pointwise(branch, middle, affine),
                *depthwise(middle, kernel, stride, affine),
                *pointwise(middle, emitted, affine),
            ]
        self.main = nn.Sequential(*main)
        self.projection = None
        if stride == 2:
            self.projection = nn.Sequential(*depthwise(branch, kernel, 2, affine), *pointwise(branch, branch, affine))

    def forward(self, x: Tensor) -> Tensor:
        if self.projection is None:
            kept, x = ShuffleSplit.apply(x)
        else:
            kept = self.projection(x)
        return torch.cat((kept, self.main(x)), dim=1)


# The candidates of every layer, numbered 0, 1, 2, ... in this order: choices and checkpoints refer to these numbers.
# Each is called with (in_channels, out_channels, stride, affine) and returns a module that maps (N, in, H, W) to
# (N, out, H/stride, W/stride), or None where it is not offered.
CANDIDATES: dict[str, Callable[[int, int, int, bool], nn.Module | None]] = {
    "shuffle3": partial(ShuffleBlock, kernel=3),
    "shuffle5": partial(ShuffleBlock, kernel=5),
    "shuffle7": partial(ShuffleBlock, kernel=7),
    "xception": partial(ShuffleBlock, kernel=3, xception=True),
}


# The rest computes what plain PyTorch would, in less time. GRAPH_CALLS and GRAPH_BYTES are for CUDA graphs.

GRAPH_CALLS = 3000  # batches that repay capturing, which takes up to 36 s
GRAPH_BYTES = 40  # needed for each byte that goes into a block; 26 and 73 were measured at batch 96 and 256


class BatchNorm(nn.BatchNorm2d):
    """BatchNorm that does not count its calls in training: with 60 layers, that is 60 tiny kernels a step.

    The counter stays in the state. Without a momentum, for a plain mean over calls, it is needed and counts.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.momentum is None:
            return super().forward(x)
        running = (self.running_mean, self.running_var) if self.track_running_stats else (None, None)
        return F.batch_norm(x, *running, self.weight, self.bias, True, self.momentum, self.eps)


class ShuffleSplit(torch.autograd.Function):
    """Channel shuffle and split in one: (N, C, H, W) -> the even and the odd channels, (N, C/2, H, W) each.

    The backward of two plain slices fills two tensors with zeros and adds them; here both gradients go into one.
    """

    @staticmethod
    def forward(ctx, x: Tensor) -> tuple[Tensor, Tensor]:
        ctx.layout = x.shape, x.stride()
        # The odd half feeds a convolution, which would copy a strided view twice: here and in its backward.
        return x[:, 0::2], x[:, 1::2].clone()

    @staticmethod
    def backward(ctx, even: Tensor, odd: Tensor) -> Tensor:
        grad = even.new_empty_strided(*ctx.layout)
        grad[:, 0::2], grad[:, 1::2] = even, odd
        return grad


class DepthwiseConv(nn.Conv2d):
    """One square kernel of odd size per channel, padded to keep the map: (N, C, H, W) -> (N, C, H/stride, W/stride)."""

    def __init__(self, channels: int, kernel: int, stride: int):
        super().__init__(channels, channels, kernel, stride, padding=kernel // 2, groups=channels, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        mixed = torch.is_autocast_enabled("cpu")
        slow = self.kernel_size[0] > 3 or (mixed and self.stride[0] > 1)
        if x.device.type == "cpu" and torch.is_grad_enabled() and slow:
            dtype = torch.get_autocast_dtype("cpu") if mixed else x.dtype
            return DepthwiseFunction.apply(x.to(dtype), self.weight.to(dtype), self.stride[0])
        return super().forward(x)


class DepthwiseFunction(torch.autograd.Function):
    """Depthwise convolution with two gradients that oneDNN (as of PyTorch 2.14) is slow at on a CPU.

    The weight gradient is fast for depthwise kernels up to 3 wide only; wider ones fall back to a grouped convolution
    that is 5 to 10 times slower. So it is computed three kernel columns at a time: a strip of columns is a narrower
    kernel on shifted images. The input gradient at stride 2 is computed in fp32: in bf16 it is 15 to 50 times slower.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, stride: int) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.stride = stride
        return F.conv2d(x, weight, None, stride, weight.shape[-1] // 2, groups=len(weight))

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor, None]:
        x, weight = ctx.saved_tensors
        stride, kernel, pad = ctx.stride, weight.shape[-1], weight.shape[-1] // 2

        def gradients(grad, x, weight, padding, mask):
            geometry = (stride, stride), padding, (1, 1), False, (0, 0), len(weight)
            return torch.ops.aten.convolution_backward(grad, x, weight, None, *geometry, mask)

        strips, padded, last = [], F.pad(x, (pad, pad)), (grad.shape[-1] - 1) * stride
        for left in range(0, kernel, 3):
            strip = weight[..., left : left + 3]
            shifted = padded[..., left : left + last + strip.shape[-1]]
            strips.append(gradients(grad, shifted, strip, (pad, 0), (False, True, False))[1])
        grad_x = None
        if ctx.needs_input_grad[0]:
            wide = torch.promote_types(grad.dtype, torch.float32) if stride > 1 else grad.dtype
            operands = (tensor.to(wide) for tensor in (grad, x, weight))
            grad_x = gradients(*operands, (pad, pad), (True, False, False))[0].to(x.dtype)
        return grad_x, torch.cat(strips, dim=-1), None


def capture_blocks(model: nn.Module, images: Tensor, batches: int) -> str:
    """In training mode, blocks from now on replay a CUDA graph each, instead of launching their kernels one by one.

    With small batches the GPU waits for these launches. Call it in the loop's grad mode and autocast, with BatchNorm's
    momentum set, before worker processes start and before DistributedDataParallel wraps the network.

    model: a Supernet. images: a batch on the device; all later ones must have its shape. batches: how many will come.
    Returns what the log says: that the graphs are used, or why not. `release_blocks` undoes it.
    """
    if images.device.type != "cuda":
        return f"not used: the device is {images.device.type}"
    if batches < GRAPH_CALLS:
        return f"not used: {batches:,} batches do not repay capturing"
    buffers = [buffer.clone() for buffer in model.buffers()]  # warming up changes BatchNorm's statistics
    model.train()
    samples = []
    with torch.no_grad():  # the inputs of all layers, with the real dtype and layout
        x = model.stem(images)
        for layer in model.layers:
            samples.append(x)
            x = next(iter(layer.values()))(x)
    needed = GRAPH_BYTES * sum(sample.nbytes for sample in samples)
    free = torch.cuda.mem_get_info(images.device)[0]
    line = f"not used: they need about {needed / 2**30:.1f} GiB of the device and {free / 2**30:.1f} are free"
    if needed <= free:
        try:
            for layer, sample in zip(model.layers, samples, strict=True):
                # Only one block of a layer runs at a time, so its candidates share the input and one memory pool.
                sample.requires_grad_(torch.is_grad_enabled())  # else no gradient would reach the layers before
                pool = torch.cuda.graph_pool_handle()
                for block in layer.values():
                    if any(True for _ in block.parameters()):
                        torch.cuda.make_graphed_callables(block, (sample,), pool=pool)
            line = "used for the blocks"
        except torch.OutOfMemoryError:
            release_blocks(model)
            line = "not used: the device ran out of memory while capturing them"
    for buffer, before in zip(model.buffers(), buffers, strict=True):
        buffer.copy_(before)  # in place: the graphs hold its address
    model.zero_grad(set_to_none=True)
    return line


def release_blocks(model: nn.Module) -> None:
    """Gives the blocks their own forward back, and the graphs' memory to the device."""
    for layer in model.layers:
        for block in layer.values():
            block.__dict__.pop("forward", None)  # the method of the class stands behind it
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
