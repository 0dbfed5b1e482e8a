"""model.py: the search space against published numbers, hooks and enumeration; paths as views."""

import copy
import math
import random
import re
from argparse import Namespace
from collections import Counter
from collections.abc import Sequence
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
from model import INITS, NOISE, SPACES, Choice, SearchSpace, Supernet, defaults
from random_search import breed, crossover, mutate

OFFICIAL = (2, 1, 0, 1, 2, 0, 2, 0, 2, 0, 2, 3, 0, 0, 0, 0, 3, 2, 3, 3)
SINGLE = [(number,) * 20 for number in range(4)]
NAMES = ["shuffle3", "shuffle5", "shuffle7", "xception"]
SKIPPING = (0, 4, 1, 4, 2, 4, 4, 4, 3, 0, 4, 1, 4, 2, 4, 3, 1, 4, 4, 0)  # 4 is `identity`
LOWEST = 152_645_632  # multiply-adds at 32 px
SGD = Namespace(learning_rate=0.1, momentum=0.9, weight_decay=0.01)
INITIAL = [(8, None, "identity"), (64, None, "identity"), (65, "identity", "identity")]
INITIAL += [(65, None, "official"), (224, None, "official"), (32, "official", "official")]


def draw(count: int, seed: int = 0) -> list[Choice]:
    rng = random.Random(seed)
    return [tuple(rng.randrange(4) for _ in range(20)) for _ in range(count)]


def images(count: int, side: int) -> Tensor:
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(0))


def digits(count: int) -> Tensor:
    """A training batch of the digits, with 16 pixels."""
    dataset = load_dataset("digits", "", 16)
    batches = Batches(dataset, dataset.train, count, torch.device("cpu"))
    return next(batches.epoch(seed=0, epoch=0))[0]


def build(classes: int, image_size: int, **kwargs) -> Supernet:
    torch.manual_seed(0)
    return Supernet(classes, image_size, **kwargs)


def alone(choice: Choice, image_size: int = 32, **kwargs) -> Supernet:
    return Supernet(10, image_size, affine=True, choice=choice, **kwargs)


FIVE = [*SPACES["spos_small"].candidates, "unchanged"]


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
        models["mixed"] = build(10, 32, space=replace(SPACES["spos_small"], candidates=FIVE))
    for model in models.values():
        generator = torch.Generator().manual_seed(1)
        for norm in norms(model.eval()):
            norm.running_mean.normal_(std=0.1, generator=generator)
            norm.running_var.uniform_(0.5, 2, generator=generator)
    return {name: SearchSpace(model) for name, model in models.items()}


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


def assert_uniform(draws: list[Sequence], cells: list[Sequence]) -> None:
    """A chi-square test over several draws, with a bound five deviations above the mean."""
    statistic = freedom = 0
    for drawn, possible in zip(draws, cells, strict=True):
        counts, expected = Counter(drawn), len(drawn) / len(possible)
        statistic += sum((counts[cell] - expected) ** 2 for cell in possible) / expected
        freedom += len(possible) - 1
    assert statistic < freedom + 5 * math.sqrt(2 * freedom)


def generators() -> tuple:
    """The states of the global random generators."""
    return random.getstate(), torch.get_rng_state().tolist(), np.random.get_state()[1].tolist()


# Costs and sizes


def test_flops_are_the_published_ones(spaces):
    """The last cost is that of the architecture found in megvii-model/SinglePathOneShot."""
    costs = [spaces["small"].flops(choice) for choice in SINGLE]
    assert costs == [157_700_096, 164_155_392, 173_838_336, 205_355_008]
    costs = [spaces["large"].flops(choice) for choice in [*SINGLE, OFFICIAL]]
    assert costs == [295_842_496, 313_654_976, 340_373_696, 358_825_920, 322_918_720]


