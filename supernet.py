"""Trains the supernet by uniform single-path sampling, or with --choice one architecture alone.

Guo et al., arXiv 1904.00420, section 3.2: every step draws one path uniformly and trains only that.
"""

import math
import os
import random
import shlex
import sys
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD

import utils
from blocks import capture_blocks, release_blocks
from data import records
from data.datasets import IMAGE_SIZES, ImageData, load_dataset
from data.images import RESIDENT_SIDE
from data.loaders import Batches
from img.plots import draw, plot_training
from model import INITS, SPACES, Choice, Classifier, SearchSpace, Supernet, defaults, tracked_norms
from utils import UserError, absolute_path, log, nonempty, number, user_path

# CIFAR-10's recipe is that of ShunLu91/Single-Path-One-Shot-NAS at 6940c9b, as it was meant, with a
# higher rate for weights near the identity (img/README.md); ImageNet's is the official code's.
RECIPES = {
    "cifar10": {"epochs": 600, "batch_size": 96, "learning_rate": 0.1, "weight_decay": 3e-4},
    "imagenet": {"epochs": 120, "batch_size": 1024, "learning_rate": 0.5, "weight_decay": 4e-5},
    "digits": {"epochs": 10, "batch_size": 32, "learning_rate": 0.1, "weight_decay": 3e-4},
}
RECIPES["folder"] = RECIPES["cifar10"]
# Of a single architecture; compared with the supernet's in img/README.md, "The choice alone".
ALONE = {"lr_schedule": "cosine", "weight_decay": 5e-4, "norm_weight_decay": 5e-4}
RECIPES["imagenet"]["label_smoothing"], RECIPES["digits"]["momentum"] = 0.1, 0.8
RUN_FILES = ("args.json", "log.txt", "metrics.csv", "last.pth", "training.png", "result.json")
RUN_FILES += ("model.pt2",)
# Flags of one command, which --resume does not take over, and flags that may change on --resume.
# All others determine the result.
COMMAND = {"exp_name", "out_dir", "resume", "overwrite", "no_cuda_graphs"}
CHANGEABLE = {"data_dir", "device", "workers", "val_interval"}
EVALUATION_BATCH = 250
CHECK_EVERY = 100  # steps between two checks of the loss, which synchronise with the device


def build_parser() -> ArgumentParser:
    """The parser; defaults that depend on other flags come from `parse_args`."""
    parser = utils.new_parser("Trains the supernet, or with --choice one architecture alone.")
    add = parser.add_argument
    add("--exp_name", type=nonempty, default="spos_cifar10", help="the run's folder in OUT_DIR")
    add("--out_dir", type=user_path, default="runs", help="parent folder of the runs")
    add("--dataset", choices=list(IMAGE_SIZES), help="data set; digits needs no download")
    add("--data_dir", type=absolute_path, help="where the data set is, or is downloaded to")
    add("--image_size", type=number(int, 8), help="pixels; above 64 selects the ImageNet network")
    add("--space", choices=list(SPACES), help="search space, see SPACES in model.py")
    add("--epochs", type=number(int, 1), help="training epochs")
    add("--batch_size", type=number(int, 1), help="images per step, over all GPUs")
    add("--learning_rate", type=number(float, 0), help="initial learning rate")
    add("--lr_schedule", choices=("linear", "cosine"), default="linear", help="decay to 0, by step")
    add("--momentum", type=number(float, 0, 1), default=0.9, help="momentum of SGD")
    add("--weight_decay", "--weight-decay", type=number(float, 0), help="decay of the weights")
    norms = "decay of BatchNorm's scales and shifts, of a single architecture"
    add("--norm_weight_decay", type=number(float, 0), default=0.0, help=norms)
    add("--label_smoothing", type=number(float, 0, 1), default=0.0, help="label smoothing")
    add("--cutout", type=number(int, 0), default=0, help="Cutout size in pixels; 0: none")
    add("--choice", type=user_path, help="train one architecture: 1-0-3-..., or a search.json")
    add("--train_on", choices=("train", "all"), default="train", help="all: the search split too")
    add("--val_interval", type=number(int, 1), default=1, help="epochs between validations")
    either = parser.add_mutually_exclusive_group()
    either.add_argument("--init", choices=INITS, help="initial weights")
    either.add_argument("--init_from", type=user_path, help="a supernet's last.pth, for --choice")
    either = parser.add_mutually_exclusive_group()
    either.add_argument("--resume", action="store_true", help="continue with the run's settings")
    either.add_argument("--overwrite", action="store_true", help="delete the run and start again")
    return parser


