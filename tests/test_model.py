"""model.py: the search space against published numbers, hooks and enumeration; paths as views."""

import copy
import math
import random
import re
from argparse import Namespace
from collections import Counter
from dataclasses import replace
from functools import partial
from itertools import pairwise, product

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import supernet
from blocks import CANDIDATES
from data.datasets import load_dataset
from data.loaders import Batches
from model import INITS, NOISE, SPACES, Choice, SearchSpace, Supernet
from random_search import breed, crossover, mutate

OFFICIAL = (2, 1, 0, 1, 2, 0, 2, 0, 2, 0, 2, 3, 0, 0, 0, 0, 3, 2, 3, 3)
SINGLE = [(number,) * 20 for number in range(4)]
NAMES = ["shuffle3", "shuffle5", "shuffle7", "xception"]
SKIPPING = (0, 4, 1, 4, 2, 4, 4, 4, 3, 0, 4, 1, 4, 2, 4, 3, 1, 4, 4, 0)  # 4 is `unchanged`
SIDES = {"small": 8, "large": 7, "mixed": 8, "alone 64": 16, "alone 65": 3}  # of the last map
INITIAL = [(64, None, True), (65, None, False), (65, "identity", True), (32, "official", False)]
SGD = Namespace(learning_rate=0.1, momentum=0.9, weight_decay=0.01, norm_weight_decay=0.002)


def images(count: int, side: int) -> Tensor:
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(0))


def build(classes: int, image_size: int, **kwargs) -> Supernet:
    torch.manual_seed(0)
    return Supernet(classes, image_size, **kwargs)


def alone(choice: Choice, image_size: int = 32, **kwargs) -> Supernet:
    return Supernet(10, image_size, affine=True, choice=choice, **kwargs)


def norms(model: nn.Module) -> list[nn.BatchNorm2d]:
    return [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]


def layers(model: nn.Module) -> list[nn.Conv2d | nn.Linear]:
    return [module for module in model.modules() if isinstance(module, nn.Conv2d | nn.Linear)]


def unchanged(in_channels: int, out_channels: int, stride: int, affine: bool) -> nn.Module | None:
    """A candidate that is offered where a layer changes no shape."""
    return nn.Identity() if stride == 1 and in_channels == out_channels else None


