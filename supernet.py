"""Trains the supernet by uniform single-path sampling, or with --choice one architecture alone, by the same loop.

Guo et al., arXiv 1904.00420, section 3.2: every step draws one path uniformly and trains only that path.
"""

import argparse
import copy
import math
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from data.datasets import IMAGE_SIZES, Dataset, load_dataset
from data.loaders import Batches
from img.plots import plot_training
from model import INITS, LAYERS, NAMES, Choice, Classifier, Supernet, default_init, parse_choice
from utils import (
    RUN_FILES,
    SEARCH_FILES,
    UserError,
    add_up,
    autocast,
    bar,
    delete_files,
    describe_device,
    duration,
    explicit_flags,
    load_checkpoint,
    load_supernet,
    log,
    make_folder,
    memory_format,
    new_parser,
    number,
    on_first,
    open_log,
    pick_device,
    pick_precision,
    rank,
    ranks,
    read_json,
    refuse_changes,
    replacing,
    run_script,
    save_checkpoint,
    share_buffers,
    standard_error,
    stream,
    write_csv,
    write_json,
)

# Digits' and CIFAR-10's rates suit weights near the identity (README, "Initial weights near the identity"); the rest of
# CIFAR-10's is ShunLu91/Single-Path-One-Shot-NAS's at 6940c9b as it was meant. ImageNet's are the official code's.
SHARED = {"momentum": 0.9, "label_smoothing": 0.0, "lr_schedule": "linear", "cutout": 0}
CIFAR10 = SHARED | {"epochs": 600, "batch_size": 96, "learning_rate": 0.1, "weight_decay": 3e-4}
OFFICIAL_RATE = 0.025  # of CIFAR-10 and folders with the official initial weights
IMAGENET = SHARED | {
    "epochs": 120,
    "batch_size": 1024,
    "learning_rate": 0.5,
    "weight_decay": 4e-5,
    "label_smoothing": 0.1,
}
DIGITS = SHARED | {"epochs": 10, "batch_size": 32, "learning_rate": 0.1, "weight_decay": 3e-4, "momentum": 0.8}
PRESETS = {  # (data set, alone): defaults
    ("cifar10", False): CIFAR10,
    ("cifar10", True): CIFAR10 | {"cutout": 16},
    ("folder", False): CIFAR10,
    ("folder", True): CIFAR10 | {"cutout": 16},
    ("imagenet", False): IMAGENET,
    ("imagenet", True): IMAGENET | {"epochs": 240},
    ("digits", False): DIGITS,
    ("digits", True): DIGITS,
}
# What may differ between a run and its continuation; everything else decides what is learned.
FREE = {"data_dir", "device", "workers", "val_interval", "resume", "overwrite", "out_dir", "exp_name"}
Network = Supernet | DistributedDataParallel
METRICS = ["epoch", "lr", "train_loss", "train_acc", "val_loss", "val_acc", "seconds"]
EVALUATION_BATCH = 250
CHECK_EVERY = 100  # steps between two looks at the loss, which wait for the device


