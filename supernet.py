"""Trains the supernet by uniform single-path sampling, or with --choice one architecture alone, by the same loop.

Guo et al., arXiv 1904.00420, section 3.2: every step draws one path uniformly and trains only that path.
"""

import argparse
import copy
import inspect
import math
import os
import re
import shlex
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import utils
from blocks import CANDIDATES, capture_blocks, release_blocks
from data.datasets import IMAGE_SIZES, Dataset, load_dataset
from data.loaders import Batches
from data.records import METRICS, parse_choice, write_csv
from img.plots import plot_training
from model import CHANNELS, INITS, Choice, Classifier, SearchSpace, Supernet, default_init
from utils import UserError, log

# The rates of digits and CIFAR-10 suit weights near the identity (img/README.md, "Initial weights"). The rest of
# CIFAR-10's recipe is that of ShunLu91/Single-Path-One-Shot-NAS at 6940c9b, as it was meant; ImageNet's is the official
# code's.
RECIPES = {
    "cifar10": {"epochs": 600, "batch_size": 96, "learning_rate": 0.1, "weight_decay": 3e-4},
    "imagenet": {"epochs": 120, "batch_size": 1024, "learning_rate": 0.5, "weight_decay": 4e-5, "label_smoothing": 0.1},
    "digits": {"epochs": 10, "batch_size": 32, "learning_rate": 0.1, "weight_decay": 3e-4, "momentum": 0.8},
}
# What a command says anew about a run that it continues, and what may differ from it besides. The rest decides what is
# learned.
ANEW = {"exp_name", "out_dir", "resume", "overwrite", "no_cuda_graphs"}
FREE = ANEW | {"data_dir", "device", "workers", "val_interval"}
ADVICE = (
    "a run's settings stay what they were: leave the flag out to continue, or start another run with a new --exp_name"
)
EVALUATION_BATCH = 250
CHECK_EVERY = 100  # steps between two looks at the loss, which wait for the device


def build_parser() -> utils.Parser:
    """The parser; the defaults that depend on the data set and the kind of network are set by `recipe`."""
    parser = utils.Parser("Trains the supernet by single-path sampling, or with --choice one architecture alone.")
    add, number = parser.add_argument, utils.number
    add("--exp_name", type=folder_name, default="spos_cifar10", help="name of the run's folder, OUT_DIR/EXP_NAME")
    add("--out_dir", type=utils.path, default="runs", help="parent folder of the runs")
    add("--dataset", choices=list(IMAGE_SIZES), default="cifar10", help="what to train on; digits needs no download")
    add("--data_dir", type=utils.path, default="./data", help="folder of the data set, or where it is downloaded to")
    add("--image_size", type=number(int, 8), help="side of the images in pixels; above 64 the network is ImageNet's")
    add("--epochs", type=number(int, 1), help="passes over the training images")
    add("--batch_size", type=number(int, 1), help="images per step")
    add("--learning_rate", type=number(float, above=0), help="initial learning rate")
    add("--lr_schedule", choices=("linear", "cosine"), help="how the learning rate decays to 0, step by step")
    add("--momentum", type=number(float, 0, below=1), help="momentum of SGD")
    add("--weight_decay", type=number(float, 0), help="weight decay (BatchNorm excluded)")
    add("--label_smoothing", type=number(float, 0, below=1), help="label smoothing")
    add("--cutout", type=number(int, 0), nargs="?", help="side of the square to cut out; no value: half the image")
    add("--init", choices=INITS, help="initial weights: near the identity, or the official code's")
    add("--choice", help="train one architecture alone: 20 numbers like 1-0-3-..., or a search.json")
    add("--init_from", type=utils.path, help="with --choice: start from the weights in this supernet's last.pth")
    add("--train_on", choices=("train", "all"), default="train", help="with --choice: all adds the search split")
    add("--val_interval", type=number(int, 1), default=1, help="epochs between validations; the last always has one")
    add("--resume", action="store_true", help="continue the run with its original settings")
    add("--overwrite", action="store_true", help="delete the run in that folder, and its search, and start again")
    utils.add_common_flags(parser)
    return parser