def recipe(given: dict) -> dict:
    """The defaults for a data set, an image size, and a supernet or a single architecture."""
    dataset, stand_alone = given["dataset"], "choice" in given
    size = given.get("image_size", IMAGE_SIZES[dataset])
    values = RECIPES[dataset] | {"image_size": size} | defaults(size)
    if dataset in ("cifar10", "folder"):
        if given.get("init", values["init"]) == "official":
            values["learning_rate"] = 0.025
        values["cutout"] = size // 2 if stand_alone and size <= RESIDENT_SIDE else 0
        values |= ALONE if stand_alone else {}
    if dataset == "imagenet" and stand_alone:
        values["epochs"] = 240
    if "init_from" in given:
        values["init"] = None
    return values


def parse_args(argv: Sequence[str] | None) -> tuple[Namespace, dict | None]:
    """The settings of the run and, with --resume, its checkpoint.

    A flag that is not given has its value from the checkpoint, else from the search.json of
    --choice, else from the recipe of the data set.
    """
    argv, parser = list(sys.argv[1:] if argv is None else argv), build_parser()
    given, _ = parser.parse_known_args(argv)
    inherited = {"dataset": "cifar10", "data_dir": "./data", "supernet_accuracy": None}
    found = utils.on_rank_zero(
        lambda: utils.read_json(Path(given.choice)) if os.path.isfile(given.choice or "") else None
    )
    if found is not None:
        if "accuracy" not in found:
            raise UserError(f"{given.choice} is no search.json: it lacks 'accuracy'")
        argv += ["--choice", found["choice"]]  # the file stands for the choice in it
        inherited = {name: found[name] for name in ("dataset", "data_dir", "image_size", "space")}
        inherited["supernet_accuracy"] = found["accuracy"]
    asked = {name: value for name, value in vars(given).items() if value is not None}
    # The recipe depends on the other two: it is for a data set, an image size, a kind of network.
    parser.set_defaults(**recipe(inherited | asked) | inherited)
    parser.add_argument("-h", "--help", action="help", help="show this message and exit")

    last, recorded = Path(given.out_dir, given.exp_name, "last.pth"), {}
    checkpoint = utils.on_rank_zero(
        lambda: records.load_checkpoint(last) if given.resume and last.exists() else None
    )
    if checkpoint:
        recorded = {n: v for n, v in checkpoint["args"].items() if n not in COMMAND}
    args = parser.parse_args(argv, Namespace(**recorded))
    if args.space not in SPACES:
        source = last if checkpoint else given.choice
        raise UserError(f"{source} has the space {args.space}, which is not in SPACES (model.py)")
    args.space_layout = asdict(SPACES[args.space])
    advice = "a run keeps its settings: drop the flag, or take another --exp_name"
    utils.check_unchanged(recorded, vars(args), recorded.keys() - CHANGEABLE, str(last), advice)
    if found:
        check_space(found, args, given.choice)
    if args.choice is None and (args.init_from or args.train_on == "all"):
        parser.error("--init_from and --train_on all need --choice")
    if args.dataset == "cifar10" and args.image_size != 32:
        parser.error("--image_size: the images of cifar10 have 32 pixels")
    if args.cutout and args.image_size > RESIDENT_SIDE:
        parser.error(f"--cutout needs images of at most {RESIDENT_SIDE} pixels")
    if args.cutout >= args.image_size:
        parser.error(f"--cutout {args.cutout} would blank images of {args.image_size} pixels")
    return args, checkpoint


def check_space(recorded: dict, args: Namespace, what: str) -> None:
    """Raises UserError if `what` has another search space, or the same one with other blocks."""
    advice = "take that space, or restore it in model.py"
    utils.check_unchanged(recorded, vars(args), ["space", "space_layout"], what, advice)