def build_parser(argv: Sequence[str] | None = None) -> argparse.ArgumentParser:
    """The parser, with the defaults that suit the data set and kind of network which argv asks for."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--dataset", default="cifar10")
    first.add_argument("--choice")
    first.add_argument("--init")
    first.add_argument("--image_size", type=float, default=0)
    asked, _ = first.parse_known_args(argv)

    parser = new_parser(__doc__.splitlines()[0])
    add = parser.add_argument
    add("--exp_name", type=folder_name, default="spos_cifar10", help="names the run's folder OUT_DIR/EXP_NAME")
    add("--out_dir", default="runs", help="parent of the run folders")
    add("--dataset", choices=list(IMAGE_SIZES), default="cifar10", help="what to train on; digits needs no download")
    add("--image_size", type=number(int, 8), help="side of the images in pixels; above 64 the network is ImageNet's")
    add("--epochs", type=number(int, 1), help="passes over the training images")
    add("--batch_size", type=number(int, 1), help="images a step")
    add("--learning_rate", type=number(float, above=0), help="of SGD, at the start")
    add("--momentum", type=number(float, 0, 1), help="of SGD")
    add("--weight_decay", "--weight-decay", type=number(float, 0), help="of convolution and classifier weights")
    add("--label_smoothing", type=number(float, 0, 1), help="probability spread over all classes in training")
    add("--init", choices=INITS, help="initial weights (default: identity up to 64 px, official above)")
    add("--lr_schedule", choices=("linear", "cosine"), help="how the learning rate falls to 0, step by step")
    add(
        "--cutout",
        type=number(int, 0),
        nargs="?",
        const=16,
        help="side of a square set to the mean; alone: 16; 0: none",
    )
    add("--choice", help="train this architecture alone: 20 numbers like 1-0-3-..., or a search.json")
    add(
        "--init_from", help="a supernet's last.pth, whose weights of that path training starts from; with --choice only"
    )
    add("--train_on", choices=("train", "all"), default="train", help="all adds the search split; with --choice only")
    add("--val_interval", type=number(int, 1), default=1, help="epochs between validations; the last has one anyway")
    add("--resume", action="store_true", help="go on with the run in that folder; its own settings hold")
    add("--overwrite", action="store_true", help="delete what a run left in that folder, and begin anew")
    parser.set_defaults(**PRESETS.get((asked.dataset, asked.choice is not None), CIFAR10))
    parser.set_defaults(image_size=IMAGE_SIZES.get(asked.dataset, 32))
    if asked.dataset in ("cifar10", "folder") and (asked.init or default_init(asked.image_size)) == "official":
        parser.set_defaults(learning_rate=OFFICIAL_RATE)
    return parser


def folder_name(text: str) -> str:
    """An argparse type: a name that stays inside its parent folder on every system."""
    if not text.strip(". ") or text[-1] in ". " or any(c in '<>:"/\\|?*' or ord(c) < 32 for c in text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a plain folder name")
    return text


def parse_args(argv: Sequence[str] | None) -> tuple[argparse.Namespace, dict | None]:
    """The run's settings and, with --resume, the checkpoint they come from."""
    parser = build_parser(argv)
    args = parser.parse_args(argv)
    if args.resume and args.overwrite:
        parser.error("--resume goes on with a run and --overwrite deletes it; give one of them")
    if args.train_on == "all" and args.choice is None:
        parser.error("--train_on all needs --choice: a supernet's search split must stay out of its training")
    if args.init_from and args.choice is None:
        parser.error("--init_from needs --choice: it takes one path's weights out of a supernet")
    if args.init_from and args.init:
        parser.error("--init and --init_from both say where the initial weights come from; give one of them")
    if args.init_from is None:
        args.init = args.init or default_init(args.image_size)
    if args.dataset == "cifar10" and args.image_size != 32:
        parser.error("--image_size: the images of cifar10 have 32 pixels")
    args.supernet_accuracy = None
    if args.choice is not None:
        args.choice, args.supernet_accuracy = read_choice(args.choice)
    last = Path(args.out_dir, args.exp_name, "last.pth")
    if not (args.resume and last.exists()):
        return args, None
    checkpoint = load_checkpoint(last)
    if "init" not in checkpoint["args"]:
        if checkpoint["args"]["dataset"] != "imagenet" and checkpoint["epoch"] < checkpoint["args"]["epochs"]:
            raise UserError(
                f"{last} is of an earlier version, whose learning rate fell per epoch and now falls per step; "
                "begin anew with --overwrite, or finish the run with that version"
            )
        checkpoint["args"]["init"] = None if checkpoint["args"].get("init_from") else "official"
    given = {name: getattr(args, name) for name in explicit_flags(build_parser(argv), argv)}
    fixed = {
        name: value for name, value in given.items() if name not in FREE and (name, value) != ("precision", "auto")
    }
    refuse_changes(checkpoint["args"], fixed, str(last), "leave the flag out to go on, or take another --exp_name")
    free = {name: getattr(args, name) for name in FREE if name in given or name not in checkpoint["args"]}
    return argparse.Namespace(**checkpoint["args"] | free), checkpoint