def recipe(asked: argparse.Namespace) -> dict:
    """The defaults that suit the data set, the size of the images and the kind of network."""
    small = asked.dataset in ("cifar10", "folder")
    image_size = asked.image_size or IMAGE_SIZES[asked.dataset]
    values = {"image_size": image_size, "momentum": 0.9, "label_smoothing": 0.0, "lr_schedule": "linear", "cutout": 0}
    values |= RECIPES["cifar10" if small else asked.dataset]
    values["init"] = None if asked.init_from else default_init(image_size)
    if small and (asked.init or default_init(image_size)) == "official":
        values["learning_rate"] = 0.025
    if asked.choice is not None and small:
        values["cutout"] = image_size // 2
    if asked.choice is not None and asked.dataset == "imagenet":
        values["epochs"] = 240
    return values


def folder_name(text: str) -> str:
    """An argparse type: a name that stays inside its parent folder on every system."""
    if not text.strip(". ") or text[-1] in ". " or set(text) & set('<>:"/\\|?*') or not text.isprintable():
        raise argparse.ArgumentTypeError(f"{text!r} is not a plain folder name")
    return text


def parse_args(argv: Sequence[str] | None) -> tuple[argparse.Namespace, dict | None]:
    """The run's settings and, with --resume, the checkpoint they come from."""
    parser = build_parser()
    searched = read_search(parser.peek(argv).choice)
    brought = {name: searched[name] for name in ("dataset", "image_size", "data_dir") if name in searched}
    parser.adopt(brought, "the file that --choice names")
    asked = parser.peek(argv)
    if asked.dataset != searched.get("dataset", asked.dataset):  # another one than the search's
        parser.set_defaults(image_size=None, data_dir="./data")
    parser.set_defaults(**recipe(parser.peek(argv)))
    args, checkpoint = parser.parse_args(argv), None
    last = Path(args.out_dir, args.exp_name, "last.pth")
    if args.resume and last.exists():
        checkpoint = utils.load_checkpoint(last)
        before = checkpoint["args"]
        utils.refuse_candidates(checkpoint, list(CANDIDATES), str(last))
        if "init" not in before:
            raise UserError(f"{last} is of an earlier version, whose learning rate fell otherwise; start again")
        kept = {name: value for name, value in before.items() if name not in ANEW}
        if missing := vars(args).keys() - ANEW - kept.keys():
            raise UserError(f"{last} is not a whole checkpoint: its args lack {', '.join(sorted(missing))}")
        parser.adopt(kept, str(last), optional=["init"])
        args = parser.parse_args(argv)
    args.cutout = args.image_size // 2 if args.cutout is None else args.cutout
    args.supernet_accuracy = searched.get("accuracy")
    if args.choice is not None:
        args.choice = read_choice(searched.get("choice", args.choice))
    if checkpoint is not None:
        args.supernet_accuracy = before["supernet_accuracy"]
        args.precision = before["precision"] if args.precision == "auto" else args.precision
        fixed = {name: value for name, value in vars(args).items() if name in before and name not in FREE}
        utils.refuse_changes(before, fixed, str(last), ADVICE)
    if args.resume and args.overwrite:
        parser.error("--resume continues a run and --overwrite deletes it; give one of them")
    if args.choice is None and args.train_on == "all":
        parser.error("--train_on all needs --choice: a supernet's search split must stay out of its training")
    if args.choice is None and args.init_from:
        parser.error("--init_from needs --choice: it takes the weights of one path out of a supernet")
    if args.init_from and args.init:
        parser.error("--init and --init_from both say where the initial weights come from; give one of them")
    if args.dataset == "cifar10" and args.image_size != 32:
        parser.error("--image_size: the images of cifar10 have 32 pixels")
    if args.cutout >= args.image_size:
        parser.error(f"--cutout {args.cutout} would blank images of {args.image_size} pixels")
    return args, checkpoint


def read_search(text: str | None) -> dict:
    """The content of the search.json that --choice names; empty if it names none."""
    if text is None or not os.path.isfile(utils.path(text)):
        return {}
    found = utils.read_json(Path(utils.path(text)))
    if "choice" not in found or not isinstance(found.get("accuracy"), int | float):
        raise UserError(f"{text} holds no choice; is it a search.json of random_search.py?")
    utils.refuse_candidates(found, list(CANDIDATES), text)
    return found


def read_choice(text: str) -> str:
    """A choice as 1-0-3-..., from numbers with hyphens, commas or blanks between them."""
    numbers = re.split(r"[-,\s]+", str(text).strip("[] "))
    if len(numbers) != len(CHANNELS) or not set(numbers) <= set(map(str, range(len(CANDIDATES)))):
        raise UserError(
            f"--choice {str(text)[:100]} is neither {len(CHANNELS)} numbers from 0 to {len(CANDIDATES) - 1}, "
            "like 1-0-3-..., nor an existing file"
        )
    return "-".join(numbers)