def main(argv: Sequence[str] | None = None) -> None:
    """Prepares a run or the rest of one, trains, and tests a single architecture at the end."""
    args, checkpoint = parse_args(argv)
    folder = Path(args.out_dir, args.exp_name)
    check_network(args)
    with utils.locked(folder):
        if utils.rank() == 0:
            check_folder(folder, args)
        rows = checkpoint["metrics"] if checkpoint else []
        device = utils.pick_device(args.device)
        args.precision = utils.pick_precision(args.precision, device)
        dataset = load_dataset(args.dataset, args.data_dir, args.image_size, args.workers)
        if checkpoint:
            dataset.check_same(checkpoint["data"], str(folder / "last.pth"))
        batches = load_batches(dataset, args, device)
        model = build_model(dataset, args, checkpoint)
        model.place(device, batches["train"].memory_format)
        optimizer = build_optimizer(model, args, checkpoint)

        if checkpoint is None and utils.rank() == 0:
            for name in RUN_FILES:
                (folder / name).unlink(missing_ok=True)
        utils.open_log(folder / "log.txt")
        if args.resume:
            log.info(f"resuming after epoch {len(rows)}" if checkpoint else "no checkpoint yet")
        about = {"torch": torch.__version__, "device_name": utils.describe_device(device)}
        log.info(f"device    {about['device_name']}, {args.precision}, torch {about['torch']}")
        sizes = ", ".join(f"{len(split.labels):,} {name}" for name, split in batches.items())
        shape = f"{dataset.image_size} px, {len(dataset.classes)} classes"
        log.info(f"data      {dataset.name}, {shape}: {sizes} images")
        for note in dataset.notes:
            log.info(f"data      {note}")
        kind = "supernet" if args.choice is None else f"architecture {args.choice}"
        count = sum(p.numel() for p in model.parameters())
        weights = f"initial weights: {args.init or args.init_from}"
        log.info(f"network   {args.space}, {kind}, {count:,} parameters, {weights}")
        if utils.rank() == 0:
            utils.write_json(folder / "args.json", vars(args) | about)

        train(model, batches, optimizer, args, rows)
        if args.choice is None:
            command = ["python", "random_search.py", "--ckpt", str(folder / "last.pth")]
            log.info(f"next: {shlex.join(command)}")
            return
        test(folder / "result.json", model, batches["test"], args)
        if utils.rank() == 0:
            export(folder / "model.pt2", model, records.parse_choice(args.choice), dataset)