@pytest.mark.parametrize("name", ["small", "large", "mixed", "alone 64", "alone 65"])
def test_flops_equal_the_count_of_hooks(spaces, name):
    """In one forward pass (megvii-model/ShuffleNet-Series#12, microsoft/nni#1849)."""
    space, model, counts = spaces[name], copy.deepcopy(spaces[name].model), []

    def count(layer, _, out):
        counts.append(out.numel() * layer.weight[0].numel())

    for layer in layers(model):
        layer.register_forward_hook(count)
    for choice in space.sample_distinct(random.Random(0), 2):
        counts.clear()
        with torch.no_grad():
            model(images(1, model.image_size), choice)
        assert space.flops(choice) == sum(counts)


def test_params_are_the_published_ones_and_those_of_the_stand_alone_network(spaces):
    assert sum(p.numel() for p in spaces["small"].model.parameters()) == 6_931_368
    for choice, millions in zip(SINGLE, [2.034, 2.086, 2.164, 2.749], strict=True):
        network, counted = alone(choice), spaces["small"].params(choice)
        assert counted == SearchSpace(network).params(choice)
        assert counted == sum(p.numel() for p in network.parameters())
        assert round(counted / 1e6, 3) == millions


def test_counting_leaves_no_trace():
    """In the state, the modes and the random generators (Lyken17/pytorch-OpCounter#82)."""
    model = build(10, 32)
    model.layers[3].eval()
    before, modes = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    states, space = generators(), SearchSpace(model, 10**8)
    space.flops(OFFICIAL), space.params(OFFICIAL), space.size, space.sample(random.Random(0))
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert [m.training for m in model.modules()] == modes and len(set(modes)) == 2
    assert generators() == states


# A path as a view


def test_a_path_is_made_of_the_supernets_own_modules(small):
    choice, x = draw(1)[0], images(2, 16)
    blocks = [small.layers[i][NAMES[number]] for i, number in enumerate(choice)]
    own = [small.stem, *blocks, small.last, small.head]
    assert all(ours is theirs for ours, theirs in zip(small.path(choice), own, strict=True))
    assert torch.equal(small(x, choice), nn.Sequential(*own)(x))


def test_a_step_moves_all_weights_of_its_path_and_nothing_else(small):
    """With zero gradients, momentum and decay would move idle blocks (megvii-model/DetNAS#3)."""
    model = copy.deepcopy(small).train()
    optimizer = supernet.build_optimizer(model, SGD, None)
    weights = {name for name, _ in model.named_parameters()}
    for choice, name in zip(SINGLE[:2], NAMES, strict=False):
        before = copy.deepcopy(model.state_dict())
        optimizer.zero_grad()
        F.cross_entropy(model(images(4, 16), choice), torch.arange(4)).backward()
        optimizer.step()
        for key, value in model.state_dict().items():
            beside = key.startswith("layers.") and f".{name}." not in key
            if beside or key in weights:
                assert torch.equal(value, before[key]) == beside


@pytest.mark.parametrize("affine", [False, True], ids=["supernet", "alone"])
def test_scales_and_shifts_are_in_networks_alone_and_do_not_decay(affine):
    """No layer has a bias, and everything else decays, without dampening (microsoft/nni#2883)."""
    model = alone(SINGLE[0]) if affine else Supernet(10, 32)
    assert {norm.weight is not None for norm in norms(model)} == {affine}
    assert {norm.bias is not None for norm in norms(model)} == {affine}
    assert {layer.bias for layer in layers(model)} == {None}
    expected = {layer.weight: 0.01 for layer in layers(model)}
    if affine:
        expected |= {scale: 0 for norm in norms(model) for scale in norm.parameters()}
    groups = supernet.build_optimizer(model, SGD, None).param_groups
    assert {p: group["weight_decay"] for group in groups for p in group["params"]} == expected
    for group in groups:
        assert (group["lr"], group["momentum"], group["dampening"]) == (0.1, 0.9, 0)


@pytest.mark.parametrize("affine", [False, True], ids=["supernet", "alone"])
@pytest.mark.parametrize(("side", "init", "expected"), INITIAL)
def test_initial_weights_are_drawn_as_documented(side, init, expected, affine):
    """Filters near the identity copy an input, plus noise (megvii-model/SinglePathOneShot)."""
    assert init or defaults(side)["init"] == expected
    model, near = build(10, side, affine=affine, init=init), expected == "identity"
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