def main(argv: Sequence[str] | None = None) -> None:
    """Trains, validates and records every epoch; a single architecture is measured on the test images at the end."""
    args, checkpoint = parse_args(argv)
    folder = Path(args.out_dir, args.exp_name)
    with utils.owned_folder(folder, "--exp_name or --out_dir"):
        check_folder(folder, args)
        run(folder, args, checkpoint)


def run(folder: Path, args: argparse.Namespace, checkpoint: dict | None) -> None:
    """Prepares a run or what is left of it, trains, and measures a single architecture."""
    device = utils.pick_device(args.device)
    args.precision, args.data_dir = utils.pick_precision(args.precision, device), os.path.abspath(args.data_dir)
    utils.open_log(folder / "log.txt" if checkpoint else None)
    rows = checkpoint["metrics"] if checkpoint else []
    if len(rows) == args.epochs and (args.choice is None or (folder / "result.json").exists()):
        log.info(f"{folder} is complete: {args.epochs} epochs")
        return

    weights = None
    if args.init_from and checkpoint is None:
        supernet = utils.load_supernet(Path(args.init_from))
        utils.refuse_candidates(supernet, list(CANDIDATES), args.init_from)
        weights = supernet["model"]
    dataset = load_dataset(args.dataset, args.data_dir, args.image_size, args.workers)
    if checkpoint:
        dataset.adopt(checkpoint["data"], f"{folder / 'last.pth'}")
    batches = load_batches(dataset, args, device)
    model = build_model(dataset, args, weights).to(device, memory_format=utils.memory_format(device, args.precision))
    if checkpoint:
        model.load_state_dict(checkpoint["model"])
    optimizer = build_optimizer(model, args, checkpoint["optimizer"] if checkpoint else None)

    if checkpoint is None and utils.rank() == 0:
        if (folder / "search").is_dir():
            with utils.owned_folder(folder / "search", "--exp_name"):  # a search may be at work
                utils.delete_files(folder / "search", utils.SEARCH_FILES)
        utils.delete_files(folder, utils.RUN_FILES)
    utils.open_log(folder / "log.txt")
    if checkpoint:
        log.info(f"resuming after epoch {len(rows)}")
    elif args.resume:
        log.info(f"no checkpoint in {folder}; starting from scratch")
    sizes = ", ".join(f"{len(split.labels):,} {name}" for name, split in batches.items())
    versions = f"torch {torch.__version__}, torchvision {torchvision.__version__}"
    log.info(f"device    {utils.describe_device(device)}, {args.precision}, {versions}")
    log.info(f"data      {dataset.name}, {dataset.image_size} px, {len(dataset.classes)} classes: {sizes} images")
    kind = "supernet" if args.choice is None else f"architecture {args.choice}"
    parameters = sum(p.numel() for p in model.parameters())
    log.info(f"network   {kind}, {parameters:,} parameters, initial weights: {args.init or args.init_from}")
    if utils.rank() == 0:
        about = {"torch": torch.__version__, "device_name": utils.describe_device(device)}
        utils.write_json(folder / "args.json", vars(args) | about)

    train(model, batches, optimizer, args, rows, dataset.metadata())
    if args.choice is not None:
        if utils.rank() == 0:
            export(folder / "model.pt2", model, parse_choice(args.choice), dataset.mean, dataset.std)
        write_result(folder, model, batches["test"], args)
    log.info(f"wrote {', '.join(str(folder / name) for name in utils.RUN_FILES if (folder / name).exists())}")
    if args.choice is None:
        log.info(f"next: {shlex.join(['python', 'random_search.py', '--ckpt', str(folder / 'last.pth')])}")


def check_folder(folder: Path, args: argparse.Namespace) -> None:
    """Raises UserError if the folder holds a run that nobody asked to touch or that cannot continue, or a search."""
    names = "last.pth", "metrics.csv", "result.json", "search/paths.csv"
    kept = [folder / name for name in names if (folder / name).exists()]
    advice = "--overwrite deletes it, or take another --exp_name"
    if kept and not (args.resume or args.overwrite):
        raise UserError(f"{kept[0]} exists: --resume continues that run, {advice}")
    if kept and not args.overwrite and kept[0].name != "last.pth":
        raise UserError(f"{kept[0]} exists, but no last.pth that a run could continue from: {advice}")
    if (folder / "paths.csv").exists():
        raise UserError(f"{folder} is the folder of a search; take another --exp_name")