@pytest.fixture(scope="module")
def spaces():
    """Supernets, "mixed" with a fifth candidate in 16 layers, and two networks, in eval mode.

    The networks have the largest size of the small layout, and an odd one of the large layout.
    """
    models = {"small": build(10, 32), "large": build(1000, 224)}
    models |= {"alone 64": alone(OFFICIAL, 64), "alone 65": alone(OFFICIAL, 65)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(CANDIDATES, "unchanged", unchanged)
        space = replace(SPACES["spos_small"], candidates=[*NAMES, "unchanged"])
        models["mixed"] = build(10, 32, space=space)
        for model in models.values():
            generator = torch.Generator().manual_seed(1)
            for norm in norms(model.eval()):
                norm.running_mean.normal_(std=0.1, generator=generator)
                norm.running_var.uniform_(0.5, 2, generator=generator)
        yield {name: SearchSpace(model) for name, model in models.items()}


@pytest.fixture(scope="module")
def small(spaces):
    """Tests that change it take a copy."""
    return spaces["small"].model


@pytest.fixture(scope="module", params=["small", "mixed"])
def short(request, spaces):
    """A space of 4^4, or 5 * 4 * 5 * 5, architectures: the other layers have one candidate each."""
    model = copy.copy(spaces[request.param].model)
    model.options = [[0]] * 3 + model.options[3:7] + [[0]] * 13
    return SearchSpace(model)


def limited(space: SearchSpace, low: int | None, high: int | None = None) -> SearchSpace:
    """The same with limits; it keeps the costs of the blocks, which take a second to count."""
    assert space.size
    space = copy.copy(space)
    space.__init__(space.model, low, high)
    return space


def test_costs_are_the_published_ones(spaces):
    """OFFICIAL is the architecture found in megvii-model/SinglePathOneShot."""
    small, large = spaces["small"], spaces["large"]
    costs = [small.flops(choice) for choice in SINGLE]
    assert costs == [157_700_096, 164_155_392, 173_838_336, 205_355_008]
    costs = [large.flops(choice) for choice in [*SINGLE, OFFICIAL]]
    assert costs == [295_842_496, 313_654_976, 340_373_696, 358_825_920, 322_918_720]
    millions = [round(small.params(choice) / 1e6, 3) for choice in SINGLE]
    assert millions == [2.034, 2.086, 2.164, 2.749]
    assert sum(p.numel() for p in small.model.parameters()) == 6_931_368


@pytest.mark.parametrize(("name", "side"), SIDES.items())
def test_flops_equal_the_count_of_hooks_in_a_forward_pass(spaces, name, side):
    """Its last map has more than one pixel (megvii-model/ShuffleNet-Series#12, microsoft/nni#1849,
    ShunLu91/Single-Path-One-Shot-NAS#6)."""
    space, model, counts, maps = spaces[name], copy.deepcopy(spaces[name].model), [], []

    def count(layer, _, out):
        counts.append(out.numel() * layer.weight[0].numel())

    for layer in layers(model):
        layer.register_forward_hook(count)
    model.last.register_forward_hook(lambda last, _, out: maps.append(out.shape[2:]))
    for choice in space.sample_distinct(random.Random(0), 2):
        counts.clear()
        with torch.no_grad():
            assert model(images(1, model.image_size), choice).isfinite().all()
        assert space.flops(choice) == sum(counts)
    assert maps == [(side, side)] * len(maps)


def test_counting_leaves_no_trace():
    """In the state, the modes and the random generators (Lyken17/pytorch-OpCounter#82)."""
    model = build(10, 32)
    model.layers[3].eval()
    before, modes = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    states, space = (random.getstate(), torch.get_rng_state()), SearchSpace(model, 10**8)
    space.flops(OFFICIAL), space.params(OFFICIAL), space.size, space.sample(random.Random(0))
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert [m.training for m in model.modules()] == modes
    assert random.getstate() == states[0] and torch.equal(torch.get_rng_state(), states[1])


def test_a_step_moves_all_weights_of_its_path_and_nothing_else(small):
    """With zero gradients, momentum and decay would move idle blocks (megvii-model/DetNAS#3)."""
    model = copy.deepcopy(small).train()
    optimizer = supernet.build_optimizer(model, SGD, None)
    weights = {name for name, _ in model.named_parameters()}
    for choice in (OFFICIAL, SINGLE[1]):
        on_path = tuple(f"layers.{i}.{NAMES[number]}." for i, number in enumerate(choice))
        before = copy.deepcopy(model.state_dict())
        optimizer.zero_grad()
        F.cross_entropy(model(images(4, 16), choice), torch.arange(4)).backward()
        optimizer.step()
        for key, value in model.state_dict().items():
            beside = key.startswith("layers.") and not key.startswith(on_path)
            if beside or key in weights:
                assert torch.equal(value, before[key]) == beside


@pytest.mark.parametrize("affine", [False, True], ids=["supernet", "alone"])
def test_scales_and_shifts_are_in_networks_alone_with_their_own_decay(affine):
    """No layer has a bias, and everything else decays, without dampening (microsoft/nni#2883)."""
    model = alone(SINGLE[0]) if affine else Supernet(10, 32)
    scales = [parameter for norm in norms(model) for parameter in norm.parameters()]
    assert len(scales) == (2 * len(norms(model)) if affine else 0)
    expected = dict.fromkeys([layer.weight for layer in layers(model)], 0.01)
    groups = supernet.build_optimizer(model, SGD, None).param_groups
    found = {p: group["weight_decay"] for group in groups for p in group["params"]}
    assert found == expected | dict.fromkeys(scales, 0.002)
    assert found.keys() == set(model.parameters())
    for group in groups:
        assert (group["lr"], group["momentum"], group["dampening"]) == (0.1, 0.9, 0)


@pytest.mark.parametrize(("side", "init", "near"), INITIAL)
def test_initial_weights_are_drawn_as_documented(side, init, near):
    """Filters near the identity copy an input, plus noise (megvii-model/SinglePathOneShot)."""
    model = build(10, side, init=init)
    ends = {model.stem[0]: 1 / 3 if near else 0.01, model.head.classifier: 0.01}
    for layer in layers(model):
        noise = layer.weight.detach().clone()
        outputs, inputs = noise.shape[:2]
        deviation = ends.get(layer, 1 / inputs)
        if near and layer not in ends:
            kernel, copied = noise.shape[-1], [channel % inputs for channel in range(outputs)]
            noise[range(outputs), copied, kernel // 2, kernel // 2] -= 1
            deviation = NOISE / math.sqrt(inputs * kernel * kernel)
        error = 5 / math.sqrt(2 * noise.numel())  # five standard errors of a deviation
        assert noise.std().item() == pytest.approx(deviation, rel=error)


def test_near_the_identity_paths_nearly_agree_at_first_and_no_channel_is_dead():
    """The features of two paths correlate, not so with the official weights; in every channel,
    the inputs of BatchNorm vary by far more than its eps."""
    dataset, agreement, variances = load_dataset("digits", "", 16), {}, []
    x, _ = next(Batches(dataset, dataset.train, 32, torch.device("cpu")).epoch(0, 0))

    def measure(norm, args):
        variances.append(args[0].var((0, 2, 3)).min() / norm.eps)

    for init in INITS:
        model = build(10, 16, init=init).train()
        choices = SearchSpace(model).sample_distinct(random.Random(0), 2)
        for norm in norms(model):
            norm.register_forward_pre_hook(measure)
        with torch.no_grad():
            paths = [model.path(choice)[:-1] for choice in choices + SINGLE]
            features = [path(x).mean((2, 3)).flatten() for path in paths]
        agreement[init] = np.corrcoef(*features[:2])[0, 1]
    assert min(variances) > 10
    assert agreement["identity"] > 0.8 > 0.5 > agreement["official"]


def test_a_choice_of_wrong_length_or_number_is_refused(small, spaces):
    space, zeros = spaces["small"], (0,) * 19
    wrong = [((), "20 numbers"), (zeros, "20 numbers"), ((*zeros, 0, 0), "20 numbers")]
    wrong += [((4, *zeros), "layer 0 has no candidate 4"), ((1.5, *zeros), "integer")]
    wrong += [((*zeros, -1), "layer 19 has no candidate -1")]
    uses = small.path, space.flops, space.params, alone, partial(small, images(1, 8))
    for (choice, said), use in product(wrong, uses):
        with pytest.raises((ValueError, TypeError), match=said):
            use(choice)


@pytest.mark.parametrize(("name", "choice"), [("small", OFFICIAL), ("mixed", SKIPPING)])
def test_a_network_alone_with_a_paths_weights_computes_the_same(spaces, name, choice):
    """So the network that is built is the one that was evaluated (open-mmlab/mmrazor#66)."""
    x, whole = images(8, 16), spaces[name]
    network = alone(choice, space=whole.model.space).eval()
    with torch.inference_mode():
        expected = whole.model(x, choice)
        assert not torch.allclose(network(x, choice), expected, atol=1e-5)
        network.load_path(whole.model.state_dict())
        bound = 1e-5 * expected.abs().max().item()
        torch.testing.assert_close(network(x, list(choice)), expected, rtol=1e-5, atol=bound)
    space, other = SearchSpace(network), (choice[-1] + 1) % 4
    parameters = sum(p.numel() for p in network.parameters())
    assert whole.params(choice) == space.params(choice) == parameters
    assert space.flops(choice) == whole.flops(choice)
    assert space.size == 1 and space.single_blocks() == []
    with pytest.raises(ValueError, match=f"layer 19 has no candidate {other}, only {choice[-1]}"):
        network(x, (*choice[:-1], other))


def test_a_missing_entry_is_named(small):
    for key in ("stem.0.weight", "layers.7.shuffle3.main.1.running_var"):
        state = small.state_dict()
        del state[key]
        with pytest.raises(ValueError, match=re.escape(key)):
            alone(OFFICIAL).load_path(state)


def test_the_head_stays_in_fp32_under_autocast(small):
    features = torch.randn(2, 1024, 4, 4, generator=torch.Generator().manual_seed(0))
    expected = F.linear(features.mean((2, 3)), small.head.classifier.weight)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(small.head(features), expected)


def test_parts_of_the_whole_space_add_up_and_draws_keep_to_them(spaces):
    space, total = spaces["small"], 0
    edges = [None, 155_000_000, 170_000_001, 170_100_001, 200_000_000, None]
    for low, above in pairwise(edges):
        part = limited(space, low, above and above - 1)
        draws = part.sample_distinct(random.Random(0), 50)
        assert len(set(draws)) == 50
        assert all((low or 0) <= space.flops(choice) < (above or math.inf) for choice in draws)
        total += part.size
    assert space.size == total == 4**20


def test_a_limited_space_equals_enumeration(short):
    """With limits on and just inside of attainable costs; draws are uniform, or the chi-square
    statistic would be five deviations above its mean."""
    enumerated = {choice: short.flops(choice) for choice in product(*short.options)}
    costs, rng = sorted(enumerated.values()), random.Random(0)
    low, middle, high = (costs[len(costs) * quarter // 4] for quarter in (1, 2, 3))
    limits = [(None, None), (low, None), (None, low), (low, high), (low + 1, high - 1)]
    limits += [(middle, middle), (None, costs[0]), (costs[-1], None), (costs[100], costs[140])]
    for low, high in limits:
        space = limited(short, low, high)
        inside = [c for c, cost in enumerated.items() if (low or 0) <= cost <= (high or math.inf)]
        assert inside == [choice for choice in enumerated if choice in space]
        assert len(inside) == space.size
        assert set(inside) == set(space.sample_distinct(random.Random(0), len(inside) + 1))
        counts = Counter(space.sample(rng) for _ in range(20 * len(inside)))
        assert counts.keys() == set(inside)
        statistic = sum((count - 20) ** 2 for count in counts.values()) / 20
        freedom = len(inside) - 1
        assert statistic <= freedom + 5 * math.sqrt(2 * freedom)


def test_limits_that_no_architecture_meets_are_refused(spaces):
    """Above all costs, between two costs, the wrong way round; the message names the extremes."""
    for limits in [(10**9, None), (170_000_001, 170_000_002), (180_000_000, 170_000_000)]:
        with pytest.raises(ValueError, match=r"no arch.* 152\.645632 to 212\.703232 million"):
            limited(spaces["small"], *limits)


def test_a_candidate_may_be_offered_in_some_layers_only(spaces):
    space, mixed, changing = spaces["mixed"], spaces["mixed"].model, {0, 4, 8, 16}
    assert space.options == [[0, 1, 2, 3] if i in changing else [0, 1, 2, 3, 4] for i in range(20)]
    assert space.size == 4**4 * 5**16
    assert space.single_blocks() == limited(space, None, 152_645_632).single_blocks() == SINGLE
    for layer in changing:
        with pytest.raises(ValueError, match=f"layer {layer} has no candidate 4, only 0, 1, 2, 3"):
            mixed.path((*SKIPPING[:layer], 4, *SKIPPING[layer + 1 :]))
    for layer, number in enumerate(SKIPPING):
        assert isinstance(mixed.path(SKIPPING)[1 + layer], nn.Identity) == (number == 4)


def test_mutation_follows_its_definition(short):
    """All other candidates of a layer are equally likely (mit-han-lab/gan-compression#64)."""
    rng, first = random.Random(0), next(product(*short.options))
    assert mutate(short, first, 0, rng) == first
    mutants = [mutate(short, first, 0.1, rng) for _ in range(4000)]
    for layer, options in enumerate(short.options):
        others = options[1:]
        assert (mutate(short, first, 1, rng)[layer] == first[layer]) == (not others)
        expected = {0: 3600} | {n: 400 / len(others) for n in others} if others else {0: 4000}
        shares = Counter(mutant[layer] for mutant in mutants)
        assert shares == pytest.approx(expected, abs=75)


def test_crossover_takes_each_number_from_either_parent_alike():
    """In all layers (mit-han-lab/once-for-all#1)."""
    rng = random.Random(0)
    crossed = [crossover(*SINGLE[:2], rng) for _ in range(2000)]
    assert np.mean(crossed) == pytest.approx(0.5, abs=0.01)
    assert np.mean(crossed, axis=0).std() < 0.03


def test_a_generation_is_half_mutated_and_half_crossed(spaces):
    parents, args = SINGLE[:2], Namespace(seed=0, population=40, mutation_prob=0.1)
    children, again = (breed(spaces["small"], parents, set(parents), args, 1) for _ in range(2))
    assert len(set(children)) == 40 and not set(children) & set(parents)
    crossed = [c for c in children if set(c) == {0, 1} and 4 < sum(c) < 16]  # 2 genes of 20 mutate
    assert len(crossed) == 20
    assert children == again


def test_a_tight_limit_shrinks_no_generation(spaces):
    """Children that fail are drawn at random: without a parent, with one, and with two whose
    relatives exceed the limit (megvii-model/SinglePathOneShot#16, microsoft/Cream#59)."""
    space, taken = limited(spaces["small"], 211_000_000), set()
    args = Namespace(seed=0, population=10, mutation_prob=0.0)
    for size, parents in ((10, []), (20, SINGLE[:1]), (30, SINGLE[:2])):
        taken.update(breed(space, parents, taken, args, 1))
        assert len(taken) == size
    assert all(space.flops(child) >= 211_000_000 for child in taken)