def read_choice(text: str) -> tuple[str, float | None]:
    """The choice as 1-0-3-..., and its accuracy in the supernet if `text` is the path of a search.json."""
    accuracy = None
    if Path(text).is_file():
        found = read_json(Path(text))
        if not isinstance(found, dict) or not {"choice", "accuracy"} <= found.keys():
            raise UserError(f"{text} holds no choice; is it a search.json of random_search.py?")
        text, accuracy = found["choice"], found["accuracy"]
    numbers = str(text).replace(",", "-").split("-")
    if len(numbers) != LAYERS or not all(n.strip() in map(str, range(len(NAMES))) for n in numbers):
        raise UserError(f"--choice {text} is neither {LAYERS} numbers from 0 to 3, like 1-0-3-..., nor a file")
    return "-".join(n.strip() for n in numbers), accuracy


def learning_rate(args: argparse.Namespace, done: float) -> float:
    """The rate after a share of all steps, from 0 to 1."""
    return args.learning_rate * (1 - done if args.lr_schedule == "linear" else (1 + math.cos(math.pi * done)) / 2)


def build_optimizer(model: Supernet, args: argparse.Namespace, state: dict | None = None) -> torch.optim.SGD:
    """SGD with weight decay on convolutions and classifier, and none on BatchNorm's scales and shifts.

    state: of an optimizer that is to go on.
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


def parallel(model: Supernet) -> Network:
    """The network to train with: under torchrun a wrapper that averages the ranks' gradients."""
    if ranks() == 1:
        return model
    # All ranks draw the same path, so what is unused on one is unused on all: its gradient stays None.
    return DistributedDataParallel(model, find_unused_parameters=True, forward_sync_buffers=False)


def bare(network: Network) -> Supernet:
    """The supernet inside of what `parallel` made."""
    return network.module if isinstance(network, DistributedDataParallel) else network


def train_epoch(
    network: Network, batches: Batches, optimizer: torch.optim.SGD, args: argparse.Namespace, epoch: int
) -> tuple[float, float]:
    """One pass over the training images, a new path at every step; returns mean loss and top-1 accuracy in percent.

    epoch: how many are finished. Raises UserError with epoch and step if the loss or a weight stops being finite.
    """
    network.train()
    rng = stream(args.seed, f"train {epoch}")
    steps, losses, hits = batches.steps(), [], []
    images = batches.epoch(args.seed, epoch, args.cutout)
    for step, (x, y) in enumerate(bar(images, f"epoch {epoch + 1}", steps)):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(args, (epoch + step / steps) / args.epochs)
        choice = bare(network).sample_choice(rng)
        optimizer.zero_grad(set_to_none=True)  # a zero gradient would let momentum and decay move idle blocks
        with autocast(args.precision, batches.device):
            logits = network(x, choice)
        loss = F.cross_entropy(logits, y, label_smoothing=args.label_smoothing)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
        hits.append((logits.argmax(1) == y).float().mean())
        if (step + 1) % CHECK_EVERY == 0 or step + 1 == steps:
            check_finite(add_up(torch.stack(losses)), epoch)
    if not all(value.isfinite().all() for value in network.state_dict().values()):
        raise UserError(f"the weights are no longer finite after epoch {epoch + 1}; lower --learning_rate")
    loss, accuracy = add_up(torch.stack((torch.stack(losses).mean(), torch.stack(hits).mean()))).tolist()
    return loss / ranks(), 100 * accuracy / ranks()


def check_finite(losses: Tensor, epoch: int) -> None:
    """Raises UserError with the first step of the epoch whose loss is not finite; losses: one for each step so far."""
    bad = (~losses.isfinite()).nonzero().flatten().tolist()
    if bad:
        raise UserError(
            f"the loss is {losses[bad[0]].item()} in epoch {epoch + 1}, step {bad[0] + 1}; lower --learning_rate "
            "(the checkpoint of the last whole epoch, if there is one, is unharmed)"
        )