def load_batches(dataset: Dataset, args: argparse.Namespace, device: torch.device) -> dict[str, Batches]:
    """Batches of the three splits; with --train_on all the search split is trained on as well.

    A supernet's search split is augmented like its training images. Without their dark borders, BatchNorm's statistics
    are not those that the weights were trained with, and cost 8.5 points of top-1 on CIFAR-10 (img/README.md).
    """
    train = dataset.train + dataset.search if args.train_on == "all" else dataset.train
    if utils.world_size() > 1 and (args.batch_size % utils.world_size() or args.batch_size > len(train)):
        raise UserError(
            f"--batch_size {args.batch_size} is that of all {utils.world_size()} ranks together: take a multiple of "
            f"{utils.world_size()}, at most the {len(train)} training images"
        )
    # A batch of one class only, as folders come in order, would be normalised by statistics of that class.
    order = utils.stream(args.seed, "validation order").sample(range(len(dataset.search)), len(dataset.search))
    sizes = {"train": args.batch_size, "search": EVALUATION_BATCH, "test": EVALUATION_BATCH}
    splits = {"train": train, "search": dataset.search.subset(order), "test": dataset.test}
    how = device, args.workers, args.precision
    batches = {name: Batches(dataset, splits[name], sizes[name], *how) for name in splits}
    if args.choice is None:
        batches["search"] = batches["search"].augmented(args.cutout)
    return batches


def build_model(dataset: Dataset, args: argparse.Namespace, weights: dict[str, Tensor] | None) -> Supernet:
    """The network with its initial weights, which depend on --seed alone, or on a supernet's weights.

    Raises UserError if there is no such network, or if the weights do not fit it.
    """
    torch.manual_seed(args.seed)
    choice = parse_choice(args.choice) if args.choice is not None else None
    try:
        model = Supernet(len(dataset.classes), dataset.image_size, choice is not None, choice, args.init)
    except ValueError as error:
        raise UserError(f"--choice {args.choice}: {error}") from None
    if weights is not None:
        try:
            model.load_path(weights, choice)
        except (RuntimeError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"--init_from {args.init_from} does not fit this network ({reason})") from None
    return model


def build_optimizer(model: Supernet, args: argparse.Namespace, state: dict | None = None) -> torch.optim.SGD:
    """SGD with weight decay on convolution and classifier weights, and none on BatchNorm's scales and shifts.

    state: of an optimizer to continue.
    """
    weights = [p for p in model.parameters() if p.ndim > 1]
    scales = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": weights, "weight_decay": args.weight_decay}, {"params": scales, "weight_decay": 0.0}]
    optimizer = torch.optim.SGD(groups, lr=args.learning_rate, momentum=args.momentum)
    if state is not None:
        optimizer.load_state_dict(state)
    for group in optimizer.param_groups:
        group["fused"] = True
        for weight in group["params"]:
            # Fused, it fails where only some of a path's weights have momentum yet; to begin with zeros is the same.
            if optimizer.state[weight].get("momentum_buffer") is None:
                optimizer.state[weight]["momentum_buffer"] = torch.zeros_like(weight)
    return optimizer


def learning_rate(args: argparse.Namespace, done: float) -> float:
    """The rate after a share of all steps, from 0 to 1."""
    return args.learning_rate * (1 - done if args.lr_schedule == "linear" else (1 + math.cos(math.pi * done)) / 2)