def test_no_channel_is_dead_at_first():
    """In every channel of every path, the inputs of BatchNorm vary by far more than its eps."""
    x, model, variances = digits(16), build(10, 16).train(), []

    def measure(norm, args):
        variances.append(args[0].var((0, 2, 3)).min() / norm.eps)

    for norm in norms(model):
        norm.register_forward_pre_hook(measure)
    with torch.no_grad():
        for choice in SINGLE + draw(4):
            model(x, choice)
    assert min(variances) > 10


def test_at_first_the_paths_nearly_agree_near_the_identity():
    """The features of two random paths correlate; with the official weights they do not."""
    x, agreement = digits(64), {}
    for init in INITS:
        model = build(10, 16, init=init).train()
        with torch.no_grad():
            features = [model.path(choice)[:-1](x).mean((2, 3)).flatten() for choice in draw(2)]
        agreement[init] = np.corrcoef(*features)[0, 1]
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


@pytest.mark.parametrize("choice", [*draw(2, seed=8), SKIPPING])
def test_a_network_alone_with_a_paths_weights_computes_the_same(spaces, choice, monkeypatch):
    """So the network that is built is the one that was evaluated (open-mmlab/mmrazor#66)."""
    name = "mixed" if choice == SKIPPING else "small"
    if name == "mixed":
        monkeypatch.setitem(CANDIDATES, "unchanged", unchanged)
    x, whole = images(8, 16), spaces[name]
    network = alone(choice, space=whole.model.space).eval()
    with torch.inference_mode():
        expected = whole.model(x, choice)
        assert not torch.allclose(network(x, choice), expected, atol=1e-5)
        network.load_path(whole.model.state_dict())
        bound = 1e-5 * expected.abs().max().item()
        torch.testing.assert_close(network(x, list(choice)), expected, rtol=1e-5, atol=bound)
    space, other = SearchSpace(network), (choice[-1] + 1) % 4
    assert whole.params(choice) == sum(p.numel() for p in network.parameters())
    assert space.flops(choice) == whole.flops(choice)
    assert space.size == 1 and space.single_blocks() == []
    with pytest.raises(ValueError, match=f"layer 19 has no candidate {other}, only {choice[-1]}"):
        network(x, (*choice[:-1], other))


def test_a_missing_or_left_over_entry_is_named(small):
    keys = "stem.0.weight layers.7.shuffle3.main.1.running_var extra stem.0.total_ops "
    keys += "layers.8.shuffle7.projection.2.weight layers.20.shuffle3.main.0.weight "
    keys += "layers.0.shuffle9.main.0.weight"
    for key in keys.split():
        state = small.state_dict()
        if key in state:
            del state[key]
        else:
            state[key] = torch.zeros(1)
        with pytest.raises(ValueError, match=re.escape(key)):
            alone(OFFICIAL).load_path(state)


@pytest.mark.parametrize("choice", SINGLE)
@pytest.mark.parametrize(("name", "classes", "side"), [("small", 10, 8), ("large", 1000, 7)])
def test_logits_are_finite_and_gradients_reach_the_stem(spaces, name, classes, side, choice):
    """The last map has more than one pixel (ShunLu91/Single-Path-One-Shot-NAS#6)."""
    model, maps = copy.deepcopy(spaces[name].model).train(), []
    model.head.register_forward_pre_hook(lambda _, inputs: maps.append(inputs[0].shape[2:]))
    logits = model(images(2, model.image_size), choice)
    F.cross_entropy(logits, torch.tensor([0, 1])).backward()
    assert logits.shape == (2, classes) and logits.isfinite().all()
    gradient = model.stem[0].weight.grad
    assert gradient.isfinite().all() and gradient.abs().sum() > 0
    assert maps == [(side, side)]