@torch.inference_mode()
def evaluate(
    model: Supernet, batches: Batches, paths: Sequence[Choice], own_statistics: bool = False
) -> dict[str, float]:
    """Mean loss, top-1 and top-5 accuracy in percent, batch i through paths[i]; changes no buffer.

    own_statistics: whether BatchNorm uses those of each batch, as in training, instead of the running ones.
    """
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    model.train(own_statistics)
    for norm in norms:
        norm.track_running_stats = not own_statistics  # without it, training mode leaves the buffers alone
    totals = torch.zeros(3, device=batches.device)
    for i, (x, y) in batches.share():
        logits = model(x, paths[i])
        hits = logits.topk(min(5, logits.shape[1])).indices == y[:, None]
        totals += torch.stack((F.cross_entropy(logits, y, reduction="sum"), hits[:, 0].sum(), hits.sum()))
    for norm in norms:
        norm.track_running_stats = True
    loss, top1, top5 = (add_up(totals) / len(batches.labels)).tolist()
    return {"loss": loss, "top1": 100 * top1, "top5": 100 * top5}


def random_paths(model: Supernet, batches: Batches, seed: int) -> list[Choice]:
    """A fixed path for every batch; always the same one if the model is a single architecture."""
    rng = stream(seed, "validation")
    return [model.sample_choice(rng) for _ in range(len(batches))]


def check_folder(folder: Path, args: argparse.Namespace) -> None:
    """Makes the run's folder; raises UserError if it cannot, or if a run is there that nobody asked to touch."""
    kept = [folder / name for name in ("last.pth", "metrics.csv", "result.json") if (folder / name).exists()]
    if kept and not (args.resume or args.overwrite):
        raise UserError(
            f"{kept[0]} exists: --resume goes on with that run, --overwrite deletes it, or take another --exp_name"
        )
    make_folder(folder, "--out_dir")


def load_batches(dataset: Dataset, args: argparse.Namespace, device: torch.device) -> dict[str, Batches]:
    """Batches of the three splits; with --train_on all the search split is trained on as well."""
    train = dataset.train + dataset.search if args.train_on == "all" else dataset.train
    if ranks() > 1 and (args.batch_size % ranks() or args.batch_size > len(train)):
        raise UserError(
            f"--batch_size {args.batch_size} is that of all {ranks()} ranks together: take a multiple of {ranks()}, "
            f"at most the {len(train)} training images"
        )
    # A batch of one class only, as folders come in order, would be normalised by statistics of that class.
    order = stream(args.seed, "validation order").sample(range(len(dataset.search)), len(dataset.search))
    sizes = {"train": args.batch_size, "search": EVALUATION_BATCH, "test": EVALUATION_BATCH}
    splits = {"train": train, "search": dataset.search.subset(order), "test": dataset.test}
    how = device, args.workers, args.precision
    return {name: Batches(dataset, splits[name], sizes[name], *how) for name in splits}


def build_model(dataset: Dataset, args: argparse.Namespace, device: torch.device) -> Supernet:
    """The network with its initial weights, which depend on --seed alone."""
    torch.manual_seed(args.seed)
    choice = parse_choice(args.choice) if args.choice else None
    model = Supernet(len(dataset.classes), dataset.image_size, choice is not None, choice, args.init)
    return model.to(device, memory_format=memory_format(device, args.precision))


def take_path(model: Supernet, weights: dict[str, Tensor], args: argparse.Namespace) -> None:
    """Gives a single architecture the weights that it has in a supernet; raises UserError if they do not fit."""
    try:
        model.load_path(weights, parse_choice(args.choice))
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"--init_from {args.init_from} does not fit this network ({reason})") from None


