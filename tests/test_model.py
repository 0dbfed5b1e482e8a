"""model.py: the search space against the published numbers, hooks and brute force, and a path as a view of it."""

import copy
import math
import random
import re
from argparse import Namespace
from collections import Counter
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
from model import INITS, NOISE, Choice, SearchSpace, Supernet, default_init
from random_search import breed, crossover, mutate

Spaces = dict[str, SearchSpace]

OFFICIAL = (2, 1, 0, 1, 2, 0, 2, 0, 2, 0, 2, 3, 0, 0, 0, 0, 3, 2, 3, 3)
SINGLE = [(number,) * 20 for number in range(4)]
NAMES = ["shuffle3", "shuffle5", "shuffle7", "xception"]
SKIPPING = (0, 4, 1, 4, 2, 4, 4, 4, 3, 0, 4, 1, 4, 2, 4, 3, 1, 4, 4, 0)  # 4 is `identity`
LOWEST, HIGHEST = 152_645_632, 212_703_232  # multiply-adds at 32 px


def draw(count: int, seed: int = 0) -> list[Choice]:
    rng = random.Random(seed)
    return [tuple(rng.randrange(4) for _ in range(20)) for _ in range(count)]


def images(count: int, side: int, seed: int = 0) -> Tensor:
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(seed))


def build(classes: int, image_size: int, **kwargs) -> Supernet:
    torch.manual_seed(0)
    return Supernet(classes, image_size, **kwargs)


def identity(in_channels: int, out_channels: int, stride: int, affine: bool) -> nn.Module | None:
    """A candidate that is offered where a layer changes no shape."""
    return nn.Identity() if stride == 1 and in_channels == out_channels else None


def trained(model: Supernet) -> Supernet:
    """`model` in eval mode with BN statistics that differ from the initial 0 and 1, and from each other."""
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1, generator=generator)
            module.running_var.uniform_(0.5, 2, generator=generator)
    return model.eval()


