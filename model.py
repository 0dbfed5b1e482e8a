"""The supernet of 20 layers, any one path of it as a network of its own, and the space of all paths.

Channels, strides and the order of operations follow Guo et al., arXiv 1904.00420, table 1, and the official code
(megvii-model/SinglePathOneShot); the layout for small images is that of ShunLu91/Single-Path-One-Shot-NAS.
"""

import copy
import math
import operator
import random
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cached_property
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from blocks import CANDIDATES, BatchNorm, pointwise

Choice = tuple[int, ...]  # the number of one candidate for every layer

STEM_CHANNELS, LAST_CHANNELS = 16, 1024
CHANNELS = [64] * 4 + [160] * 4 + [320] * 8 + [640] * 4
INITS = "identity", "official"
NOISE = 0.1  # of the weights near the identity; see Supernet.initialise


def default_init(image_size: int) -> str:
    """The initial weights that suit a size of images: those near the identity were tried up to 64 px only."""
    return "identity" if image_size <= 64 else "official"


class Supernet(nn.Module):
    """All architectures in one set of weights; with `choice`, the one network of that choice.

    image_size: side of the square images in pixels. Up to 64 the stem keeps the size and two layers halve the map;
    above 64 the stem and four layers do. affine: whether BatchNorm has scale and shift (not in the paper's supernet,
    but in its stand-alone networks). init: one of INITS, see `initialise`; None takes the default of the image size.
    Raises ValueError if `choice` is not one candidate for each layer.
    """

    def __init__(
        self,
        num_classes: int,
        image_size: int,
        affine: bool = False,
        choice: Sequence[int] | None = None,
        init: str | None = None,
    ):
        super().__init__()
        self.image_size, self.names = image_size, list(CANDIDATES)
        stem_stride, halving = (1, (4, 8)) if image_size <= 64 else (2, (0, 4, 8, 16))
        self.stem = nn.Sequential(
            nn.Conv2d(3, STEM_CHANNELS, 3, stem_stride, padding=1, bias=False),
            BatchNorm(STEM_CHANNELS, affine=affine),
            nn.ReLU(inplace=True),
        )
        self.layers = nn.ModuleList()
        in_channels = STEM_CHANNELS
        for i, out_channels in enumerate(CHANNELS):
            layer = nn.ModuleDict()
            for number, (name, make) in enumerate(CANDIDATES.items()):
                wanted = choice is None or list(choice[i : i + 1]) == [number]
                block = make(in_channels, out_channels, 2 if i in halving else 1, affine) if wanted else None
                if block is not None:
                    layer[name] = block
            self.layers.append(layer)
            in_channels = out_channels
        self.last = nn.Sequential(*pointwise(in_channels, LAST_CHANNELS, affine))
        self.head = Head(num_classes)
        self.options = [[self.names.index(name) for name in layer] for layer in self.layers]
        if choice is not None:
            self.check(choice)
        self.initialise(init or default_init(image_size))

    def initialise(self, init: str) -> None:
        """Draws new weights: "identity" or "official".

        "identity": every output channel begins as a copy of one input channel, the input channels in turn where there
        are more outputs, plus normal noise of deviation NOISE / sqrt(inputs of a filter). So at first a block
        standardises and rectifies each channel by itself, whichever candidate it is: all paths nearly agree, and no
        layer scrambles what the classifier sees. With "official", normal weights of deviation 1 / (inputs per group),
        two random paths agree on little, and the shared weights learn slowly: after 4 epochs of CIFAR-10 a median of
        24% of 100 recalibrated paths, and 52% near the identity (img/README.md, "Initial weights"). Kin to
        DiracNets (Zagoruyko and Komodakis, arXiv 1706.00388).

        The stem is normal with deviation 1/3, "official" 0.01; the classifier 0.01 in both.
        """
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                outputs, inputs, kernel, _ = module.weight.shape
                if init == "official" or module is self.stem[0]:
                    nn.init.normal_(module.weight, std=1 / inputs)
                    continue
                nn.init.normal_(module.weight, std=NOISE / math.sqrt(inputs * kernel**2))
                channels = torch.arange(outputs)
                with torch.no_grad():
                    module.weight[channels, channels % inputs, kernel // 2, kernel // 2] += 1
        nn.init.normal_(self.head.classifier.weight, std=0.01)
        if init == "official":
            nn.init.normal_(self.stem[0].weight, std=0.01)

    def check(self, choice: Sequence[int]) -> Choice:
        """`choice` as a tuple of ints; raises ValueError unless it is one candidate for each layer."""
        choice = tuple(operator.index(number) for number in choice)
        if len(choice) != len(CHANNELS):
            raise ValueError(f"a choice has {len(CHANNELS)} numbers, this one {len(choice)}: {choice}")
        for i, (number, options) in enumerate(zip(choice, self.options, strict=True)):
            if number not in options:
                offered = f", only {', '.join(map(str, options))}" if options else ""
                raise ValueError(f"layer {i} has no candidate {number}{offered}")
        return choice

    def path(self, choice: Sequence[int]) -> nn.Sequential:
        """One architecture as a view: stem, 20 blocks, last convolution and head are the supernet's own modules."""
        choice = self.check(choice)
        blocks = [layer[self.names[number]] for layer, number in zip(self.layers, choice, strict=True)]
        return nn.Sequential(self.stem, *blocks, self.last, self.head)

    def forward(self, x: Tensor, choice: Sequence[int]) -> Tensor:
        """(N, 3, image_size, image_size) -> logits (N, classes) of the path `choice`."""
        return self.path(choice)(x)

    def load_path(self, state: dict[str, Tensor], choice: Sequence[int]) -> None:
        """Takes the weights of one path from a supernet's state; this network must be built with that choice.

        BatchNorm's scales and shifts, which a supernet lacks, stay as they are. Raises ValueError if any other entry
        is missing, or if one is left over that belongs to no candidate.
        """
        if [[number] for number in self.check(choice)] != self.options:
            raise ValueError(f"this network was not built with choice={tuple(choice)}")
        elsewhere = tuple(
            f"layers.{i}.{name}." for i, layer in enumerate(self.layers) for name in self.names if name not in layer
        )
        ours = {key: value for key, value in state.items() if not key.startswith(elsewhere)}
        missing, unexpected = self.load_state_dict(ours, strict=False)
        scales = {
            f"{name}.{p}"
            for name, m in self.named_modules()
            if isinstance(m, nn.BatchNorm2d)
            for p in ("weight", "bias")
        }
        if wrong := [key for key in missing if key not in scales] + unexpected:
            raise ValueError(f"not the state of a supernet with this path; {len(wrong)} entries differ: {wrong[:3]}")


class Head(nn.Module):
    """Global average pooling and the classifier, in fp32 under autocast too: (N, C, H, W) -> (N, classes)."""

    def __init__(self, num_classes: int):
        super().__init__()
        self.classifier = nn.Linear(LAST_CHANNELS, num_classes, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            # Not a mean over (2, 3): its gradient is a broadcast view, with which the backward of the last BatchNorm
            # is many times slower on a CPU; this one's gradient is dense and channels-last.
            return self.classifier(F.avg_pool2d(x.float(), x.shape[2:]).flatten(1))


class Classifier(nn.Module):
    """A path with the normalisation inside: uint8 (N, 3, S, S) -> logits (N, classes).

    mean, std: per channel, for values from 0 to 1.
    """

    def __init__(self, path: nn.Sequential, mean: Sequence[float], std: Sequence[float]):
        super().__init__()
        self.path = path
        for name, values in (("mean", mean), ("std", std)):
            self.register_buffer(name, torch.tensor(values).view(3, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        return self.path((images.float() / 255 - self.mean) / self.std)


class SearchSpace:
    """The architectures of a network, all of them or those within limits of multiply-adds (inclusive, None: no limit).

    Costs of blocks add up, and they add up to few different sums (24,000 at 32 px), so architectures are counted
    instead of tried: drawing within limits is exact and uniform. Raises ValueError, which says what can be had, if no
    architecture is within the limits.
    """

    def __init__(self, model: Supernet, min_flops: int | None = None, max_flops: int | None = None):
        self.model, self.options = model, model.options
        self.limited = min_flops is not None or max_flops is not None
        self.low = -math.inf if min_flops is None else min_flops
        self.high = math.inf if max_flops is None else max_flops
        if self.limited and not self.size:
            low, high = self.nearest(-math.inf)[1], self.nearest(math.inf)[0]
            limits = {"at least": min_flops, "at most": max_flops}
            asked = " and ".join(f"{word} {limit / 1e6}" for word, limit in limits.items() if limit is not None)
            nearest = {c / 1e6 for limit in limits.values() if limit is not None for c in self.nearest(limit) if c}
            raise ValueError(
                f"no architecture has {asked} million multiply-adds; the space goes from {low / 1e6} to {high / 1e6}, "
                f"and has {', '.join(map(str, sorted(nearest)))} next to the limits"
            )

    def flops(self, choice: Sequence[int]) -> int:
        """Multiply-adds of the convolutions and the classifier for one image, as the paper counts FLOPs."""
        fixed, layers = self._costs
        return fixed + sum(costs[number] for costs, number in zip(layers, self.model.check(choice), strict=True))

    def params(self, choice: Sequence[int]) -> int:
        """Parameters of the architecture as a stand-alone network, BatchNorm's scales and shifts included."""
        path = self.model.path(choice)
        norms = [m for m in path.modules() if isinstance(m, nn.BatchNorm2d) and not m.affine]
        return sum(p.numel() for p in path.parameters()) + sum(2 * norm.num_features for norm in norms)

    def __contains__(self, choice: Choice) -> bool:
        known = len(choice) == len(self.options) and all(map(operator.contains, self.options, choice))
        return known and (not self.limited or self.low <= self.flops(choice) <= self.high)

    @property
    def size(self) -> int:
        """How many architectures there are."""
        return self._completions(0, self._costs[0])

    def nth(self, n: int) -> Choice:
        """The n-th architecture in lexicographic order, for n in range(size)."""
        spent, costs = self._costs
        choice = []
        for layer, options in enumerate(self.options):
            for number in options:
                count = self._completions(layer + 1, spent + costs[layer][number])
                if n < count:
                    break
                n -= count
            choice.append(number)
            spent += costs[layer][number]
        return tuple(choice)

    def sample(self, rng: random.Random) -> Choice:
        """One architecture, drawn uniformly."""
        if self.limited:
            return self.nth(rng.randrange(self.size))
        return tuple(options[rng.randrange(len(options))] for options in self.options)

    def sample_distinct(self, rng: random.Random, count: int) -> list[Choice]:
        """That many different architectures, drawn uniformly, or all of them if there are fewer."""
        drawn: dict[Choice, None] = {}
        while len(drawn) < min(count, self.size):
            drawn[self.sample(rng)] = None
        return list(drawn)

    def single_blocks(self) -> list[Choice]:
        """The networks that have the same candidate in all layers, whatever the limits."""
        return [(n,) * len(CHANNELS) for n in self.options[0] if all(n in options for options in self.options)]

    def mutate(self, choice: Choice, probability: float, rng: random.Random) -> Choice:
        """Each number, with that probability, becomes another one of its layer's, if there is another."""
        others = [[other for other in options if other != n] for n, options in zip(choice, self.options, strict=True)]
        return tuple(
            rng.choice(rest) if rng.random() < probability and rest else number
            for number, rest in zip(choice, others, strict=True)
        )

    def breed(
        self, parents: Sequence[Choice], taken: set[Choice], count: int, mutation_prob: float, rng: random.Random
    ) -> list[Choice]:
        """A generation of `count` architectures that are not `taken`; at least so many must be left.

        Half by mutation and half by crossover of two parents, as in the official code (src/Search/search.py); random
        draws replace those that failed 10 times.
        """
        children: dict[Choice, None] = {}

        def add(make: Callable[[], Choice], wanted: int) -> None:
            for _ in range(wanted):
                for child in (make() for _ in range(10)):
                    if child not in taken and child not in children and child in self:
                        children[child] = None
                        break

        if parents:
            add(lambda: self.mutate(rng.choice(parents), mutation_prob, rng), count // 2)
        if len(parents) > 1:
            add(lambda: crossover(*rng.sample(parents, 2), rng), count - count // 2)
        while len(children) < count:
            add(lambda: self.sample(rng), 1)
        return list(children)

    def nearest(self, limit: float) -> tuple[int | None, int | None]:
        """The largest cost below `limit` and the smallest at or above it, without limits; None where there is none."""
        fixed, sums = self._costs[0], self._sums[0][0]
        i = bisect_left(sums, limit - fixed)
        return (fixed + sums[i - 1] if i else None), (fixed + sums[i] if i < len(sums) else None)

    @cached_property
    def _costs(self) -> tuple[int, list[dict[int, int]]]:
        """Multiply-adds of what every path has, and of each layer's candidates by number."""
        x = torch.zeros(1, 3, self.model.image_size, self.model.image_size, device="meta")
        stem, x = multiply_adds(self.model.stem, x)
        layers = []
        for layer, options in zip(self.model.layers, self.options, strict=True):
            found = {number: multiply_adds(layer[self.model.names[number]], x) for number in options}
            layers.append({number: cost for number, (cost, _) in found.items()})
            x = found[options[0]][1]
        last, _ = multiply_adds(self.model.last, x)
        return stem + last + self.model.head.classifier.weight.numel(), layers

    @cached_property
    def _sums(self) -> list[tuple[list[int], list[int]]]:
        """For each layer, all costs that it and the later ones can add up to, and how many ways have less than each."""
        ways, tables = Counter({0: 1}), []
        for costs in [{0: 0}, *reversed(self._costs[1])]:
            longer = Counter()
            for cost in costs.values():
                for rest, count in ways.items():
                    longer[cost + rest] += count
            ways = longer
            ordered = sorted(ways)
            tables.append((ordered, [0, *accumulate(ways[total] for total in ordered)]))
        return tables[::-1]

    def _completions(self, layer: int, spent: int) -> int:
        """How many ways there are to go on from `layer` so that the whole path is within the limits."""
        sums, fewer = self._sums[layer]
        return max(0, fewer[bisect_right(sums, self.high - spent)] - fewer[bisect_left(sums, self.low - spent)])


def crossover(first: Choice, second: Choice, rng: random.Random) -> Choice:
    """Each number comes from one of the two."""
    return tuple(rng.choice(pair) for pair in zip(first, second, strict=True))


def multiply_adds(module: nn.Module, x: Tensor) -> tuple[int, Tensor]:
    """Multiply-adds of a module for one image on the meta device, and what comes out of it."""
    module = copy.deepcopy(module).to("meta").eval()
    module.__dict__.pop("forward", None)  # of a captured block; it would replay the block's graph
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        x = module(x)
    return counter.get_total_flops() // 2, x  # PyTorch counts a multiply-add as two
