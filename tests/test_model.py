"""model.py: the search space against the published numbers, hooks and brute force, and a path as a view of it."""

import copy
import math
import random
from argparse import Namespace
from collections import Counter
from itertools import pairwise, product

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import supernet
from data.datasets import load_dataset
from data.loaders import Batches
from model import INITS, NOISE, Supernet, crossover, default_init, mutate

OFFICIAL = (2, 1, 0, 1, 2, 0, 2, 0, 2, 0, 2, 3, 0, 0, 0, 0, 3, 2, 3, 3)
SINGLE = [(number,) * 20 for number in range(4)]
NAMES = ["shuffle3", "shuffle5", "shuffle7", "xception"]


def draw(count: int, seed: int = 0) -> list[tuple[int, ...]]:
    rng = random.Random(seed)
    return [tuple(rng.randrange(4) for _ in range(20)) for _ in range(count)]


def images(count: int, side: int, seed: int = 0) -> Tensor:
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(seed))


def build(classes: int, image_size: int, **kwargs) -> Supernet:
    torch.manual_seed(0)
    return Supernet(classes, image_size, **kwargs)


def trained(model: Supernet) -> Supernet:
    """`model` in eval mode with BN statistics that differ from the initial 0 and 1, and from each other."""
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1, generator=generator)
            module.running_var.uniform_(0.5, 2, generator=generator)
    return model.eval()


@pytest.fixture(scope="module")
def small() -> Supernet:
    """For 32 px. Tests that train it, or replace its parts, take a copy."""
    return trained(build(10, 32))


@pytest.fixture(scope="module")
def large() -> Supernet:
    """For 224 px."""
    return trained(build(1000, 224))


@pytest.fixture(scope="module")
def short() -> Supernet:
    """A space of 4^5: the later layers have one candidate each. `options` is read when costs are first asked for."""
    model = build(10, 32)
    model.options = [range(4)] * 5 + [[0]] * 15
    return model


@pytest.fixture(scope="module")
def enumerated(short: Supernet) -> dict[tuple[int, ...], int]:
    """All of that space, in lexicographic order, with costs."""
    every = [first + (0,) * 15 for first in product(range(4), repeat=5)]
    return {choice: short.flops(choice) for choice in every}


def chi_square(counts: Counter, cells: int) -> float:
    expected = counts.total() / cells
    return sum((count - expected) ** 2 for count in counts.values()) / expected + (cells - len(counts)) * expected


