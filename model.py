"""The search space: a supernet of 20 layers with 4 candidates each, and any one path of it as a network of its own.

Channels, strides and the order of operations follow Guo et al., arXiv 1904.00420, table 1, and the official code
(megvii-model/SinglePathOneShot); the layout for small images is that of ShunLu91/Single-Path-One-Shot-NAS.
"""

import math
import operator
import random
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blocks import CANDIDATES, BatchNorm, Block, pointwise

Choice = tuple[int, ...]

STEM_CHANNELS, LAST_CHANNELS = 16, 1024
CHANNELS = [64] * 4 + [160] * 4 + [320] * 8 + [640] * 4
LAYERS = len(CHANNELS)
NAMES = list(CANDIDATES)
INITS = "identity", "official"
NOISE = 0.1  # of the weights near the identity; see Supernet.initialise
SINGLE_BLOCK_PATHS = [(number,) * LAYERS for number in range(len(NAMES))]


def parse_choice(text: str) -> Choice:
    """The numbers of a choice that is written as 1-0-3-..."""
    return tuple(map(int, text.split("-")))


def default_init(image_size: int) -> str:
    """The initial weights that suit a size of images: near the identity was tried at up to 64 px only."""
    return "identity" if image_size <= 64 else "official"


def mutate(choice: Choice, probability: float, rng: random.Random) -> Choice:
    """Each number, with that probability, becomes one of the other three."""
    others = [[other for other in range(len(NAMES)) if other != number] for number in choice]
    return tuple(
        rng.choice(rest) if rng.random() < probability else number for number, rest in zip(choice, others, strict=True)
    )


def crossover(first: Choice, second: Choice, rng: random.Random) -> Choice:
    """Each number comes from one of the two."""
    return tuple(rng.choice(pair) for pair in zip(first, second, strict=True))


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