def test_the_head_stays_in_fp32_under_autocast(small):
    features, dtypes = torch.randn(2, 1024, 4, 4, generator=torch.Generator().manual_seed(0)), []
    expected = F.linear(features.mean((2, 3)), small.head.classifier.weight)
    model = copy.deepcopy(small).train()
    model.last[0].register_forward_hook(lambda conv, x, y: dtypes.append(y.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(small.head(features), expected)
        logits = model(images(2, 8), OFFICIAL)
    assert dtypes == [torch.bfloat16] and logits.dtype == torch.float32
    logits.sum().backward()
    assert model.stem[0].weight.grad.isfinite().all()


# Drawing architectures


@pytest.mark.parametrize("name", ["small", "mixed"])
def test_draws_are_uniform_and_distinct_and_use_no_other_generator(spaces, name):
    space, rng, states = spaces[name], random.Random(0), generators()
    choices = [space.sample(rng) for _ in range(2000)]
    assert generators() == states
    assert len(set(choices)) == 2000
    assert all(space.model.check(choice) == choice for choice in choices)
    assert_uniform(zip(*choices, strict=True), space.options)


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
    assert limited(space, LOWEST, LOWEST).size == 1


def test_a_limited_space_equals_enumeration(short):
    """With limits on and just inside of attainable costs; draws are uniform."""
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
    assert 20 < len(inside) < 100
    draws = [space.sample(rng) for _ in range(50 * len(inside))]
    assert set(draws) == set(inside)
    assert_uniform([draws], [inside])


def test_limits_that_no_architecture_meets_are_refused(spaces):
    """Above all costs, between two costs, the wrong way round; the message names the extremes."""
    for limits in [(10**9, None), (170_000_001, 170_000_002), (180_000_000, 170_000_000)]:
        with pytest.raises(ValueError, match=r"no arch.* 152\.645632 to 212\.703232 million"):
            limited(spaces["small"], *limits)
    with pytest.raises(ValueError, match=r"no arch.* 270\.35936 to 398\.609216 million"):
        limited(spaces["large"], 10**9)


def test_a_candidate_may_be_offered_in_some_layers_only(spaces):
    space, mixed, changing = spaces["mixed"], spaces["mixed"].model, {0, 4, 8, 16}
    assert space.options == [[0, 1, 2, 3] if i in changing else [0, 1, 2, 3, 4] for i in range(20)]
    assert space.size == 4**4 * 5**16
    assert space.single_blocks() == limited(space, None, LOWEST).single_blocks() == SINGLE
    for layer in changing:
        with pytest.raises(ValueError, match=f"layer {layer} has no candidate 4, only 0, 1, 2, 3"):
            mixed(images(1, 8), (*SKIPPING[:layer], 4, *SKIPPING[layer + 1 :]))
    for layer, number in enumerate(SKIPPING):
        assert isinstance(mixed.path(SKIPPING)[1 + layer], nn.Identity) == (number == 4)


# Breeding


@pytest.mark.parametrize("name", ["small", "mixed"])
def test_a_tight_limit_shrinks_no_generation(spaces, name):
    """In a fifth of the space (megvii-model/SinglePathOneShot#16, microsoft/Cream#59)."""
    rng, space = random.Random(0), spaces[name]
    args = Namespace(seed=0, population=50, mutation_prob=0.1)
    limit = sorted(space.flops(space.sample(rng)) for _ in range(1000))[200]
    space = limited(space, None, limit)
    taken = set(space.sample_distinct(rng, 50))
    for generation in range(1, 11):
        parents = sorted(taken, key=space.flops)[-10:]  # half of their relatives exceed the limit
        children = breed(space, parents, taken, args, generation)
        taken |= set(children)
        assert len(taken) == 50 * (generation + 1)
        assert all(space.flops(child) <= limit for child in children)


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


def test_children_that_fail_are_drawn_at_random(spaces):
    """Without a parent, with one, and under limits that no relative of theirs meets."""
    space = limited(spaces["small"], 212_000_000)
    args = Namespace(seed=0, population=10, mutation_prob=0.0)
    for parents in ([], SINGLE[:1], SINGLE[:2]):
        children = breed(space, parents, set(), args, 1)
        assert len(set(children)) == 10
        assert all(space.flops(child) >= 212_000_000 for child in children)