def train(
    model: Supernet, batches: dict[str, Batches], optimizer: SGD, args: Namespace, rows: list[dict]
) -> None:
    """Trains the epochs that `rows` lacks; each adds a row, a checkpoint and a line of the log.

    Raises UserError if the loss or a weight stops being finite.
    """
    folder, images, space = Path(args.out_dir, args.exp_name), batches["train"], SearchSpace(model)
    steps, first_epoch, stand_alone = images.steps(), len(rows), args.choice is not None
    validated_on = "search split" if stand_alone else "random paths"
    if not stand_alone:
        log.info("validation: random paths, augmented images, batch statistics (to monitor only)")
    graphs, steps_left = "not used: --no_cuda_graphs", steps * (args.epochs - first_epoch)
    if not args.no_cuda_graphs:
        with utils.autocast(args.precision, images.device):
            graphs = capture_blocks(model, images.blank(utils.world_size()), steps_left)
    log.info(f"graphs    {graphs}")
    network = model
    if utils.world_size() > 1:
        # All ranks draw the same path, so weights that are unused on one are unused on all.
        network = DistributedDataParallel(model, find_unused_parameters=True)
        # Not as an argument, which would leave out the first broadcast too. Later ones: see below.
        network.broadcast_buffers = False
    if rows and utils.rank() == 0:  # a kill or a copy may have lost these files
        records.write_csv(folder / "metrics.csv", rows)
        draw(plot_training, rows, folder / "training.png", validated_on)
    start = time.monotonic()
    for epoch in range(first_epoch, args.epochs):
        epoch_start = time.monotonic()

        # Train. Paths, order and augmentation depend on (seed, epoch) alone: --resume repeats them.
        network.train()
        dropout = utils.named_rng(args.seed, f"dropout {epoch} {utils.rank()}")
        torch.manual_seed(dropout.getrandbits(63))
        random.seed(dropout.getrandbits(63))  # a user's block may drop paths by these
        np.random.seed(dropout.getrandbits(32))
        rng, losses, hits = utils.named_rng(args.seed, f"train {epoch}"), [], []
        epoch_images = images.epoch(args.seed, epoch, args.cutout)
        for step, (x, y) in enumerate(utils.progress(epoch_images, f"epoch {epoch + 1}", steps)):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(args, (epoch + step / steps) / args.epochs)
            # A single path, drawn uniformly, the same on every rank; alone, there is one to draw.
            choice = space.sample(rng)
            # With zero gradients, momentum and weight decay would still update the other blocks.
            optimizer.zero_grad(set_to_none=True)
            with utils.autocast(args.precision, images.device):
                logits = network(x, choice)
            loss = F.cross_entropy(logits, y, label_smoothing=args.label_smoothing)
            loss.backward()
            optimizer.step()
            # Kept on the device; .item() would synchronise every step.
            losses.append(loss.detach())
            hits.append((logits.argmax(1) == y).float().mean())
            if (step + 1) % CHECK_EVERY == 0 or step + 1 == steps:
                check_finite(losses, epoch)
        statistics = [norm.running_mean for norm in tracked_norms(model)]
        if not all(tensor.isfinite().all() for tensor in [*model.parameters(), *statistics]):
            raise UserError(f"weights not finite after epoch {epoch + 1}; lower --learning_rate")
        means = torch.stack((torch.stack(losses).mean(), torch.stack(hits).mean()))
        loss, accuracy = (utils.all_reduce(means) / utils.world_size()).tolist()
        row = {"epoch": epoch + 1, "lr": learning_rate(args, epoch / args.epochs)}
        row |= {"train_loss": loss, "train_acc": 100 * accuracy, "val_loss": None, "val_acc": None}
        for buffer in model.buffers() if utils.world_size() > 1 else ():
            dist.broadcast(buffer, src=0)  # each rank has the statistics of its own images

        # Validate. A supernet's running statistics mix all paths and fit none, so random paths are
        # normalised by the statistics of each batch.
        last_epoch = epoch + 1 == args.epochs
        if args.train_on == "train" and ((epoch + 1) % args.val_interval == 0 or last_epoch):
            rng = utils.named_rng(args.seed, "validation")  # the same paths in every epoch
            paths = [space.sample(rng) for _ in range(len(batches["search"]))]
            result = evaluate(model, batches["search"], paths, batch_statistics=not stand_alone)
            row["val_loss"], row["val_acc"] = result["loss"], result["top1"]
        row["seconds"] = round(time.monotonic() - epoch_start, 3)
        rows.append(row)

        # Record. A checkpoint holds the whole table, so a kill between two files loses nothing.
        if utils.rank() == 0:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            state |= {"epoch": epoch + 1, "args": vars(args), "metrics": rows}
            state["data"] = images.dataset.metadata()
            records.save_checkpoint(folder / "last.pth", state)
            records.write_csv(folder / "metrics.csv", rows)
            if (epoch + 1) % max(1, args.epochs // 50) == 0 or last_epoch:
                draw(plot_training, rows, folder / "training.png", validated_on)
        line = f"epoch {epoch + 1:{len(str(args.epochs))}}/{args.epochs}  lr {row['lr']:.5f}"
        line += f"  train loss {loss:.4f} top-1 {row['train_acc']:5.2f}%"
        if row["val_acc"] is not None:
            line += f"  {validated_on} loss {row['val_loss']:.4f} top-1 {row['val_acc']:5.2f}%"
        left = (time.monotonic() - start) / (epoch + 1 - first_epoch) * (args.epochs - epoch - 1)
        log.info(f"{line}  {utils.duration(row['seconds'])}  left {utils.duration(left)}")
    release_blocks(model)


def check_folder(folder: Path, args: Namespace) -> None:
    """Raises UserError if the folder holds files that the command would delete unasked."""
    if (folder / "paths.csv").exists():
        raise UserError(f"{folder} is the folder of a search; take another --exp_name")
    files = utils.files_to_keep(folder, RUN_FILES, "exp_name")
    if files and not args.overwrite and not (args.resume and (folder / "last.pth").exists()):
        advice = "--resume continues from a last.pth, --overwrite deletes the run"
        raise UserError(f"{files[0]} exists: {advice}; or take another --exp_name")


def load_batches(dataset: ImageData, args: Namespace, device: torch.device) -> dict[str, Batches]:
    """Batches of the three splits; --train_on all adds the search split to the training images."""
    train, search, ranks = dataset.train, dataset.search, utils.world_size()
    if args.train_on == "all":
        train += search
    if ranks > 1 and (args.batch_size % ranks or args.batch_size > len(train)):
        limits = f"a multiple of the {ranks} ranks and at most {len(train)}, the training images"
        raise UserError(f"--batch_size {args.batch_size}, over all ranks, must be {limits}")
    # Shuffle: folders are sorted by class, and a one-class batch has skewed statistics.
    rng = utils.named_rng(args.seed, "validation order")
    search = search.subset(rng.sample(range(len(search)), len(search)))
    sizes = {"train": args.batch_size, "search": EVALUATION_BATCH, "test": EVALUATION_BATCH}
    splits = {"train": train, "search": search, "test": dataset.test}
    how = device, args.workers, args.precision
    batches = {name: Batches(dataset, splits[name], sizes[name], *how) for name in splits}
    if args.choice is None:
        # BatchNorm statistics of plain images, without the dark borders of shifted ones, do not fit
        # a supernet's weights: they cost 8.6 points of top-1 (img/README.md).
        batches["search"] = batches["search"].augmented(args.cutout)
    return batches


def new_network(classes: int, args: Namespace) -> Supernet:
    """A network with initial weights; raises ValueError if --choice is none of the space."""
    choice, space = args.choice and records.parse_choice(args.choice), SPACES[args.space]
    return Supernet(classes, args.image_size, choice is not None, choice, args.init, space)


def check_network(args: Namespace) -> None:
    """Raises UserError if --choice or a candidate is wrong, before any work."""
    try:
        _ = SearchSpace(new_network(1, args)).costs  # checks the contract of the candidates
    except (ArithmeticError, RuntimeError, TypeError, ValueError) as error:
        where = f"--space {args.space}" if args.choice is None else f"--choice {args.choice}"
        raise UserError(f"{where}: {error}") from None


def build_model(dataset: ImageData, args: Namespace, checkpoint: dict | None) -> Supernet:
    """The network with the weights of a checkpoint, or initial ones that depend on --seed alone.

    Raises UserError if the weights of --init_from do not fit.
    """
    torch.manual_seed(args.seed)
    model = new_network(len(dataset.classes), args)
    if checkpoint is not None:
        model.load_state_dict(checkpoint["model"])
    elif args.init_from:
        supernet = records.load_checkpoint(Path(args.init_from))
        check_space(supernet["args"], args, args.init_from)
        try:
            model.load_path(supernet["model"])
        except (RuntimeError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"--init_from {args.init_from}: {reason}") from None
    return model


def build_optimizer(model: Supernet, args: Namespace, checkpoint: dict | None) -> SGD:
    """SGD, with the momentum of a checkpoint; scales and shifts have their own decay."""
    weights = [p for p in model.parameters() if p.ndim > 1]
    scales = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": weights}, {"params": scales, "weight_decay": args.norm_weight_decay}]
    settings = {"lr": args.learning_rate, "momentum": args.momentum}
    optimizer = SGD(groups, **settings, weight_decay=args.weight_decay, fused=True)
    # Fused SGD needs all momentum buffers or none; zeros are equivalent to none.
    for weight in weights + scales:
        optimizer.state[weight]["momentum_buffer"] = torch.zeros_like(weight)
    if checkpoint is not None:
        optimizer.load_state_dict(checkpoint["optimizer"])
    return optimizer


def learning_rate(args: Namespace, done: float) -> float:
    """The rate after a share of all steps, from 0 to 1."""
    linear = args.lr_schedule == "linear"
    return args.learning_rate * (1 - done if linear else (1 + math.cos(math.pi * done)) / 2)


def check_finite(losses: list[Tensor], epoch: int) -> None:
    """Raises UserError with the first step of the epoch whose loss is not finite on some rank."""
    total = utils.all_reduce(torch.stack(losses))
    if bad := (~total.isfinite()).nonzero().flatten().tolist():
        where = f"in epoch {epoch + 1}, step {bad[0] + 1}"
        raise UserError(f"the loss is {total[bad[0]].item()} {where}; lower --learning_rate")


@torch.inference_mode()
def evaluate(
    model: Supernet, batches: Batches, paths: Sequence[Choice], batch_statistics: bool = False
) -> dict[str, float]:
    """Mean loss, top-1 and top-5 accuracy in percent, batch i through paths[i], in fp32.

    batch_statistics: whether BatchNorm uses those of each batch, as in training, instead of the
    running ones. No buffer changes.
    """
    model.eval()
    norms = tracked_norms(model)
    for norm in norms:
        norm.train(batch_statistics)
        norm.track_running_stats = not batch_statistics  # else the buffers would be updated
    totals = torch.zeros(3, device=batches.device)
    for i, (x, y) in batches.for_this_rank():
        logits = model(x, paths[i])
        hits = logits.topk(min(5, logits.shape[1])).indices == y[:, None]
        loss = F.cross_entropy(logits, y, reduction="sum")
        totals += torch.stack((loss, hits[:, 0].sum(), hits.sum()))
    for norm in norms:
        norm.track_running_stats = True
    loss, top1, top5 = (utils.all_reduce(totals) / len(batches.labels)).tolist()
    return {"loss": loss, "top1": 100 * top1, "top5": 100 * top5}


def export(file: Path, model: Supernet, choice: Choice, dataset: ImageData) -> None:
    """Writes a network that torch alone loads and runs: uint8 (N, 3, S, S) -> logits, for any N."""
    network = Classifier(model.path(choice), dataset.mean, dataset.std)
    network = network.to("cpu", memory_format=torch.contiguous_format).eval()
    images = torch.zeros(2, 3, model.image_size, model.image_size, dtype=torch.uint8)
    shapes = ({0: torch.export.Dim("N")},)
    try:
        with torch.no_grad():
            program = torch.export.export(network, (images,), dynamic_shapes=shapes)
    except Exception as error:  # a block with control flow that depends on the data
        log.info(f"warning: no {file.name}: {str(error).strip().partition(chr(10))[0]}")
        return
    with utils.atomic_write(file) as temporary, open(temporary, "wb") as opened:
        torch.export.save(program, opened)


def test(file: Path, model: Supernet, images: Batches, args: Namespace) -> None:
    """Measures a single architecture on the test images, once, and writes result.json."""
    space, choice = SearchSpace(model), records.parse_choice(args.choice)
    measured, count = evaluate(model, images, [choice] * len(images)), len(images.labels)
    accuracy, error = measured["top1"], records.standard_error(measured["top1"], count)
    result = {"choice": args.choice, "test_accuracy": accuracy, "standard_error": error}
    result |= {"test_images": count, "test_top5": measured["top5"]}
    result["classes"] = images.dataset.classes
    result |= {"flops_m": space.flops(choice) / 1e6, "params_m": space.params(choice) / 1e6}
    settings = "dataset", "train_on", "epochs", "seed", "supernet_accuracy"
    if utils.rank() == 0:
        utils.write_json(file, result | {name: getattr(args, name) for name in settings})
    costs = f"{result['flops_m']:.1f}M multiply-adds, {result['params_m']:.2f}M parameters"
    log.info(f"test      top-1 {accuracy:.2f}% ± {error:.2f} on {count:,} images, {costs}")


if __name__ == "__main__":
    utils.run_script(main)
