"""The supernet, any path of it as a network of its own, and the space of all paths.

Channels, strides and the order of operations follow Guo et al., arXiv 1904.00420, table 1, and the
official code (megvii-model/SinglePathOneShot); the layout for small images is that of
ShunLu91/Single-Path-One-Shot-NAS.
"""

import copy
import math
import operator
import random
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from blocks import CANDIDATES, BatchNorm, pointwise

Choice = tuple[int, ...]  # the number of one candidate for every layer


@dataclass(frozen=True)
class Space:
    """A search space as plain data.

    stem, layers: channels and stride of the stem and of each layer. last: channels of the last
    convolution. candidates: names in CANDIDATES; a choice numbers them 0, 1, 2, ... in this order.
    """

    stem: list[int]
    layers: list[list[int]]
    last: int
    candidates: list[str]

    def __post_init__(self):
        # As JSON gives it back, which has neither tuples nor NumPy's numbers.
        object.__setattr__(self, "stem", [int(number) for number in self.stem])
        layers = [[int(channels), int(stride)] for channels, stride in self.layers]
        object.__setattr__(self, "layers", layers)
        object.__setattr__(self, "candidates", list(self.candidates))


def stages(*stages: tuple[int, int, int]) -> list[list[int]]:
    """Layers from (count, channels, stride of the first one); the others have stride 1."""
    return [[c, stride if i == 0 else 1] for count, c, stride in stages for i in range(count)]


SHUFFLE = ["shuffle3", "shuffle5", "shuffle7", "xception"]
LARGE = stages((4, 64, 2), (4, 160, 2), (8, 320, 2), (4, 640, 2))
SMALL = stages((4, 64, 1), (4, 160, 2), (8, 320, 2), (4, 640, 1))
MACRO = stages((2, 64, 2), (3, 128, 2), (3, 256, 2))
SPACES = {
    # Guo et al., table 1, for ImageNet, and with fewer strides for images of up to 64 px.
    "spos_large": Space([16, 2], LARGE, 1024, SHUFFLE),
    "spos_small": Space([16, 1], SMALL, 1024, SHUFFLE),
    # Su et al., arXiv 2103.11922, which trained all 6,561 networks of it (xiusu/NAS-Bench-Macro).
    "nasbench_macro": Space([32, 1], MACRO, 1280, ["identity", "mb3_k3", "mb6_k5"]),
}
INITS = "identity", "official"
NOISE = 0.1  # of the weights near the identity; see Supernet.initialise
torch.backends.mha.set_fastpath_enabled(False)  # it hides attention from the counter of operations


def defaults(image_size: int) -> dict[str, str]:
    """Space and initial weights for an image size; "identity" was tried up to 64 px only."""
    if image_size <= 64:
        return {"space": "spos_small", "init": "identity"}
    return {"space": "spos_large", "init": "official"}


