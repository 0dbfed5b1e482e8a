"""The four candidates of a layer: ShuffleNet v2 units with kernels of 3, 5 and 7, and a deeper "xception" unit.

Shapes and the order of operations follow Guo et al., arXiv 1904.00420, and the official code
(megvii-model/SinglePathOneShot). The two autograd functions compute what plain PyTorch would, in less time on a CPU.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# What a layer chooses from, in the order of the choice's numbers 0, 1, 2, 3.
CANDIDATES = {
    "shuffle3": {"kernel": 3, "xception": False},
    "shuffle5": {"kernel": 5, "xception": False},
    "shuffle7": {"kernel": 7, "xception": False},
    "xception": {"kernel": 3, "xception": True},
}


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


class DepthwiseFunction(torch.autograd.Function):
    """Depthwise convolution with two gradients that oneDNN (as of PyTorch 2.14) is slow at on a CPU.

    The weight gradient is computed three kernel columns at a time: it is fast for depthwise kernels up to 3 wide only;
    wider ones fall back to one for grouped convolutions that is 5 to 10 times slower. A strip of columns is a narrower
    kernel on shifted images. The images' gradient at stride 2 is computed in fp32: in bf16 it is 15 to 50 times slower.
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


class BatchNorm(nn.BatchNorm2d):
    """BatchNorm that does not count its calls in training: with 60 layers that is many tiny kernels a step.

    The counter stays in the state. Without a momentum, for a plain mean over calls, it is needed and counts.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.momentum is None:
            return super().forward(x)
        running = (self.running_mean, self.running_var) if self.track_running_stats else (None, None)
        return F.batch_norm(x, *running, self.weight, self.bias, True, self.momentum, self.eps)


def depthwise(channels: int, kernel: int, stride: int, affine: bool) -> list[nn.Module]:
    """Depthwise convolution and BatchNorm, no activation: (N, C, H, W) -> (N, C, H/stride, W/stride)."""
    return [DepthwiseConv(channels, kernel, stride), BatchNorm(channels, affine=affine)]


def pointwise(in_channels: int, out_channels: int, affine: bool) -> list[nn.Module]:
    """1x1 convolution, BatchNorm, ReLU: (N, in, H, W) -> (N, out, H, W)."""
    conv = nn.Conv2d(in_channels, out_channels, kernel_size=1, bias=False)
    return [conv, BatchNorm(out_channels, affine=affine), nn.ReLU(inplace=True)]


class Block(nn.Module):
    """One candidate of a layer: (N, in, H, W) -> (N, out, H/stride, W/stride).

    At stride 1 the even channels pass unchanged and the odd ones go through the main branch. At stride 2 all channels
    go through both the projection and the main branch.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, affine: bool, kernel: int, xception: bool):
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