def hooked_multiply_adds(model: Supernet, choice: tuple[int, ...], side: int) -> int:
    """What one forward of one image multiplies and adds: for each output value, one kernel's weights."""
    total = 0

    def count(module: nn.Module, _: tuple, out: Tensor) -> None:
        nonlocal total
        total += out.numel() * module.weight[0].numel()

    modules = [module for module in model.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    hooks = [module.register_forward_hook(count) for module in modules]
    with torch.no_grad():
        model(images(1, side), choice)
    for hook in hooks:
        hook.remove()
    return total


# Costs and sizes


@pytest.mark.parametrize(
    ("choice", "expected"), [*zip(SINGLE, [157_700_096, 164_155_392, 173_838_336, 205_355_008], strict=True)]
)
def test_flops_at_32_px_are_the_published_ones(small: Supernet, choice: tuple[int, ...], expected: int) -> None:
    assert small.flops(choice) == expected


@pytest.mark.parametrize(
    ("choice", "expected"),
    [*zip([*SINGLE, OFFICIAL], [295_842_496, 313_654_976, 340_373_696, 358_825_920, 322_918_720], strict=True)],
)
def test_flops_at_224_px_are_the_published_ones(large: Supernet, choice: tuple[int, ...], expected: int) -> None:
    """The last is megvii-model/SinglePathOneShot's architecture."""
    assert large.flops(choice) == expected


def test_the_extremes_of_the_spaces_are_the_published_ones(small: Supernet, large: Supernet) -> None:
    for model, lowest, highest in ((small, 152_645_632, 212_703_232), (large, 270_359_360, 398_609_216)):
        assert model.flops_beside(0) == model.flops_beside(lowest) == (None, lowest)
        assert model.flops_beside(10**12) == model.flops_beside(highest + 1) == (highest, None)


@pytest.mark.parametrize("side", [32, 64, 224])
def test_flops_equal_what_hooks_count(small: Supernet, large: Supernet, side: int) -> None:
    """megvii-model/ShuffleNet-Series#12, microsoft/nni#1849."""
    model = {32: small, 64: build(10, 64), 224: large}[side].eval()
    for choice in draw(2, seed=side):
        assert model.flops(choice) == hooked_multiply_adds(model, choice, side)


def test_the_supernet_has_the_published_number_of_parameters(small: Supernet) -> None:
    assert sum(parameter.numel() for parameter in small.parameters()) == 6_931_368


@pytest.mark.parametrize(("choice", "millions"), [*zip(SINGLE, [2.034, 2.086, 2.164, 2.749], strict=True)])
def test_params_are_those_of_the_stand_alone_network(small: Supernet, choice: tuple[int, ...], millions: float) -> None:
    alone = Supernet(10, 32, affine=True, choice=choice)
    assert small.params(choice) == sum(parameter.numel() for parameter in alone.parameters()) == alone.params(choice)
    assert round(small.params(choice) / 1e6, 3) == millions


def test_counting_leaves_no_trace() -> None:
    """Lyken17/pytorch-OpCounter#82: no counters in the state, no change of mode, no random number drawn."""
    model = build(10, 32)
    model.layers[3].eval()
    before, modes = copy.deepcopy(model.state_dict()), [module.training for module in model.modules()]
    generators = random.getstate(), torch.get_rng_state(), np.random.get_state()
    model.flops(OFFICIAL), model.params(OFFICIAL), model.count_choices(10**8), model.flops_beside(10**8)
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[key], before[key]) for key in before)
    assert [module.training for module in model.modules()] == modes and len(set(modes)) == 2
    assert random.getstate() == generators[0] and torch.equal(torch.get_rng_state(), generators[1])
    assert all(np.array_equal(a, b) for a, b in zip(np.random.get_state(), generators[2], strict=True))


# A path as a view


def test_a_path_is_made_of_the_supernets_own_modules(small: Supernet) -> None:
    choice = draw(1)[0]
    blocks = [small.layers[i][NAMES[number]] for i, number in enumerate(choice)]
    own = [small.stem, *blocks, small.last, small.head]
    assert all(ours is theirs for ours, theirs in zip(small.path(choice), own, strict=True))


def test_a_path_computes_and_learns_what_the_supernet_does(small: Supernet) -> None:
    """Logits, gradients and BN buffers, to the last bit."""
    choice, x, results = draw(1)[0], images(4, 32), []
    for through_path in (True, False):
        model = copy.deepcopy(small).train()
        logits = model.path(choice)(x) if through_path else model(x, choice)
        F.cross_entropy(logits, torch.arange(4)).backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        results.append({"logits": logits} | gradients | dict(model.named_buffers()))
    path, whole = results
    assert path.keys() == whole.keys() and all(torch.equal(path[key], whole[key]) for key in path)
    assert {key.split(".")[2] for key in path if key.startswith("layers.0.") and "weight" in key} == {NAMES[choice[0]]}
    assert not torch.equal(whole["stem.1.running_mean"], small.stem[1].running_mean)


def test_a_step_moves_nothing_beside_its_path(small: Supernet) -> None:
    """megvii-model/DetNAS#3: with zero gradients, momentum and decay would move the idle blocks."""
    model = copy.deepcopy(small).train()
    optimizer = supernet.build_optimizer(model, Namespace(learning_rate=0.1, momentum=0.9, weight_decay=0.01))
    states = [copy.deepcopy(model.state_dict())]
    for choice in SINGLE[:2]:
        optimizer.zero_grad()
        F.cross_entropy(model(images(4, 16), choice), torch.arange(4)).backward()
        optimizer.step()
        states.append(copy.deepcopy(model.state_dict()))
    learned = {name for name, _ in model.named_parameters()}
    for (before, after), name in zip([states[:2], states[1:]], NAMES, strict=False):
        moved = {key for key in before if not torch.equal(before[key], after[key])}
        for key in before:
            if key.startswith("layers.") and f".{name}." not in key:
                assert key not in moved
            elif key in learned:
                assert key in moved