def describe(dataset: Dataset, data: dict[str, Batches], model: Supernet, about_device: str) -> None:
    """The first lines of the log."""
    sizes = ", ".join(f"{len(batches.labels):,} {name}" for name, batches in data.items())
    log.info(f"device    {about_device}, torch {torch.__version__}, torchvision {torchvision.__version__}")
    log.info(f"data      {dataset.name}, {dataset.image_size} px, {len(dataset.classes)} classes: {sizes} images")
    log.info(f"network   {sum(p.numel() for p in model.parameters()):,} parameters")
    if len(model.options[0]) > 1:
        log.info("random paths are scored with each batch's own BatchNorm statistics: a sign of progress, no result")


def main(argv: Sequence[str] | None = None) -> None:
    """Trains, validates and records every epoch; a single architecture is measured on the test images at the end."""
    args, checkpoint = parse_args(argv)
    folder = Path(args.out_dir, args.exp_name)
    device = pick_device(args.device)
    args.precision = pick_precision(args.precision, device)
    on_first(lambda: check_folder(folder, args))
    open_log(folder / "log.txt" if checkpoint else None)
    rows = checkpoint["metrics"] if checkpoint else []
    if len(rows) == args.epochs and (args.choice is None or (folder / "result.json").exists()):
        log.info(f"{folder} is complete: {args.epochs} epochs")
        return

    weights = load_supernet(Path(args.init_from))["model"] if args.init_from and checkpoint is None else None
    dataset = load_dataset(args.dataset, args.data_dir, args.image_size, args.workers)
    if checkpoint:
        dataset.adopt(checkpoint["data"], f"{folder / 'last.pth'}")
    data = load_batches(dataset, args, device)
    model = build_model(dataset, args, device)
    if weights is not None:
        take_path(model, weights, args)
    optimizer = build_optimizer(model, args, checkpoint["optimizer"] if checkpoint else None)
    if checkpoint is None:
        if rank() == 0:
            delete_files(folder, RUN_FILES)
            delete_files(folder / "search", SEARCH_FILES)
        open_log(folder / "log.txt")
        if args.resume:
            log.info(f"nothing to resume in {folder}: beginning anew")
    else:
        model.load_state_dict(checkpoint["model"])
        log.info(f"resuming after epoch {len(rows)}")
    describe(dataset, data, model, f"{describe_device(device)}, {args.precision}")
    if rank() == 0:
        about = {"torch": torch.__version__, "device_name": describe_device(device)}
        write_json(folder / "args.json", vars(args) | about)
    train(model, data, optimizer, args, rows, dataset.facts())
    if args.choice:
        if rank() == 0:
            export(folder / "model.pt2", model, parse_choice(args.choice), dataset.mean, dataset.std)
        write_result(folder, model, data, args)
    log.info(f"wrote {', '.join(str(folder / name) for name in RUN_FILES if (folder / name).exists())}")
    if args.choice is None:
        log.info(f"next: python random_search.py --ckpt {folder / 'last.pth'}")


def train(
    model: Supernet,
    data: dict[str, Batches],
    optimizer: torch.optim.SGD,
    args: argparse.Namespace,
    rows: list[dict],
    facts: dict,
) -> None:
    """The epochs that `rows` does not have yet; each one ends with its row, a checkpoint and a line of the log."""
    network, start, begun = parallel(model), time.time(), len(rows)
    while len(rows) < args.epochs:
        rows.append(run_epoch(network, data, optimizer, args, len(rows)))
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        state |= {"epoch": len(rows), "args": vars(args), "data": facts, "metrics": rows}
        if rank() == 0:
            record(Path(args.out_dir, args.exp_name), state, args)
        left = (time.time() - start) / (len(rows) - begun) * (args.epochs - len(rows))
        log.info(f"{epoch_line(rows[-1], args)}  left {duration(left)}")