class Supernet(nn.Module):
    """All architectures in one set of weights, or, with `choice`, one network of them.

    image_size: side of the square images in pixels. affine: whether BatchNorm has scale and shift
    (not in the paper's supernet, but in its stand-alone networks). init: one of INITS, see
    `initialise`. space, init: None is the default of the image size. Raises ValueError if `choice`
    is not one candidate for each layer, or if PyTorch does not accept a candidate.
    """

    def __init__(
        self,
        num_classes: int,
        image_size: int,
        affine: bool = False,
        choice: Sequence[int] | None = None,
        init: str | None = None,
        space: Space | None = None,
    ):
        super().__init__()
        self.space = space = space or SPACES[defaults(image_size)["space"]]
        self.image_size, self.names = image_size, list(space.candidates)
        in_channels, stride = space.stem
        conv = nn.Conv2d(3, in_channels, 3, stride, padding=1, bias=False)
        norm = BatchNorm(in_channels, affine=affine)
        self.stem = nn.Sequential(conv, norm, nn.ReLU(inplace=True))
        self.layers = nn.ModuleList()
        for i, (out_channels, stride) in enumerate(space.layers):
            layer = nn.ModuleDict()
            for number, name in enumerate(space.candidates):
                # A slice, since `check` below reports a choice that is too short.
                if choice is None or tuple(choice[i : i + 1]) == (number,):
                    if name not in CANDIDATES:
                        raise ValueError(f"there is no candidate {name!r} in blocks.py")
                    try:
                        block = CANDIDATES[name](in_channels, out_channels, stride, affine)
                        if block is not None:
                            layer[name] = block
                            if any(map(nn.parameter.is_lazy, block.parameters())):
                                raise ValueError("lazy modules are not supported")
                    except Exception as error:  # of a user's own block, or of its name
                        reason = error.args[0] if error.args else error
                        raise ValueError(f"candidate {name!r}, layer {i}: {reason}") from None
            self.layers.append(layer)
            in_channels = out_channels
        self.last = nn.Sequential(*pointwise(in_channels, space.last, affine))
        self.head = Head(space.last, num_classes)
        self.options = [[self.names.index(name) for name in layer] for layer in self.layers]
        if choice is not None:
            self.check(choice)
        self.initialise(init or defaults(image_size)["init"])

    def initialise(self, init: str) -> None:
        """Draws new weights (img/README.md, "Initial weights").

        "official": normal, of deviation 1 / (inputs per group); the stem 0.01. "identity": each
        output channel is a copy of an input channel, in turn, plus normal noise of deviation
        NOISE / sqrt(inputs of a filter), similar to DiracNets (arXiv 1706.00388): all paths nearly
        agree at first. The stem is normal with deviation 1/3. The classifier has 0.01 in both.
        """
        for module in self.modules():
            if isinstance(module, nn.Conv2d) and module.weight.requires_grad:
                outputs, inputs, *kernel = module.weight.shape
                if init == "official" or module is self.stem[0]:
                    nn.init.normal_(module.weight, std=1 / inputs)
                    continue
                nn.init.normal_(module.weight, std=NOISE / math.sqrt(inputs * math.prod(kernel)))
                channels, centre = torch.arange(outputs), [side // 2 for side in kernel]
                with torch.no_grad():
                    module.weight[(channels, channels % inputs, *centre)] += 1
        nn.init.normal_(self.head.classifier.weight, std=0.01)
        if init == "official":  # drawn a second time
            nn.init.normal_(self.stem[0].weight, std=0.01)

    def check(self, choice: Sequence[int]) -> Choice:
        """`choice` as a tuple of ints; raises ValueError unless it is one candidate per layer."""
        choice = tuple(operator.index(number) for number in choice)
        if len(choice) != len(self.layers):
            raise ValueError(f"a choice has {len(self.layers)} numbers, this one {len(choice)}")
        for i, (number, options) in enumerate(zip(choice, self.options, strict=True)):
            if number not in options:
                offered = f", only {', '.join(map(str, options))}" if options else ""
                raise ValueError(f"layer {i} has no candidate {number}{offered}")
        return choice

    def path(self, choice: Sequence[int]) -> nn.Sequential:
        """One architecture as a view: stem, blocks, last convolution and head are our own."""
        names = [self.names[number] for number in self.check(choice)]
        blocks = [layer[name] for layer, name in zip(self.layers, names, strict=True)]
        return nn.Sequential(self.stem, *blocks, self.last, self.head)

    def forward(self, x: Tensor, choice: Sequence[int]) -> Tensor:
        """(N, 3, image_size, image_size) -> logits (N, classes) of the path `choice`."""
        return self.path(choice)(x)

    def load_path(self, state: dict[str, Tensor]) -> None:
        """Takes the weights of this network, which is built with a choice, from a supernet's state.

        What a supernet lacks, as BatchNorm's scales and shifts, stays as it is. Raises ValueError
        if another entry is missing.
        """
        choice = [options[0] for options in self.options]
        classes = self.head.classifier.out_features
        shared = Supernet(classes, self.image_size, choice=choice, space=self.space).state_dict()
        if lacking := [key for key in shared if key not in state]:
            raise ValueError(f"it lacks {', '.join(lacking[:3])}")
        self.load_state_dict({key: state[key] for key in shared}, strict=False)

    def place(self, device: torch.device, memory_format: torch.memory_format) -> None:
        """Moves to a device, and weights of four dimensions, no others, into a memory format."""
        self.to(device)
        for tensor in (*self.parameters(), *self.buffers()):
            if tensor.ndim == 4:
                tensor.data = tensor.data.to(memory_format=memory_format)


class Head(nn.Module):
    """Global average pooling and the classifier, in fp32: (N, C, H, W) -> (N, classes)."""

    def __init__(self, channels: int, num_classes: int):
        super().__init__()
        self.classifier = nn.Linear(channels, num_classes, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            # Not a mean over (2, 3): its gradient is a broadcast view, which makes the backward of
            # the last BatchNorm many times slower on a CPU; this gradient is dense.
            return self.classifier(F.avg_pool2d(x.float(), x.shape[2:]).flatten(1))


class Classifier(nn.Module):
    """A path with the normalisation inside: uint8 (N, 3, S, S) -> logits (N, classes).

    mean, std: per channel, for values from 0 to 1.
    """

    def __init__(self, path: nn.Sequential, mean: Sequence[float], std: Sequence[float]):
        super().__init__()
        self.path = path
        self.mean, self.std = (nn.Buffer(torch.tensor(v).view(3, 1, 1)) for v in (mean, std))

    def forward(self, images: Tensor) -> Tensor:
        return self.path((images.float() / 255 - self.mean) / self.std)


def tracked_norms(module: nn.Module) -> list[nn.Module]:
    """The modules with running statistics, BatchNorm of any dimension and the like."""
    return [m for m in module.modules() if getattr(m, "running_mean", None) is not None]


class Node:
    """A module at its place in the tree of paths, with BatchNorm statistics of its own.

    The statistics depend on the path up to the module alone, so paths share the computation of a
    common prefix. The tree is walked depth first: one batch of activations per layer is in memory.
    """

    def __init__(self, module: nn.Module):
        self.module, self.children = module, []
        buffers = [(m.running_mean, getattr(m, "running_var", None)) for m in tracked_norms(module)]
        self.buffers = [buffer for pair in buffers for buffer in pair if buffer is not None]
        self.statistics = [buffer.clone() for buffer in self.buffers]

    def calibrate(self, x: Tensor, i: int) -> None:
        """Adds the i-th batch, counted from 1, to the statistics of this node and all below it.

        The norms are in training mode with momentum 1: buffers are the statistics of the batch.
        """
        for buffer in self.buffers:
            buffer.zero_()  # momentum 1 still computes 0 * old, and 0 * nan is nan
        x = self.module(x)
        for mean, batch in zip(self.statistics, self.buffers, strict=True):
            if i == 1:
                mean.copy_(batch)
            else:
                mean.lerp_(batch, 1 / i)  # the mean over the batches so far
        for child in self.children:
            child.calibrate(x, i)

    def features(self, x: Tensor) -> Iterator[Tensor]:
        """The outputs of the leaves for a batch, in the order of the sorted choices; eval mode."""
        for buffer, mean in zip(self.buffers, self.statistics, strict=True):
            buffer.copy_(mean)
        x = self.module(x)
        if not self.children:
            yield x
        for child in self.children:
            yield from child.features(x)


def path_tree(model: Supernet, choices: Sequence[Choice]) -> Node:
    """The tree of some paths, from the stem to a leaf for each path: its last convolution."""
    root = Node(model.stem)
    nodes = {(): root}
    for choice in sorted(choices):
        *blocks, last, _ = model.path(choice)[1:]
        for depth, block in enumerate(blocks):
            if choice[: depth + 1] not in nodes:
                nodes[choice[: depth + 1]] = Node(block)
                nodes[choice[:depth]].children.append(nodes[choice[: depth + 1]])
        nodes[choice].children.append(Node(last))
    return root


class SearchSpace:
    """The architectures of a network, or those within limits of multiply-adds (inclusive).

    Costs of blocks add up, and take only 24,000 distinct totals at 32 px, so the architectures
    within limits are counted, and drawn exactly uniformly. Raises ValueError if there are none.
    """

    def __init__(self, model: Supernet, low: float | None = None, high: float | None = None):
        self.model, self.options = model, model.options
        self.limited = low is not None or high is not None
        self.low, self.high = low or 0, math.inf if high is None else high
        if self.limited and not self.size:
            fixed, totals = self.costs[0], self._sums[0][0]
            ends = f"from {(fixed + totals[0]) / 1e6} to {(fixed + totals[-1]) / 1e6} million"
            raise ValueError(f"no architecture is within the limits; the space goes {ends}")

    def flops(self, choice: Sequence[int]) -> int:
        """Multiply-adds of convolutions and classifier for one image: the paper's FLOPs."""
        fixed, layers = self.costs
        choice = self.model.check(choice)
        return fixed + sum(costs[number] for costs, number in zip(layers, choice, strict=True))

    def params(self, choice: Sequence[int]) -> int:
        """Parameters of the stand-alone network, with BatchNorm's scales and shifts."""
        return sum(p.numel() for p in self._affine.path(choice).parameters())

    @cached_property
    def _affine(self) -> Supernet:
        classes, size = self.model.head.classifier.out_features, self.model.image_size
        with torch.random.fork_rng(devices=[]):  # its initial weights are not needed
            return Supernet(classes, size, affine=True, space=self.model.space)

    def __contains__(self, choice: Choice) -> bool:
        return not self.limited or self.low <= self.flops(choice) <= self.high

    @property
    def size(self) -> int:
        """The number of architectures."""
        if not self.limited:
            return math.prod(map(len, self.options))
        return self._completions(0, self.costs[0])

    def sample(self, rng: random.Random) -> Choice:
        """One architecture, drawn uniformly."""
        if not self.limited:
            return tuple(options[rng.randrange(len(options))] for options in self.options)
        n, choice = rng.randrange(self.size), []  # the n-th one in lexicographic order
        spent, costs = self.costs
        for layer, options in enumerate(self.options):
            for number in options:
                count = self._completions(layer + 1, spent + costs[layer][number])
                if n < count:
                    break
                n -= count
            choice.append(number)
            spent += costs[layer][number]
        return tuple(choice)

    def sample_distinct(self, rng: random.Random, count: int) -> list[Choice]:
        """That many different architectures, drawn uniformly, or all of them if there are fewer."""
        drawn: dict[Choice, None] = {}
        while len(drawn) < min(count, self.size):
            drawn[self.sample(rng)] = None
        return list(drawn)

    def single_blocks(self) -> list[Choice]:
        """The networks that have the same candidate in all layers, whatever the limits."""
        everywhere = set(self.options[0]).intersection(*self.options)
        return [(number,) * len(self.options) for number in sorted(everywhere)]

    @cached_property
    def costs(self) -> tuple[int, list[dict[int, int]]]:
        """Multiply-adds that all paths share, and those of each layer's candidates by number.

        Raises ValueError, with candidate and layer, if a block breaks the contract of CANDIDATES.
        """
        model, layers, known = self.model, [], {}
        rng = torch.Generator().manual_seed(0)
        fixed, x = multiply_adds(
            model.stem, torch.rand(2, 3, *[model.image_size] * 2, generator=rng)
        )
        for i, (channels, stride) in enumerate(model.space.layers):
            if not self.options[i]:
                raise ValueError(f"layer {i} has no candidate")
            side = -(-x.shape[-1] // stride)
            expected, found = (2, channels, side, side), {}
            for number in self.options[i]:
                name = model.names[number]
                try:
                    key = name, x.shape, expected  # equal blocks are counted once
                    if key not in known:
                        known[key] = multiply_adds(model.layers[i][name], x)
                    found[number], y = known[key]
                    if y.shape != expected:
                        shapes = f"{tuple(x.shape)} becomes {tuple(y.shape)}"
                        raise ValueError(f"{shapes}, not {expected}")
                except Exception as error:  # of a user's own block
                    reason = str(error).strip().partition("\n")[0]
                    raise ValueError(f"candidate {name}, layer {i}: {reason}") from None
            layers.append(found)
            x = torch.rand(expected, generator=rng)
        last, _ = multiply_adds(model.last, x)
        return fixed + last + model.head.classifier.weight.numel(), layers

    @cached_property
    def _sums(self) -> list[tuple[list[int], list[int]]]:
        """For each layer: the sorted costs of all ways from there on, and how many cost less."""
        ways, tables = Counter({0: 1}), []
        for costs in [{0: 0}, *reversed(self.costs[1])]:
            longer = Counter()
            for cost in costs.values():
                for rest, count in ways.items():
                    longer[cost + rest] += count
            ways = longer
            totals = sorted(ways)
            tables.append((totals, [0, *accumulate(ways[total] for total in totals)]))
        return tables[::-1]

    def _completions(self, layer: int, spent: int) -> int:
        """In how many ways a path can go on from `layer` and end within the limits."""
        totals, fewer = self._sums[layer]
        above, below = self.high - spent, self.low - spent
        return max(0, fewer[bisect_right(totals, above)] - fewer[bisect_left(totals, below)])


def multiply_adds(module: nn.Module, x: Tensor) -> tuple[int, Tensor]:
    """Multiply-adds of a module per image of the batch `x`, on the CPU, and its output.

    Raises ValueError if it changes `x`, or if its output has another type or is random.
    """
    module, version = copy.deepcopy(module).cpu().eval(), x._version  # counts in-place changes
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        with FlopCounterMode(display=False) as counter:
            y = module(x)
        again = module(x)
        module.train()  # it must not change its input in training either
        for norm in tracked_norms(module):
            norm.eval()  # SyncBatchNorm would ask for a GPU
        module(x)
    if x._version != version:
        raise ValueError("it changes its input")
    if y.dtype != x.dtype:
        raise ValueError(f"its output is {y.dtype}, not {x.dtype}")
    if not torch.allclose(y, again, equal_nan=True):
        raise ValueError("in evaluation mode, the same images have another output every time")
    return counter.get_total_flops() // 2 // len(x), y  # PyTorch counts a multiply-add as two