def train(
    model: Supernet,
    batches: dict[str, Batches],
    optimizer: torch.optim.SGD,
    args: argparse.Namespace,
    rows: list[dict],
    metadata: dict,
) -> None:
    """Trains the epochs that `rows` lacks; each ends with a row of metrics.csv, a checkpoint and a line of the log.

    Raises UserError with epoch and step if the loss or a weight stops being finite.
    """
    folder, images, space = Path(args.out_dir, args.exp_name), batches["train"], SearchSpace(model)
    steps, begun, alone = images.steps(), len(rows), args.choice is not None
    validated_on = "search split" if alone else "random paths"
    if not alone:
        log.info(
            "random paths are validated like a training step, with augmented images of the search split and each "
            "batch's own BatchNorm statistics: a sign of progress, not a result"
        )
    log.info(f"graphs    {use_cuda_graphs(model, images, args, steps * (args.epochs - begun))}")
    network = distribute(model)
    start = time.monotonic()
    for epoch in range(begun, args.epochs):
        epoch_start = time.monotonic()

        # Train. Paths, order and augmentation depend on seed and epoch alone, so that a resumed run repeats them.
        network.train()
        rng, losses, hits = utils.stream(args.seed, f"train {epoch}"), [], []
        epoch_images = images.epoch(args.seed, epoch, args.cutout)
        for step, (x, y) in enumerate(utils.progress(epoch_images, f"epoch {epoch + 1}", steps)):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(args, (epoch + step / steps) / args.epochs)
            # Uniform sampling of a single path; every rank draws the same one. Alone, there is one to draw from.
            choice = space.sample(rng)
            # A gradient of zero, unlike none, would let momentum and weight decay move the blocks off the path.
            optimizer.zero_grad(set_to_none=True)
            with utils.autocast(args.precision, images.device):
                logits = network(x, choice)
            loss = F.cross_entropy(logits, y, label_smoothing=args.label_smoothing)
            loss.backward()
            optimizer.step()
            # These stay on the device: to read them here would make the host wait at every step.
            losses.append(loss.detach())
            hits.append((logits.argmax(1) == y).float().mean())
            if (step + 1) % CHECK_EVERY == 0 or step + 1 == steps:
                check_finite(losses, epoch)
        if not all(value.isfinite().all() for value in model.state_dict().values()):
            raise UserError(f"the weights are no longer finite after epoch {epoch + 1}; lower --learning_rate")
        means = utils.all_reduce(torch.stack((torch.stack(losses).mean(), torch.stack(hits).mean())))
        means /= utils.world_size()
        row = dict.fromkeys(METRICS) | {"epoch": epoch + 1, "lr": learning_rate(args, epoch / args.epochs)}
        row["train_loss"], row["train_acc"] = means[0].item(), 100 * means[1].item()
        utils.broadcast_buffers(model)

        # Validate. A supernet's running statistics mix all paths and suit none, so a path gets those of each batch.
        due = (epoch + 1) % args.val_interval == 0 or epoch + 1 == args.epochs
        if due and args.train_on == "train":
            paths = fixed_paths(space, batches["search"], args.seed)
            result = evaluate(model, batches["search"], paths, own_statistics=not alone)
            row["val_loss"], row["val_acc"] = result["loss"], result["top1"]
        row["seconds"] = round(time.monotonic() - epoch_start, 3)
        rows.append(row)

        # Record. A checkpoint holds the whole table, so that a kill between two files loses nothing.
        if utils.rank() == 0:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": epoch + 1}
            state |= {"args": vars(args), "data": metadata, "metrics": rows, "candidates": model.names}
            utils.save_checkpoint(folder / "last.pth", state)
            write_csv(folder / "metrics.csv", rows, METRICS)
            if (epoch + 1) % max(1, args.epochs // 50) == 0 or epoch + 1 == args.epochs:
                how = "" if alone else ", as in a training step"
                plot_training(rows, folder / "training.png", validated_on + how)
        line = f"epoch {epoch + 1:{len(str(args.epochs))}}/{args.epochs}  lr {row['lr']:.5f}"
        line += f"  train loss {row['train_loss']:.4f} top-1 {row['train_acc']:5.2f}%"
        if row["val_acc"] is not None:
            line += f"  {validated_on} loss {row['val_loss']:.4f} top-1 {row['val_acc']:5.2f}%"
        left = (time.monotonic() - start) / (epoch + 1 - begun) * (args.epochs - epoch - 1)
        log.info(f"{line}  {utils.duration(row['seconds'])}  left {utils.duration(left)}")
    release_blocks(model)


def check_finite(losses: list[Tensor], epoch: int) -> None:
    """Raises UserError with the first step of the epoch whose loss is not finite on some rank."""
    total = utils.all_reduce(torch.stack(losses))
    bad = (~total.isfinite()).nonzero().flatten().tolist()
    if bad:
        raise UserError(
            f"the loss is {total[bad[0]].item()} in epoch {epoch + 1}, step {bad[0] + 1}; lower --learning_rate "
            "(the checkpoint of the last whole epoch, if there is one, is unharmed)"
        )


def fixed_paths(space: SearchSpace, batches: Batches, seed: int) -> list[Choice]:
    """A path for every batch, the same at every call."""
    rng = utils.stream(seed, "validation")
    return [space.sample(rng) for _ in range(len(batches))]


@torch.inference_mode()
def evaluate(
    model: Supernet, batches: Batches, paths: Sequence[Choice], own_statistics: bool = False
) -> dict[str, float]:
    """Mean loss, top-1 and top-5 accuracy in percent, batch i through paths[i], in fp32; changes no buffer.

    own_statistics: whether BatchNorm uses those of each batch, as in training, instead of the running ones.
    """
    model.eval()
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.train(own_statistics)
        norm.track_running_stats = not own_statistics  # without it, training mode leaves the buffers alone
    totals = torch.zeros(3, device=batches.device)
    for i, (x, y) in batches.share():
        logits = model(x, paths[i])
        hits = logits.topk(min(5, logits.shape[1])).indices == y[:, None]
        totals += torch.stack((F.cross_entropy(logits, y, reduction="sum"), hits[:, 0].sum(), hits.sum()))
    for norm in norms:
        norm.track_running_stats = True
    loss, top1, top5 = (utils.all_reduce(totals) / len(batches.labels)).tolist()
    return {"loss": loss, "top1": 100 * top1, "top5": 100 * top5}


def export(folder_file: Path, model: Supernet, choice: Choice, mean: Sequence[float], std: Sequence[float]) -> None:
    """Writes a network that torch alone can load and run: uint8 (N, 3, S, S), any N -> logits (N, classes)."""
    network = Classifier(copy.deepcopy(model.path(choice)), mean, std)
    network = network.to("cpu", memory_format=torch.contiguous_format).eval()
    images = torch.zeros(2, 3, model.image_size, model.image_size, dtype=torch.uint8)
    with torch.no_grad():
        program = torch.export.export(network, (images,), dynamic_shapes=({0: torch.export.Dim("N")},))
    with utils.replacing(folder_file) as temporary, open(temporary, "wb") as file:
        torch.export.save(program, file)


def write_result(folder: Path, model: Supernet, test: Batches, args: argparse.Namespace) -> None:
    """Measures a single architecture on the test images, once, and writes result.json."""
    space, choice, images = SearchSpace(model), parse_choice(args.choice), len(test.labels)
    measured = evaluate(model, test, [choice] * len(test))
    result = {"choice": args.choice, "test_accuracy": measured["top1"]}
    result |= {"standard_error": utils.standard_error(measured["top1"], images), "test_images": images}
    if model.head.classifier.out_features >= 100:
        result["test_top5"] = measured["top5"]
    result |= {"flops_m": space.flops(choice) / 1e6, "params_m": space.params(choice) / 1e6}
    result |= {name: getattr(args, name) for name in ("dataset", "train_on", "epochs", "seed", "supernet_accuracy")}
    if utils.rank() == 0:
        utils.write_json(folder / "result.json", result)
    log.info(
        f"test      top-1 {measured['top1']:.2f}% ± {result['standard_error']:.2f} on {images:,} images, "
        f"{result['flops_m']:.1f}M multiply-adds, {result['params_m']:.2f}M parameters"
    )


# Several GPUs, and the launches of one


def distribute(model: Supernet) -> Supernet | DistributedDataParallel:
    """The network to train with: under torchrun a wrapper that averages the ranks' gradients."""
    if utils.world_size() == 1:
        return model
    # All ranks draw the same path, so what is unused on one is unused on all: its gradient stays None.
    known = inspect.signature(DistributedDataParallel).parameters
    synchronise = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"  # the older name
    return DistributedDataParallel(model, find_unused_parameters=True, **{synchronise: False})


def use_cuda_graphs(model: Supernet, images: Batches, args: argparse.Namespace, steps: int) -> str:
    """Lets the blocks replay CUDA graphs where that pays; returns what the log says about it."""
    if args.no_cuda_graphs:
        return "not used: --no_cuda_graphs"
    if len(images.labels) < args.batch_size:
        return "not used: there are fewer training images than a batch has"
    with utils.autocast(args.precision, images.device):
        return capture_blocks(model, images.blank(args.batch_size // utils.world_size()), steps)


if __name__ == "__main__":
    utils.run_script(main)