def record(folder: Path, state: dict, args: argparse.Namespace) -> None:
    """Writes the checkpoint after an epoch, and the table and from time to time the picture of all epochs."""
    rows = state["metrics"]
    save_checkpoint(folder / "last.pth", state)
    write_csv(folder / "metrics.csv", rows, METRICS)
    if len(rows) % max(1, args.epochs // 50) == 0 or len(rows) == args.epochs:
        statistics = ", each batch's own statistics" if args.choice is None else ""
        plot_training(rows, folder / "training.png", validated_on(args) + statistics)


def validated_on(args: argparse.Namespace) -> str:
    """What the validation columns are about: a supernet's are a sign of progress and no score of anything."""
    return "random paths" if args.choice is None else "search split"


def run_epoch(
    network: Network, data: dict[str, Batches], optimizer: torch.optim.SGD, args: argparse.Namespace, epoch: int
) -> dict:
    """Trains one epoch and validates after it if it is time to; returns its row of metrics.csv."""
    start = time.time()
    row = dict.fromkeys(METRICS) | {"epoch": epoch + 1, "lr": learning_rate(args, epoch / args.epochs)}
    row["train_loss"], row["train_acc"] = train_epoch(network, data["train"], optimizer, args, epoch)
    model = bare(network)
    share_buffers(model)
    due = (epoch + 1) % args.val_interval == 0 or epoch + 1 == args.epochs
    if due and args.train_on == "train":
        # A supernet's running statistics mix all paths and suit none of them.
        paths = random_paths(model, data["search"], args.seed)
        result = evaluate(model, data["search"], paths, args.choice is None)
        row["val_loss"], row["val_acc"] = result["loss"], result["top1"]
    return row | {"seconds": round(time.time() - start, 3)}


def epoch_line(row: dict, args: argparse.Namespace) -> str:
    """The epoch's line of the log."""
    line = f"epoch {row['epoch']:{len(str(args.epochs))}}/{args.epochs}  lr {row['lr']:.5f}"
    line += f"  train loss {row['train_loss']:.4f} top-1 {row['train_acc']:5.2f}%"
    if row["val_acc"] is not None:
        line += f"  {validated_on(args)} loss {row['val_loss']:.4f} top-1 {row['val_acc']:5.2f}%"
    return f"{line}  {duration(row['seconds'])}"


def export(path: Path, model: Supernet, choice: Choice, mean: Sequence[float], std: Sequence[float]) -> None:
    """Writes a network that torch alone can load and run: uint8 (N, 3, S, S), any N -> logits (N, classes)."""
    network = Classifier(copy.deepcopy(model.path(choice)), mean, std)
    network = network.to("cpu", memory_format=torch.contiguous_format).eval()
    images = torch.zeros(2, 3, model.image_size, model.image_size, dtype=torch.uint8)
    with torch.no_grad():
        program = torch.export.export(network, (images,), dynamic_shapes=({0: torch.export.Dim("N")},))
    with replacing(path) as temporary, open(temporary, "wb") as file:
        torch.export.save(program, file)


def write_result(folder: Path, model: Supernet, data: dict[str, Batches], args: argparse.Namespace) -> None:
    """Measures a single architecture on the test images, once, and writes result.json."""
    test = data["test"]
    paths = random_paths(model, test, args.seed)
    measured = evaluate(model, test, paths)
    images = len(test.labels)
    result = {"choice": args.choice, "test_accuracy": measured["top1"]}
    result |= {"standard_error": standard_error(measured["top1"], images), "test_images": images}
    if model.head.classifier.out_features >= 100:
        result["test_top5"] = measured["top5"]
    result |= {"flops_m": model.flops(paths[0]) / 1e6, "params_m": model.params(paths[0]) / 1e6}
    result |= {name: getattr(args, name) for name in ("dataset", "train_on", "epochs", "seed", "supernet_accuracy")}
    if rank() == 0:
        write_json(folder / "result.json", result)
    log.info(
        f"test      top-1 {measured['top1']:.2f}% +- {result['standard_error']:.2f} on {images:,} images, "
        f"{result['flops_m']:.1f}M multiply-adds, {result['params_m']:.2f}M parameters"
    )


if __name__ == "__main__":
    run_script(main)