@pytest.fixture(scope="module")
def spaces() -> Spaces:
    """Of supernets for 32 and 224 px, and "mixed": for 32 px, with a fifth candidate in 16 of the layers."""
    models = {"small": build(10, 32), "large": build(1000, 224)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(CANDIDATES, "identity", identity)
        models["mixed"] = build(10, 32)
    return {name: SearchSpace(trained(model)) for name, model in models.items()}


@pytest.fixture(scope="module")
def small(spaces: Spaces) -> Supernet:
    """Tests that train it, or replace its parts, take a copy."""
    return spaces["small"].model


def limited(space: SearchSpace, low: int | None, high: int | None = None) -> SearchSpace:
    """The same with limits; what blocks cost takes a second to count, so it is counted once and copied."""
    assert space.size
    space = copy.copy(space)
    space.__init__(space.model, low, high)
    return space


@pytest.fixture(scope="module", params=["small", "mixed"])
def short(request: pytest.FixtureRequest, spaces: Spaces) -> SearchSpace:
    """A space of 4^4, or 5 * 4 * 5 * 5, architectures: the other layers have one candidate each."""
    model = copy.copy(spaces[request.param].model)
    model.options = [[0]] * 3 + model.options[3:7] + [[0]] * 13
    return SearchSpace(model)


@pytest.fixture(scope="module")
def enumerated(short: SearchSpace) -> dict[Choice, int]:
    """All of that space, in lexicographic order, with costs."""
    return {choice: short.flops(choice) for choice in product(*short.options)}


def chi_square(counts: Counter, cells: int) -> float:
    expected = counts.total() / cells
    return (
        sum((count - expected) ** 2 for count in counts.values()) / expected
        + (cells - len(counts)) * expected
    )


def chance(freedom: int) -> float:
    """What a chi-square of so many degrees of freedom exceeds hardly ever: five deviations above its mean."""
    return freedom + 5 * math.sqrt(2 * freedom)


def generators() -> tuple:
    """The states of the global random generators."""
    return random.getstate(), torch.get_rng_state().tolist(), np.random.get_state()[1].tolist()


def hooked_multiply_adds(model: Supernet, choice: Choice) -> int:
    """What one forward of one image multiplies and adds: for each output value, one kernel's weights."""
    total = 0

    def count(module: nn.Module, _: tuple, out: Tensor) -> None:
        nonlocal total
        total += out.numel() * module.weight[0].numel()

    modules = [module for module in model.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    hooks = [module.register_forward_hook(count) for module in modules]
    with torch.no_grad():
        model(images(1, model.image_size), choice)
    for hook in hooks:
        hook.remove()
    return total


# Costs and sizes


@pytest.mark.parametrize(
    ("name", "published", "extremes"),
    [
        ("small", [157_700_096, 164_155_392, 173_838_336, 205_355_008], (LOWEST, HIGHEST)),
        (
            "large",
            [295_842_496, 313_654_976, 340_373_696, 358_825_920, 322_918_720],
            (270_359_360, 398_609_216),
        ),
    ],
)
def test_flops_are_the_published_ones(
    spaces: Spaces, name: str, published: list[int], extremes: tuple
) -> None:
    """The last is megvii-model/SinglePathOneShot's architecture."""
    space = spaces[name]
    assert [space.flops(choice) for choice in [*SINGLE, OFFICIAL][: len(published)]] == published
    ends = " to ".join(str(cost / 1e6) for cost in extremes)
    with pytest.raises(ValueError, match=f"no architecture is within the limits.* {ends} million"):
        limited(space, 10**9)


@pytest.mark.parametrize("name", ["small", "large", "mixed"])
def test_flops_equal_what_hooks_count(spaces: Spaces, name: str) -> None:
    """megvii-model/ShuffleNet-Series#12, microsoft/nni#1849."""
    for choice in spaces[name].sample_distinct(random.Random(0), 2):
        assert spaces[name].flops(choice) == hooked_multiply_adds(spaces[name].model, choice)


@pytest.mark.parametrize("side", [64, 65])
def test_flops_of_a_network_alone_equal_what_hooks_count(side: int) -> None:
    """At the largest size of the small layout and the smallest, an odd one, of the large layout."""
    alone = Supernet(10, side, affine=True, choice=OFFICIAL).eval()
    assert SearchSpace(alone).flops(OFFICIAL) == hooked_multiply_adds(alone, OFFICIAL)


def test_params_are_the_published_ones_and_those_of_the_stand_alone_network(spaces: Spaces) -> None:
    assert sum(p.numel() for p in spaces["small"].model.parameters()) == 6_931_368
    for choice, millions in zip(SINGLE, [2.034, 2.086, 2.164, 2.749], strict=True):
        alone, counted = (
            Supernet(10, 32, affine=True, choice=choice),
            spaces["small"].params(choice),
        )
        assert (
            counted
            == sum(p.numel() for p in alone.parameters())
            == SearchSpace(alone).params(choice)
        )
        assert round(counted / 1e6, 3) == millions


def test_counting_leaves_no_trace() -> None:
    """Lyken17/pytorch-OpCounter#82: no counters in the state, no change of mode, no random number drawn."""
    model = build(10, 32)
    model.layers[3].eval()
    before, modes = (
        copy.deepcopy(model.state_dict()),
        [module.training for module in model.modules()],
    )
    states, space = generators(), SearchSpace(model, 10**8)
    space.flops(OFFICIAL), space.params(OFFICIAL), space.size, space.sample(random.Random(0))
    after = model.state_dict()
    assert after.keys() == before.keys() and all(
        torch.equal(after[key], before[key]) for key in before
    )
    assert [module.training for module in model.modules()] == modes and len(set(modes)) == 2
    assert generators() == states


# A path as a view


def test_a_path_is_made_of_the_supernets_own_modules(small: Supernet) -> None:
    choice, x = draw(1)[0], images(2, 16)
    blocks = [small.layers[i][NAMES[number]] for i, number in enumerate(choice)]
    own = [small.stem, *blocks, small.last, small.head]
    assert all(ours is theirs for ours, theirs in zip(small.path(choice), own, strict=True))
    assert torch.equal(small(x, choice), nn.Sequential(*own)(x))


def test_a_step_moves_all_weights_of_its_path_and_nothing_beside_it(small: Supernet) -> None:
    """megvii-model/DetNAS#3: with zero gradients, momentum and decay would move the idle blocks."""
    model = copy.deepcopy(small).train()
    args = Namespace(learning_rate=0.1, momentum=0.9, weight_decay=0.01)
    optimizer = supernet.build_optimizer(model, args, None)
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


def test_the_optimizer_decays_the_weights_and_nothing_else() -> None:
    """The seed's decay went in as dampening; scales and shifts of a stand-alone network take none."""
    args = Namespace(learning_rate=0.1, momentum=0.9, weight_decay=0.01)
    for model in (Supernet(10, 32), Supernet(10, 32, affine=True, choice=SINGLE[0])):
        groups, decays = supernet.build_optimizer(model, args, None).param_groups, {}
        for module in model.modules():
            decay = 0 if isinstance(module, nn.BatchNorm2d) else 0.01
            decays |= {id(parameter): decay for parameter in module.parameters(recurse=False)}
        assert {
            id(parameter): group["weight_decay"]
            for group in groups
            for parameter in group["params"]
        } == decays
        assert all(
            (group["lr"], group["momentum"], group["dampening"]) == (0.1, 0.9, 0)
            for group in groups
        )


def test_batchnorm_has_scale_and_shift_alone_and_not_in_the_supernet_and_nothing_else_a_bias(
    small: Supernet,
) -> None:
    """microsoft/nni#2883."""
    for model, affine in ((small, False), (Supernet(10, 32, affine=True, choice=OFFICIAL), True)):
        norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
        assert (
            {norm.weight is not None for norm in norms}
            == {norm.bias is not None for norm in norms}
            == {affine}
        )
        layers = [module for module in model.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
        assert layers and all(layer.bias is None for layer in layers)


@pytest.mark.parametrize("affine", [False, True], ids=["supernet", "alone"])
@pytest.mark.parametrize(("init", "stem"), [("identity", 1 / 3), ("official", 0.01)])
def test_initial_weights_have_their_deviations(init: str, stem: float, affine: bool) -> None:
    """Official, megvii-model/SinglePathOneShot: 1 / weight.shape[1]. Else filters copy an input, and have noise."""
    model = build(10, 32, affine=affine, init=init)
    ends = {model.stem[0]: stem, model.head.classifier: 0.01}
    for module in (
        module for module in model.modules() if isinstance(module, nn.Conv2d | nn.Linear)
    ):
        noise = module.weight.detach().clone()
        outputs, inputs = noise.shape[:2]
        expected = ends.get(module, 1 / inputs)
        if module not in ends and init == "identity":
            kernel = noise.shape[-1]
            noise[
                range(outputs),
                [channel % inputs for channel in range(outputs)],
                kernel // 2,
                kernel // 2,
            ] -= 1
            expected = NOISE / math.sqrt(inputs * kernel * kernel)
        error = 5 / math.sqrt(2 * noise.numel())  # five standard errors of a deviation
        assert noise.std().item() == pytest.approx(expected, rel=error)


def test_no_channel_is_dead_at_first() -> None:
    """What BatchNorm gets on digits varies by far more than the eps that it adds, in every channel of every path."""
    dataset = load_dataset("digits", "", 16)
    x, _ = next(Batches(dataset, dataset.train, 16, torch.device("cpu")).epoch(seed=0, epoch=0))
    model, variances = build(10, 16).train(), []
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.register_forward_pre_hook(
                lambda norm, args: variances.append(args[0].var((0, 2, 3)).min() / norm.eps)
            )
    with torch.no_grad():
        for choice in SINGLE + draw(4):
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


@pytest.mark.parametrize(
    ("side", "init"), [(8, "identity"), (64, "identity"), (65, "official"), (224, "official")]
)
def test_the_size_of_the_images_chooses_the_initial_weights(side: int, init: str) -> None:
    default, chosen = build(10, side), build(10, side, init=init)
    assert default_init(side) == init
    assert torch.equal(
        default.layers[3]["shuffle5"].main[0].weight, chosen.layers[3]["shuffle5"].main[0].weight
    )


@pytest.mark.parametrize(
    ("choice", "said"),
    [
        ((0,) * 19, "20 numbers"),
        ((0,) * 21, "20 numbers"),
        ((), "20 numbers"),
        ((4,) + (0,) * 19, "layer 0 has no candidate 4"),
        ((0,) * 19 + (-1,), "layer 19 has no candidate -1"),
        ((1.5,) + (0,) * 19, "integer"),
    ],
)
def test_a_choice_of_wrong_length_or_number_is_refused(
    small: Supernet, spaces: Spaces, choice: tuple, said: str
) -> None:
    space, x = spaces["small"], images(1, 8)
    uses = (
        small.path,
        space.flops,
        space.params,
        lambda c: small(x, c),
        lambda c: Supernet(10, 32, choice=c),
    )
    for use in uses:
        with pytest.raises((ValueError, TypeError), match=said):
            use(choice)


def test_a_stand_alone_network_refuses_another_choice(small: Supernet) -> None:
    alone = Supernet(10, 32, affine=True, choice=OFFICIAL)
    assert alone(images(2, 8), list(OFFICIAL)).shape == (2, 10)
    with pytest.raises(ValueError, match="layer 19 has no candidate 2, only 3"):
        alone(images(2, 8), (*OFFICIAL[:-1], 2))


@pytest.mark.parametrize("choice", SINGLE)
@pytest.mark.parametrize("side", [32, 224])
def test_logits_are_finite_and_gradients_reach_the_stem(
    spaces: Spaces, side: int, choice: Choice
) -> None:
    """ShunLu91/Single-Path-One-Shot-NAS#6: the large layout leaves a single pixel of a small image."""
    model, maps = copy.deepcopy(spaces["small" if side == 32 else "large"].model).train(), []
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


@pytest.mark.parametrize("name", ["small", "mixed"])
def test_draws_are_uniform_and_distinct_and_use_no_other_generator(
    spaces: Spaces, name: str
) -> None:
    space, rng, states = spaces[name], random.Random(0), generators()
    choices = [space.sample(rng) for _ in range(2000)]
    assert generators() == states
    assert len(set(choices)) == 2000 and all(
        space.model.check(choice) == choice for choice in choices
    )
    layers = [
        (Counter(numbers), len(o))
        for numbers, o in zip(zip(*choices, strict=True), space.options, strict=True)
    ]
    assert sum(chi_square(*layer) for layer in layers) < chance(
        sum(cells - 1 for _, cells in layers)
    )


def test_parts_of_the_whole_space_add_up_and_draws_keep_to_them(spaces: Spaces) -> None:
    space, edges, total = (
        spaces["small"],
        [None, 155_000_000, 170_000_001, 170_100_001, 200_000_000, None],
        0,
    )
    for low, above in pairwise(edges):
        part = limited(space, low, above and above - 1)
        draws = part.sample_distinct(random.Random(0), 50)
        assert len(set(draws)) == 50
        assert all((low or 0) <= space.flops(choice) < (above or math.inf) for choice in draws)
        total += part.size
    assert space.size == total == 4**20
    assert limited(space, LOWEST, LOWEST).size == 1


def test_a_limited_space_equals_enumeration(
    short: SearchSpace, enumerated: dict[Choice, int]
) -> None:
    """In lexicographic order; with limits on and just inside of attainable costs."""
    costs = sorted(enumerated.values())
    low, middle, high = (costs[len(costs) * quarter // 4] for quarter in (1, 2, 3))
    limits = [
        (None, None),
        (low, None),
        (None, low),
        (low, high),
        (low + 1, high - 1),
        (middle, middle),
    ]
    for low, high in [*limits, (None, costs[0]), (costs[-1], None)]:
        space = limited(short, low, high)
        inside = [c for c, cost in enumerated.items() if (low or 0) <= cost <= (high or math.inf)]
        assert inside == [choice for choice in enumerated if choice in space]
        assert len(inside) == space.size
        assert set(inside) == set(space.sample_distinct(random.Random(0), len(inside) + 1))


def test_draws_within_limits_are_uniform(short: SearchSpace, enumerated: dict[Choice, int]) -> None:
    costs = sorted(enumerated.values())
    space = limited(short, costs[100], costs[140])
    inside = {choice for choice, cost in enumerated.items() if costs[100] <= cost <= costs[140]}
    assert 20 < len(inside) < 100
    rng = random.Random(0)
    counts = Counter(space.sample(rng) for _ in range(50 * len(inside)))
    assert set(counts) == inside
    assert chi_square(counts, len(inside)) < chance(len(inside) - 1)


@pytest.mark.parametrize("limits", [(170_000_001, 170_000_002), (180_000_000, 170_000_000)])
def test_limits_between_two_costs_and_the_wrong_way_round_are_refused(
    spaces: Spaces, limits: tuple[int, int]
) -> None:
    with pytest.raises(ValueError, match="no architecture"):
        limited(spaces["small"], *limits)


def test_a_candidate_may_be_offered_in_some_layers_only(spaces: Spaces) -> None:
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


def bred(population: int, mutation_prob: float = 0.1) -> Namespace:
    """The settings of evolution."""
    return Namespace(seed=0, population=population, mutation_prob=mutation_prob)


@pytest.mark.parametrize("name", ["small", "mixed"])
def test_a_tight_limit_shrinks_no_generation(spaces: Spaces, name: str) -> None:
    """megvii-model/SinglePathOneShot#16, microsoft/Cream#59: ten generations below the 20th percentile of FLOPs."""
    rng, space = random.Random(0), spaces[name]
    limit = sorted(space.flops(space.sample(rng)) for _ in range(1000))[200]
    space = limited(space, None, limit)
    taken = set(space.sample_distinct(rng, 50))
    for generation in range(1, 11):
        parents = sorted(taken, key=space.flops)[
            -10:
        ]  # those at the limit: half of their relatives are above it
        children = breed(space, parents, taken, bred(50), generation)
        taken |= set(children)
        assert len(taken) == 50 * (generation + 1) and all(
            space.flops(child) <= limit for child in children
        )


def test_mutation_follows_its_definition(short: SearchSpace) -> None:
    """mit-han-lab/gan-compression#64: to each of the layer's other candidates alike, and to itself if there is none."""
    rng, first = random.Random(0), next(product(*short.options))
    assert mutate(short, first, 0, rng) == first
    mutants = [mutate(short, first, 0.1, rng) for _ in range(4000)]
    for layer, options in enumerate(short.options):
        assert (mutate(short, first, 1, rng)[layer] == first[layer]) == (len(options) == 1)
        shares = Counter(mutant[layer] for mutant in mutants)
        expected = (
            {0: 3600} | dict.fromkeys(options[1:], 400 / (len(options) - 1))
            if options[1:]
            else {0: 4000}
        )
        assert shares == pytest.approx(expected, abs=75)


def test_crossover_takes_each_number_from_either_parent_alike() -> None:
    """mit-han-lab/once-for-all#1."""
    rng = random.Random(0)
    crossed = [crossover((0,) * 20, (1,) * 20, rng) for _ in range(2000)]
    assert (
        np.mean(crossed) == pytest.approx(0.5, abs=0.01) and np.mean(crossed, axis=0).std() < 0.03
    )


def test_a_generation_is_half_mutated_and_half_crossed(spaces: Spaces) -> None:
    parents, space = [(0,) * 20, (1,) * 20], spaces["small"]
    children, again = (breed(space, parents, set(parents), bred(40), 1) for _ in range(2))
    assert len(set(children)) == 40 and not set(children) & set(parents)
    assert (
        sum(set(child) == {0, 1} and 4 < sum(child) < 16 for child in children) == 20
    )  # 2 genes of 20 mutate
    assert children == again


@pytest.mark.parametrize("parents", [[], [(0,) * 20], [(0,) * 20, (1,) * 20]])
def test_children_that_fail_are_drawn_at_random(spaces: Spaces, parents: list) -> None:
    """Without a parent, with one, and under limits that no relative of theirs meets."""
    space = limited(spaces["small"], 212_000_000)
    children = breed(space, parents, set(), bred(10, 0.0), 1)
    assert len(set(children)) == 10 and all(space.flops(child) >= 212_000_000 for child in children)


# Weights of one path


@pytest.mark.parametrize(
    ("name", "choice"), [*(("small", choice) for choice in draw(2, seed=8)), ("mixed", SKIPPING)]
)
def test_a_stand_alone_network_with_a_paths_weights_computes_the_same(
    spaces: Spaces, name: str, choice: Choice, monkeypatch: pytest.MonkeyPatch
) -> None:
    """open-mmlab/mmrazor#66: the network built from a choice must be the one that was evaluated."""
    if name == "mixed":
        monkeypatch.setitem(CANDIDATES, "identity", identity)
    supernet, alone = spaces[name].model, Supernet(10, 32, affine=True, choice=choice).eval()
    x = images(8, 16)
    with torch.inference_mode():
        expected = supernet(x, choice)
        assert not torch.allclose(alone(x, choice), expected, atol=1e-5)
        alone.load_path(supernet.state_dict())
        torch.testing.assert_close(
            alone(x, choice), expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item()
        )
    assert sum(p.numel() for p in alone.parameters()) == spaces[name].params(choice)
    space = SearchSpace(alone)
    assert (
        space.flops(choice) == spaces[name].flops(choice)
        and space.size == 1
        and space.single_blocks() == []
    )


@pytest.mark.parametrize(
    "key",
    [
        "stem.0.weight",
        "layers.7.shuffle3.main.1.running_var",
        "layers.8.shuffle7.projection.2.weight",
        "extra",
        "layers.20.shuffle3.main.0.weight",
        "layers.0.shuffle9.main.0.weight",
        "stem.0.total_ops",
    ],
)
def test_a_missing_or_left_over_entry_is_named(small: Supernet, key: str) -> None:
    state = small.state_dict()
    if key in state:
        del state[key]
    else:
        state[key] = torch.zeros(1)
    with pytest.raises(ValueError, match=re.escape(key)):
        Supernet(10, 32, affine=True, choice=OFFICIAL).load_path(state)