class Supernet(nn.Module):
    """All 4^20 architectures in one set of weights; with `choice`, the one network of that choice.

    image_size: side of the square images in pixels. Up to 64 the stem keeps the size and two layers halve the map,
    above it the stem and four layers do. affine: whether BatchNorm has scale and shift (not in the paper's supernet,
    but in its stand-alone networks). init: one of INITS, see `initialise`; None takes the default of the image size.
    Raises ValueError if `choice` is not 20 numbers from 0 to 3.
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
        self.image_size = image_size
        self.options = [range(len(NAMES))] * LAYERS
        if choice is not None:
            self.options = [[number] for number in self.check(choice)]
        stem_stride, halving = (1, (4, 8)) if image_size <= 64 else (2, (0, 4, 8, 16))
        self.stem = nn.Sequential(
            nn.Conv2d(3, STEM_CHANNELS, 3, stem_stride, padding=1, bias=False),
            BatchNorm(STEM_CHANNELS, affine=affine),
            nn.ReLU(inplace=True),
        )
        self.layers = nn.ModuleList()
        in_channels = STEM_CHANNELS
        for i, out_channels in enumerate(CHANNELS):
            shape = in_channels, out_channels, 2 if i in halving else 1, affine
            names = [NAMES[number] for number in self.options[i]]
            self.layers.append(nn.ModuleDict({name: Block(*shape, **CANDIDATES[name]) for name in names}))
            in_channels = out_channels
        self.last = nn.Sequential(*pointwise(in_channels, LAST_CHANNELS, affine))
        self.head = Head(num_classes)
        self.initialise(init or default_init(image_size))

    def initialise(self, init: str) -> None:
        """Draws new weights: "identity" or "official".

        "identity": every output channel begins as a copy of one input channel, the input channels in turn where there
        are more outputs, plus normal noise of deviation NOISE / sqrt(inputs of a filter). So at first a block
        standardises and rectifies each channel by itself, whichever candidate it is: all paths nearly agree, and no
        layer scrambles what the classifier sees. With "official", normal weights of deviation 1 / (inputs per group),
        two random paths agree on little, and the shared weights learn slowly: after 4 epochs of CIFAR-10 a median of
        24% of 100 recalibrated paths, and 50% near the identity (README, "Initial weights near the identity"). Kin to
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
        """`choice` as a tuple of ints; raises ValueError unless it is 20 numbers, each a candidate of its layer."""
        choice = tuple(operator.index(number) for number in choice)
        if len(choice) != LAYERS:
            raise ValueError(f"a choice has {LAYERS} numbers, this one {len(choice)}: {choice}")
        for i, (number, options) in enumerate(zip(choice, self.options, strict=True)):
            if number not in options:
                raise ValueError(f"layer {i} has no candidate {number}, only {', '.join(map(str, options))}")
        return choice

    def path(self, choice: Sequence[int]) -> nn.Sequential:
        """One architecture as a view: stem, 20 blocks, last convolution and head are the supernet's own modules."""
        choice = self.check(choice)
        blocks = [layer[NAMES[number]] for layer, number in zip(self.layers, choice, strict=True)]
        return nn.Sequential(self.stem, *blocks, self.last, self.head)

    def forward(self, x: Tensor, choice: Sequence[int]) -> Tensor:
        """(N, 3, image_size, image_size) -> logits (N, classes) of the path `choice`."""
        return self.path(choice)(x)

    def walk(self, x: Tensor, choices: Sequence[Choice], enter: Callable[[nn.Module, tuple], None]) -> Iterator[Tensor]:
        """What many paths give the head for one batch, in the order of `choices`; equal beginnings are computed once.

        Neighbours share what they have in common, so sort the choices; they must differ. Before a module computes,
        `enter` is called with it and with a key (depth, the choice's numbers so far) that names the network up to and
        including it.
        """
        outputs, previous = [], ()
        for choice in choices:
            differs = (i for i, (a, b) in enumerate(zip(previous, choice, strict=False)) if a != b)
            shared = next(differs, len(previous))
            del outputs[1 + shared :]  # those of the stem and of the shared blocks stay
            body = self.path(choice)[:-1]
            for depth in range(len(outputs), len(body)):
                enter(body[depth], (depth, choice[:depth]))
                outputs.append(body[depth](outputs[-1] if outputs else x))
            yield outputs[-1]
            previous = choice

    def load_path(self, state: dict[str, Tensor], choice: Sequence[int]) -> None:
        """Takes the weights of one path from a supernet's state; this network must be built with that choice.

        BatchNorm's scales and shifts, which a supernet lacks, stay as they are. Raises ValueError if any other entry is
        missing, or if one is left over that belongs to no candidate.
        """
        if list(self.check(choice)) != [number for options in self.options for number in options]:
            raise ValueError(f"this network was not built with choice={tuple(choice)}")
        elsewhere = tuple(
            f"layers.{i}.{name}." for i, number in enumerate(choice) for name in NAMES if name != NAMES[number]
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

    def flops(self, choice: Sequence[int]) -> int:
        """Multiply-adds of the convolutions and the classifier for one image, as the paper counts FLOPs."""
        fixed, layers = self._costs
        return fixed + sum(costs[number] for costs, number in zip(layers, self.check(choice), strict=True))

    def params(self, choice: Sequence[int]) -> int:
        """Parameters of the architecture as a stand-alone network, BatchNorm's scales and shifts included."""
        modules = list(self.path(choice).modules())
        weights = sum(m.weight.numel() for m in modules if isinstance(m, nn.Conv2d | nn.Linear))
        return weights + sum(2 * m.num_features for m in modules if isinstance(m, nn.BatchNorm2d))

    def sample_choice(self, rng: random.Random, min_flops: int | None = None, max_flops: int | None = None) -> Choice:
        """One architecture, drawn uniformly from all those within the limits (multiply-adds, inclusive).

        Raises ValueError if there is none.
        """
        if min_flops is None and max_flops is None:
            return tuple(options[rng.randrange(len(options))] for options in self.options)
        self.require_choices(min_flops, max_flops)
        return self.nth_choice(rng.randrange(self.count_choices(min_flops, max_flops)), min_flops, max_flops)

    def sample_choices(self, rng: random.Random, count: int, low: int | None, high: int | None) -> list[Choice]:
        """That many different architectures within the limits, uniformly, or all of them if there are fewer."""
        drawn: dict[Choice, None] = {}
        while len(drawn) < min(count, self.count_choices(low, high)):
            drawn[self.sample_choice(rng, low, high)] = None
        return list(drawn)

    def breed(
        self,
        parents: Sequence[Choice],
        taken: set[Choice],
        count: int,
        mutation_prob: float,
        rng: random.Random,
        min_flops: int | None = None,
        max_flops: int | None = None,
    ) -> list[Choice]:
        """A generation of `count` architectures that are within the limits and not `taken`; so many must be left.

        Half by mutation, half by crossover of two different parents, as in the official code (src/Search/search.py);
        random draws for those that failed 10 times.
        """
        children: dict[Choice, None] = {}

        def add(make: Callable[[], Choice], wanted: int) -> None:
            for _ in range(wanted):
                for child in (make() for _ in range(10)):
                    if child not in taken and child not in children and self.within(child, min_flops, max_flops):
                        children[child] = None
                        break

        if parents:
            add(lambda: mutate(rng.choice(parents), mutation_prob, rng), count // 2)
        if len(parents) > 1:
            add(lambda: crossover(*rng.sample(parents, 2), rng), count - count // 2)
        while len(children) < count:
            add(lambda: self.sample_choice(rng, min_flops, max_flops), 1)
        return list(children)

    def within(self, choice: Sequence[int], min_flops: int | None, max_flops: int | None) -> bool:
        """Whether an architecture meets the limits."""
        low, high = _bounds(min_flops, max_flops)
        return low <= self.flops(choice) <= high

    def count_choices(self, min_flops: int | None = None, max_flops: int | None = None) -> int:
        """How many architectures have from min_flops to max_flops multiply-adds (None: no limit)."""
        return self._completions(0, self._costs[0], *_bounds(min_flops, max_flops))

    def nth_choice(self, n: int, min_flops: int | None = None, max_flops: int | None = None) -> Choice:
        """The n-th architecture within the limits, in lexicographic order, for n in range(count_choices(...))."""
        spent, costs = self._costs
        bounds = _bounds(min_flops, max_flops)
        choice = []
        for layer in range(LAYERS):
            for number in self.options[layer]:
                count = self._completions(layer + 1, spent + costs[layer][number], *bounds)
                if n < count:
                    break
                n -= count
            choice.append(number)
            spent += costs[layer][number]
        return tuple(choice)

    def flops_beside(self, limit: float) -> tuple[int | None, int | None]:
        """The largest attainable cost below `limit` and the smallest at or above it, None where there is none."""
        fixed, sums = self._costs[0], self._sums[0][0]
        i = bisect_left(sums, limit - fixed)
        return (fixed + sums[i - 1] if i else None), (fixed + sums[i] if i < len(sums) else None)

    def require_choices(self, min_flops: int | None, max_flops: int | None) -> None:
        """Raises ValueError, which says what can be had, if no architecture is within the limits."""
        if self.count_choices(min_flops, max_flops):
            return
        low, high = self.flops_beside(-math.inf)[1], self.flops_beside(math.inf)[0]
        limits = {"at least": min_flops, "at most": max_flops}
        asked = " and ".join(f"{word} {limit / 1e6}" for word, limit in limits.items() if limit is not None)
        beside = {c / 1e6 for limit in limits.values() if limit is not None for c in self.flops_beside(limit) if c}
        raise ValueError(
            f"no architecture has {asked} million multiply-adds; the space goes from {low / 1e6} to {high / 1e6}, "
            f"next to the limits there are {', '.join(map(str, sorted(beside)))}"
        )

    @cached_property
    def _costs(self) -> tuple[int, list[dict[int, int]]]:
        """Multiply-adds of what every path has, and of each layer's candidates by number."""
        fixed, side = _multiply_adds(self.stem, self.image_size)
        layers = []
        for layer, options in zip(self.layers, self.options, strict=True):
            costs = {}
            for number in options:
                block = layer[NAMES[number]]
                costs[number], out = _multiply_adds(block.main, side)
                if block.projection is not None:
                    costs[number] += _multiply_adds(block.projection, side)[0]
            layers.append(costs)
            side = out
        return fixed + _multiply_adds(self.last, side)[0] + self.head.classifier.weight.numel(), layers

    @cached_property
    def _sums(self) -> list[tuple[list[int], list[int]]]:
        """For each layer, all costs that it and the later ones can add up to, and how many ways have less than each.

        Exact and small: the 4^20 architectures of the 32-pixel space have about 24,000 different costs.
        """
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

    def _completions(self, layer: int, spent: int, low: float, high: float) -> int:
        """How many ways there are to go on from `layer` so that the whole path costs from `low` to `high`."""
        sums, fewer = self._sums[layer]
        return max(0, fewer[bisect_right(sums, high - spent)] - fewer[bisect_left(sums, low - spent)])


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


def _bounds(min_flops: int | None, max_flops: int | None) -> tuple[float, float]:
    return -math.inf if min_flops is None else min_flops, math.inf if max_flops is None else max_flops


def _multiply_adds(chain: nn.Sequential, side: int) -> tuple[int, int]:
    """Multiply-adds of a chain of convolutions on a map of side x side, and the side of what comes out."""
    total = 0
    for conv in chain:
        if isinstance(conv, nn.Conv2d):
            side = -(-side // conv.stride[0])
            total += conv.weight.numel() * side**2
    return total, side