def test_the_optimizer_decays_the_weights_and_nothing_else() -> None:
    """The seed's decay went in as dampening; scales and shifts of a stand-alone network take none."""
    args = Namespace(learning_rate=0.1, momentum=0.9, weight_decay=0.01)
    alone = Supernet(10, 32, affine=True, choice=SINGLE[0])
    for model in (Supernet(10, 32), alone):
        optimizer = supernet.build_optimizer(model, args)
        groups = {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}
        assert groups.keys() == {id(parameter) for parameter in model.parameters()}
        for group in groups.values():
            assert (group["lr"], group["momentum"], group["dampening"]) == (0.1, 0.9, 0)
        for module in model.modules():
            for parameter in module.parameters(recurse=False):
                decay = 0 if isinstance(module, nn.BatchNorm2d) else 0.01
                assert groups[id(parameter)]["weight_decay"] == decay


def test_batchnorm_has_scale_and_shift_alone_and_not_in_the_supernet(small: Supernet) -> None:
    """microsoft/nni#2883."""
    for model, affine in ((small, False), (Supernet(10, 32, affine=True, choice=OFFICIAL), True)):
        norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
        assert {norm.weight is not None for norm in norms} == {norm.bias is not None for norm in norms} == {affine}


def test_no_convolution_and_no_classifier_has_a_bias(small: Supernet) -> None:
    layers = [module for module in small.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    assert layers and all(layer.bias is None for layer in layers)


def test_official_weights_have_the_official_deviations() -> None:
    """megvii-model/SinglePathOneShot: 1 / weight.shape[1], and 0.01 for stem and classifier."""
    model = build(10, 32, init="official")
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            ends = module in (model.stem[0], model.head.classifier)
            expected = 0.01 if ends else 1 / module.weight.shape[1]
            assert_deviation(module.weight, expected)


def assert_deviation(weight: Tensor, expected: float) -> None:
    error = 5 / math.sqrt(2 * weight.numel())  # five standard errors of a deviation
    assert weight.std().item() == pytest.approx(expected, rel=error)


@pytest.mark.parametrize("affine", [False, True], ids=["supernet", "alone"])
def test_weights_near_the_identity_are_copies_of_the_inputs_and_noise(affine: bool) -> None:
    model = build(10, 32, affine=affine, init="identity")
    for name, module in model.named_modules():
        if not isinstance(module, nn.Conv2d) or name == "stem.0":
            continue
        noise = module.weight.detach().clone()
        outputs, inputs, kernel, _ = noise.shape
        for channel in range(outputs):
            noise[channel, channel % inputs, kernel // 2, kernel // 2] -= 1
        assert_deviation(noise, NOISE / math.sqrt(inputs * kernel * kernel))
    assert_deviation(model.stem[0].weight, 1 / 3)
    assert_deviation(model.head.classifier.weight, 0.01)


@pytest.mark.parametrize("side", [16, 32])
def test_no_channel_is_dead_at_first(side: int) -> None:
    """What BatchNorm gets on digits varies by far more than the eps that it adds, in every channel of every path."""
    dataset = load_dataset("digits", "", side)
    x, _ = next(Batches(dataset, dataset.train, 16, torch.device("cpu")).epoch(seed=0, epoch=0))
    model, variances = build(10, side).train(), []
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.register_forward_pre_hook(
                lambda norm, args: variances.append(args[0].var((0, 2, 3)).min() / norm.eps)
            )
    with torch.no_grad():
        for choice in SINGLE + draw(10):
            model(x, choice)
    assert min(variances) > 10


def test_at_first_the_paths_nearly_agree_near_the_identity() -> None:
    """What the official weights lack: two random paths give the classifier features that correlate."""
    dataset = load_dataset("digits", "", 16)
    x, _ = next(Batches(dataset, dataset.train, 64, torch.device("cpu")).epoch(seed=0, epoch=0))
    agreement = {}
    for init in INITS:
        model = build(10, 16, init=init).train()
        with torch.no_grad():
            features = [model.path(choice)[:-1](x).mean((2, 3)).flatten() for choice in draw(2)]
        agreement[init] = np.corrcoef(*features)[0, 1]
    assert agreement["identity"] > 0.8 > 0.5 > agreement["official"]


@pytest.mark.parametrize(("side", "init"), [(8, "identity"), (64, "identity"), (65, "official"), (224, "official")])
def test_the_size_of_the_images_chooses_the_initial_weights(side: int, init: str) -> None:
    default, chosen = build(10, side), build(10, side, init=init)
    assert default_init(side) == init
    assert torch.equal(default.layers[3]["shuffle5"].main[0].weight, chosen.layers[3]["shuffle5"].main[0].weight)


@pytest.mark.parametrize("choice", [(0,) * 19, (0,) * 21, (), (4,) + (0,) * 19, (0,) * 19 + (-1,)])
def test_a_choice_of_wrong_length_or_number_is_refused(small: Supernet, choice: tuple[int, ...]) -> None:
    x = images(1, 8)
    for use in (small.path, small.flops, small.params, lambda choice: small(x, choice)):
        with pytest.raises(ValueError, match=r"20 numbers|no candidate"):
            use(choice)
    with pytest.raises(ValueError, match=r"20 numbers|no candidate"):
        Supernet(10, 32, choice=choice)


def test_a_choice_of_fractions_is_refused(small: Supernet) -> None:
    with pytest.raises(TypeError):
        small.path((1.5,) + (0,) * 19)


def test_a_stand_alone_network_refuses_another_choice() -> None:
    alone = Supernet(10, 32, affine=True, choice=OFFICIAL)
    assert alone(images(2, 8), list(OFFICIAL)).shape == (2, 10)
    with pytest.raises(ValueError, match="layer 19 has no candidate 2, only 3"):
        alone(images(2, 8), (*OFFICIAL[:-1], 2))


@pytest.mark.parametrize("choice", SINGLE)
@pytest.mark.parametrize("side", [32, 224])
def test_logits_are_finite_and_gradients_reach_the_stem(
    small: Supernet, large: Supernet, side: int, choice: tuple[int, ...]
) -> None:
    """ShunLu91/Single-Path-One-Shot-NAS#6: the large layout leaves a single pixel of a small image."""
    model, maps = copy.deepcopy(small if side == 32 else large).train(), []
    model.head.register_forward_pre_hook(lambda _, inputs: maps.append(inputs[0].shape[2:]))
    logits = model(images(2, side), choice)
    F.cross_entropy(logits, torch.tensor([0, 1])).backward()
    assert logits.shape == (2, {32: 10, 224: 1000}[side]) and logits.isfinite().all()
    gradient = model.stem[0].weight.grad
    assert gradient.isfinite().all() and gradient.abs().sum() > 0
    assert maps == [{32: (8, 8), 224: (7, 7)}[side]]


def test_the_head_stays_in_fp32_under_autocast(small: Supernet) -> None:
    features, dtypes = torch.randn(2, 1024, 4, 4, generator=torch.Generator().manual_seed(0)), []
    expected = F.linear(features.mean((2, 3)), small.head.classifier.weight)
    model = copy.deepcopy(small).train()
    model.last[0].register_forward_hook(lambda *arguments: dtypes.append(arguments[-1].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(small.head(features), expected)
        logits = model(images(2, 8), OFFICIAL)
    assert dtypes == [torch.bfloat16] and logits.dtype == torch.float32
    logits.sum().backward()
    assert model.stem[0].weight.grad.isfinite().all()


# Drawing architectures


def test_draws_are_uniform_distinct_and_use_no_other_generator(small: Supernet) -> None:
    """Chi-square over 80 cells, 60 degrees of freedom: 127.5 is passed by chance once in a million."""
    before = random.getstate(), torch.get_rng_state(), np.random.get_state()[1].tolist()
    rng = random.Random(0)
    choices = [small.sample_choice(rng) for _ in range(2000)]
    assert before[0] == random.getstate() and torch.equal(before[1], torch.get_rng_state())
    assert before[2] == np.random.get_state()[1].tolist()
    assert len(set(choices)) == 2000 and {len(choice) for choice in choices} == {20}
    layers = [Counter(numbers) for numbers in zip(*choices, strict=True)]
    assert all(set(layer) == {0, 1, 2, 3} for layer in layers)
    assert sum(chi_square(layer, 4) for layer in layers) < 127.5


@pytest.mark.parametrize("limits", [(None, None), (160_000_000, 165_000_000)])
def test_the_same_seed_draws_the_same(small: Supernet, limits: tuple[int | None, int | None]) -> None:
    draws = []
    for seed in (3, 3, 4):
        rng = random.Random(seed)
        draws.append([small.sample_choice(rng, *limits) for _ in range(5)])
    assert draws[0] == draws[1] != draws[2]


def test_counts_of_the_whole_space_add_up(small: Supernet) -> None:
    edges = [None, 155_000_000, 170_000_001, 171_000_000, 200_000_000, None]
    parts = [small.count_choices(low, high if high is None else high - 1) for low, high in pairwise(edges)]
    assert small.count_choices() == sum(parts) == 4**20 and min(parts) > 0
    assert small.count_choices(152_645_632, 152_645_632) == 1 and small.count_choices(None, 152_645_631) == 0


def test_counts_agree_with_a_random_sample(small: Supernet) -> None:
    costs = [small.flops(choice) for choice in draw(4000)]
    for low, high in ((None, 170_000_000), (165_000_000, 175_000_000), (178_000_000, None)):
        share = small.count_choices(low, high) / 4**20
        inside = sum((low or 0) <= cost <= (high or math.inf) for cost in costs) / len(costs)
        assert abs(inside - share) < 5 * math.sqrt(share * (1 - share) / len(costs))


def limits_to_try(costs: list[int]) -> list[tuple[int | None, int | None]]:
    """Open and closed, with edges on, just inside and just outside of attainable costs, and ones that none meets."""
    low, middle, high = costs[len(costs) // 4], costs[len(costs) // 2], costs[-len(costs) // 4]
    edges = [(None, None), (low, None), (None, low), (low, high), (low + 1, high - 1), (middle, middle)]
    return [*edges, (None, costs[0]), (None, costs[0] - 1), (costs[-1], None), (costs[-1] + 1, None)]


def test_count_and_nth_choice_equal_enumeration(short: Supernet, enumerated: dict[tuple[int, ...], int]) -> None:
    """nth_choice gives exactly the enumerated ones, each once and in lexicographic order."""
    for low, high in limits_to_try(sorted(enumerated.values())):
        inside = [c for c, cost in enumerated.items() if (low or 0) <= cost <= (math.inf if high is None else high)]
        assert short.count_choices(low, high) == len(inside)
        assert [short.nth_choice(n, low, high) for n in range(len(inside))] == inside


def test_flops_beside_equals_enumeration(short: Supernet, enumerated: dict[tuple[int, ...], int]) -> None:
    costs = sorted(set(enumerated.values()))
    for limit in (*(cost + step for cost in costs[::7] for step in (-1, 0, 1)), costs[-1], costs[-1] + 1):
        below, above = [c for c in costs if c < limit], [c for c in costs if c >= limit]
        assert short.flops_beside(limit) == (max(below, default=None), min(above, default=None))


def test_draws_within_limits_are_uniform(short: Supernet, enumerated: dict[tuple[int, ...], int]) -> None:
    costs = sorted(enumerated.values())
    low, high = costs[500], costs[540]
    inside = {choice for choice, cost in enumerated.items() if low <= cost <= high}
    assert 20 < len(inside) < 100
    rng = random.Random(0)
    counts = Counter(short.sample_choice(rng, low, high) for _ in range(50 * len(inside)))
    assert set(counts) == inside
    freedom = len(inside) - 1
    assert chi_square(counts, len(inside)) < freedom + 5 * math.sqrt(2 * freedom)


@pytest.mark.parametrize("limits", [(None, 155_000_000), (200_000_000, None), (170_000_000, 170_100_000)])
def test_draws_from_the_whole_space_keep_to_the_limits(small: Supernet, limits: tuple[int | None, int | None]) -> None:
    rng, (low, high) = random.Random(0), limits
    choices = {small.sample_choice(rng, low, high) for _ in range(50)}
    assert len(choices) > 40
    assert all((low or 0) <= small.flops(choice) <= (high or math.inf) for choice in choices)


@pytest.mark.parametrize("limits", [(None, 152_645_631), (212_703_233, None), (170_000_001, 170_000_002)])
def test_limits_that_nothing_meets_are_refused(small: Supernet, limits: tuple[int | None, int | None]) -> None:
    with pytest.raises(ValueError, match="no architecture"):
        small.sample_choice(random.Random(0), *limits)


def test_limits_the_wrong_way_round_are_met_by_nothing(small: Supernet) -> None:
    assert small.count_choices(180_000_000, 170_000_000) == 0
    with pytest.raises(ValueError, match="no architecture"):
        small.sample_choice(random.Random(0), 180_000_000, 170_000_000)


# Breeding


def test_a_tight_limit_shrinks_no_generation(small: Supernet) -> None:
    """megvii-model/SinglePathOneShot#16, microsoft/Cream#59: ten generations below the 20th percentile of FLOPs."""
    rng = random.Random(0)
    limit = sorted(small.flops(small.sample_choice(rng)) for _ in range(1000))[200]
    taken = set(small.sample_choices(rng, 50, None, limit))
    for generation in range(1, 11):
        parents = sorted(taken, key=small.flops)[-10:]  # those at the limit: half of their relatives are above it
        children = small.breed(parents, taken, 50, 0.1, rng, None, limit)
        taken |= set(children)
        assert len(taken) == 50 * (generation + 1) and all(small.flops(child) <= limit for child in children)


def test_mutation_and_crossover_follow_their_definition() -> None:
    """mit-han-lab/gan-compression#64, mit-han-lab/once-for-all#1."""
    rng, first, second = random.Random(0), (0,) * 20, (1,) * 20
    assert mutate(first, 0, rng) == first
    assert all(set(mutate(choice, 1, rng)).isdisjoint(choice) for choice in (first, second))
    mutants = [mutate(first, 0.1, rng) for _ in range(2000)]
    shares = [sum(gene == k for mutant in mutants for gene in mutant) / 40_000 for k in range(4)]
    assert shares == pytest.approx([0.9, 1 / 30, 1 / 30, 1 / 30], abs=0.005)
    crossed = [crossover(first, second, rng) for _ in range(2000)]
    assert np.mean(crossed) == pytest.approx(0.5, abs=0.01) and np.mean(crossed, axis=0).std() < 0.03


def test_a_generation_is_half_mutated_and_half_crossed(small: Supernet) -> None:
    parents = [(0,) * 20, (1,) * 20]
    children = small.breed(parents, set(parents), 40, 0.1, random.Random(0))
    assert len(set(children)) == 40 and not set(children) & set(parents)
    assert sum(set(child) == {0, 1} and 4 < sum(child) < 16 for child in children) == 20  # 2 genes of 20 mutate
    assert children == small.breed(parents, set(parents), 40, 0.1, random.Random(0))


@pytest.mark.parametrize("parents", [[], [(0,) * 20], [(0,) * 20, (1,) * 20]])
def test_children_that_fail_are_drawn_at_random(small: Supernet, parents: list) -> None:
    """Without a parent, with one, and under limits that no relative of theirs meets."""
    low = 212_000_000
    children = small.breed(parents, set(), 10, 0.0, random.Random(0), low)
    assert len(set(children)) == 10 and all(small.flops(child) >= low for child in children)


# Walking many paths


def neighbours() -> list[tuple[int, ...]]:
    """Sorted, with common beginnings of every length from 0 to 19."""
    rng, first = random.Random(5), draw(1)[0]
    changed = [(*first[:i], (first[i] + 1) % 4, *(rng.randrange(4) for _ in first[i + 1 :])) for i in range(20)]
    return sorted({first, *changed, *draw(9, seed=6)})


def test_walking_gives_each_path_what_it_gives_its_own_head(small: Supernet) -> None:
    x, choices = images(2, 16), neighbours()
    with torch.inference_mode():
        walked = list(small.walk(x, choices, lambda *_: None))
        assert len(walked) == len(choices) == 30
        for features, choice in zip(walked, choices, strict=True):
            assert torch.equal(small.head(features), small(x, choice))


def test_walking_enters_each_beginning_once_and_in_order(small: Supernet) -> None:
    """Brute force: what a depth-first walk of the prefix tree must visit is every prefix, the first time it is seen."""
    choices, entered, expected = neighbours(), [], {}
    for choice in choices:
        for depth, module in enumerate([*small.path(choice)][:-1]):
            expected[depth, choice[:depth]] = module
    with torch.inference_mode():
        for _ in small.walk(images(1, 8), choices, lambda module, key: entered.append((key, module))):
            pass
    assert [key for key, _ in entered] == list(expected)
    assert all(module is expected[key] for key, module in entered)


def test_walking_enters_a_module_before_it_computes(small: Supernet) -> None:
    """The search sets a node's BN statistics there."""
    model, events = copy.deepcopy(small), []
    for module in model.modules():
        module.register_forward_pre_hook(lambda module, _: events.append(("computes", module)))
    path = model.path(OFFICIAL)
    with torch.inference_mode():
        list(model.walk(images(1, 8), [OFFICIAL], lambda module, _: events.append(("entered", module))))
    for module in path[:-1]:
        assert events.index(("entered", module)) + 1 == events.index(("computes", module))


# Weights of one path


@pytest.mark.parametrize("choice", draw(3, seed=8))
def test_a_stand_alone_network_with_a_paths_weights_computes_the_same(small: Supernet, choice: tuple[int, ...]) -> None:
    """open-mmlab/mmrazor#66: the network built from a choice must be the one that was evaluated."""
    alone = Supernet(10, 32, affine=True, choice=choice).eval()
    x = images(8, 16)
    with torch.inference_mode():
        assert not torch.allclose(alone(x, choice), small(x, choice), atol=1e-5)
        alone.load_path(small.state_dict(), choice)
        expected = small(x, choice)
        torch.testing.assert_close(alone(x, choice), expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


def test_a_stand_alone_networks_keys_are_the_supernets_and_scales(small: Supernet) -> None:
    alone = Supernet(10, 32, affine=True, choice=OFFICIAL)
    norms = [name for name, module in alone.named_modules() if isinstance(module, nn.BatchNorm2d)]
    added = {f"{name}.{scale}" for name in norms for scale in ("weight", "bias")}
    own = alone.state_dict().keys()
    assert own - small.state_dict().keys() == added
    kept = [f"layers.{i}.{NAMES[number]}." for i, number in enumerate(OFFICIAL)]
    path = {key for key in small.state_dict() if key.startswith(("stem.", "last.", "head.", *kept))}
    assert own - added == path


@pytest.mark.parametrize(
    "key", ["stem.0.weight", "layers.7.shuffle3.main.1.running_var", "layers.8.shuffle7.projection.2.weight"]
)
def test_a_missing_entry_is_named(small: Supernet, key: str) -> None:
    state = small.state_dict()
    del state[key]
    with pytest.raises(ValueError, match=key.replace(".", r"\.")):
        Supernet(10, 32, affine=True, choice=OFFICIAL).load_path(state, OFFICIAL)


@pytest.mark.parametrize(
    "key", ["extra", "layers.20.shuffle3.main.0.weight", "layers.0.shuffle9.main.0.weight", "stem.0.total_ops"]
)
def test_a_left_over_entry_is_named(small: Supernet, key: str) -> None:
    state = small.state_dict() | {key: torch.zeros(1)}
    with pytest.raises(ValueError, match=key.replace(".", r"\.")):
        Supernet(10, 32, affine=True, choice=OFFICIAL).load_path(state, OFFICIAL)


def test_a_network_built_for_another_path_is_refused(small: Supernet) -> None:
    alone = Supernet(10, 32, affine=True, choice=OFFICIAL)
    for model, choice in ((alone, SINGLE[0]), (small, OFFICIAL)):
        with pytest.raises(ValueError, match=r"not built with|no candidate"):
            model.load_path(small.state_dict(), choice)
