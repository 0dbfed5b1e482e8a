"""Data sets, splits, batches and augmentation, against plain references, without a network."""

import http.client
import zlib
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import CIFAR10

import data.datasets
import data.loaders
from conftest import noise
from data.datasets import IMAGENET_NORM, ImageData, Split, channel_statistics, load_dataset
from data.loaders import Batches
from utils import UserError

CPU = torch.device("cpu")


@pytest.fixture
def tree(tmp_path):
    """Writes so many PNGs of noise into each folder of a dict; returns folders by pixels."""

    def write(counts):
        origin = {}
        for folder, count in counts.items():
            (tmp_path / folder).mkdir(parents=True, exist_ok=True)
            for i in range(count):
                pixels = noise(8, 8, 3, seed=zlib.crc32(f"{folder} {i}".encode()))
                Image.fromarray(pixels).save(tmp_path / folder / f"{i:03}.png")
                origin[pixels.tobytes()] = folder
        return origin

    return write


def splits(dataset):
    return dataset.train, dataset.search, dataset.test


def assert_origin(dataset, origin, test):
    """Each image has the class and the split of its folder, and none comes twice."""
    seen = []
    for split, folder in zip(splits(dataset), ("train", "train", test), strict=True):
        pixels = [image.permute(1, 2, 0).numpy().tobytes() for image in split.images]
        expected = [f"{folder}/{dataset.classes[label]}" for label in split.labels]
        assert [origin[image] for image in pixels] == expected
        seen += pixels
    assert len(seen) == len(set(seen)) == len(origin)


def refusal(name, root, image_size):
    """The message of the UserError that load_dataset raises; it must be one line."""
    with pytest.raises(UserError) as caught:
        load_dataset(name, str(root), image_size)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


def in_memory(images, name="cifar10", mean=(0.5, 0.4, 0.3)):
    """A data set of these images; the label of an image is its position."""
    split = Split(images, torch.arange(len(images)))
    return ImageData(name, images.shape[-1], [], mean, (0.25, 0.5, 0.2), split, split, split)


def joined(batches):
    """Images and labels of all batches, which must have the memory format of fast kernels."""
    images, labels = zip(*batches, strict=True)
    assert all(part.is_contiguous(memory_format=torch.channels_last) for part in images)
    return torch.cat(images), torch.cat(labels)


def restored(images, dataset):
    """Normalised images (N, 3, S, S) back to values from 0 to 255, by numpy in float64."""
    mean, std = (np.array(value).reshape(3, 1, 1) for value in (dataset.mean, dataset.std))
    return (images.double().numpy() * std + mean) * 255


def test_the_splits_of_digits_hold_each_image_once():
    """The same ones at every call; enlarged bilinearly to three equal channels."""
    with np.load(Path(data.datasets.__file__).with_name("digits.npz")) as arrays:
        raw, labels = arrays["images"], arrays["labels"].tolist()
    levels = np.round(raw * (255 / 16)).astype(np.uint8)  # the values are 0 to 16
    expected = zip([image.tobytes() for image in levels], labels, strict=True)
    small, large = (load_dataset("digits", "unused", size) for size in (8, 16))
    found = []
    for split, enlarged in zip(splits(small), splits(large), strict=True):
        pixels, images = split.images[:, 0].numpy(), enlarged.images.numpy()
        found += zip([image.tobytes() for image in pixels], split.labels.tolist(), strict=True)
        assert torch.equal(split.labels, enlarged.labels)
        assert images.dtype == np.uint8 and (images == images[:, :1]).all()
        unrounded = np.round(pixels * (16 / 255)).astype(np.float32) * np.float32(255 / 16)
        for image, original in zip(images[:, 0], unrounded, strict=True):
            resized = Image.fromarray(original).resize((16, 16), Image.Resampling.BILINEAR)
            assert np.abs(image - np.asarray(resized)).max() <= 0.51
    assert sorted(found) == sorted(expected)
    assert len(small.train) == 1197
    for held in (small.search, small.test):
        assert held.labels.bincount().tolist() == [30] * 10


@pytest.mark.parametrize(("archive", "extracted"), [(False, True), (True, False)])
def test_cifar10_holds_out_a_tenth_of_each_class(cifar, tmp_path, archive, extracted):
    """(pytorch/pytorch#59344, quark0/darts#66, kuangliu/pytorch-cifar#145)"""
    cifar.install(tmp_path, archive, extracted)
    dataset = load_dataset("cifar10", str(tmp_path), 32)
    assert cifar.calls == []
    origin = {}
    for name, rows in cifar.images.items():
        folder = "test" if name == "test_batch" else "train"
        images = rows.reshape(40, 3, 32, 32).transpose(0, 2, 3, 1)
        for image, label in zip(images, cifar.labels[name], strict=True):
            origin[image.tobytes()] = f"{folder}/class {label}"
    assert_origin(dataset, origin, "test")
    assert dataset.search.labels.bincount().tolist() == [2] * 10


@pytest.mark.parametrize("end", [None, http.client.IncompleteRead(b"", 1000)], ids=repr)
def test_a_failed_download_is_one_line_and_can_be_repeated(cifar, tmp_path, end):
    """(pytorch/vision#5039, pytorch/vision#6007, pytorch/pytorch#740)"""
    message = refusal("cifar10", tmp_path, 32)
    for part in (CIFAR10.filename, str(tmp_path), "--dataset digits", "no route to host"):
        assert part in message
    cifar.served, cifar.end = cifar.archive[: len(cifar.archive) // 2], end
    assert f"no CIFAR-10 in {tmp_path}" in refusal("cifar10", tmp_path, 32)
    cifar.served, cifar.end = cifar.archive, None
    assert len(load_dataset("cifar10", str(tmp_path), 32).train) == 180


@pytest.mark.parametrize(("name", "held"), [("folder", [1, 2, 52]), ("imagenet", [1, 2, 50])])
def test_folders_hold_out_a_tenth_of_each_class(tree, tmp_path, name, held):
    """ImageNet too needs nothing but the plain folders (pytorch/vision#3602)."""
    origin = tree({"train/a": 3, "train/b": 25, "train/c": 520, "val/a": 2, "val/b": 1, "val/c": 1})
    dataset = load_dataset(name, str(tmp_path), 8)
    assert len(origin) == 552 and dataset.search.labels.bincount().tolist() == held
    assert_origin(dataset, origin, "val")
    norm = IMAGENET_NORM if name == "imagenet" else channel_statistics(dataset.train.images)
    assert (dataset.mean, dataset.std) == norm


VAL, TEST = {"val/a": 1, "val/c": 2}, {"test/a": 1, "test/b": 0, "test/c": 2}
LAYOUTS = [("folder", VAL, "train", "val"), ("folder", TEST, "train", "test")]
LAYOUTS += [("folder", VAL | TEST, "val", "test"), ("imagenet", VAL | TEST, "train", "val")]


@pytest.mark.parametrize(("name", "counts", "search", "test"), LAYOUTS)
def test_each_split_has_its_folder(tree, tmp_path, name, counts, search, test):
    """A class without images, or without a folder, keeps its number (pytorch/vision#4925,
    pytorch/vision#8297, ultralytics/ultralytics#14301)."""
    tree({"train/a": 2, "train/b": 2, "train/c": 2} | counts)
    dataset = load_dataset(name, str(tmp_path), 96)
    for split, folder in zip(splits(dataset), ("train", search, test), strict=True):
        assert {Path(path).relative_to(tmp_path).parts[0] for path in split.images} == {folder}
        assert folder == "train" or split.labels.tolist() == [0, 2, 2]
    assert dataset.classes == ["a", "b", "c"]
    assert len(dataset.train) == (6 if search == "val" else 3)


def test_hidden_and_tool_folders_are_ignored(tree, tmp_path):
    """Beside the classes and within one (pytorch/vision#2831, open-mmlab/mmpretrain#507)."""
    tree({"train/a": 2, "train/b": 2, "test/a": 1, "test/b": 1})
    for parent in ("train", "test", "train/a", "test/a"):
        tree({f"{parent}/.ipynb_checkpoints": 3, f"{parent}/__MACOSX": 3})
    (tmp_path / "train/a/._000.png").write_bytes(b"a resource fork of macOS")
    dataset = load_dataset("folder", str(tmp_path), 8)
    assert dataset.classes == ["a", "b"]
    assert sorted((dataset.train + dataset.search).labels.tolist()) == [0, 0, 1, 1]
    assert dataset.test.labels.tolist() == [0, 1]


def test_an_image_has_one_class_and_one_split_despite_links(tree, tmp_path):
    """Linked files and folders, circles and dead links (mindspore-lab/mindocr#538)."""
    tree({"train/a": 4, "train/b": 4, "train/b/more": 2, "val/a": 1})
    (tmp_path / "linked").symlink_to(tmp_path / "train")
    assert len(load_dataset("folder", str(tmp_path), 8).train) == 8
    links = {"val/b": "../train/b/more", "train/a/friends": "../b/more", "train/a/self": "."}
    links |= {"train/a/friend.png": "../b/000.png", "train/a/copy.png": "000.png"}
    for link, target in links.items():
        (tmp_path / link).symlink_to(target)
        assert "an image has one class" in refusal("folder", tmp_path, 8)
        (tmp_path / link).unlink()
    (tmp_path / "train/c").symlink_to("nowhere")
    assert "train/c is a link to nothing" in refusal("folder", tmp_path, 8)


TRAIN = {"train/a": 2, "train/b": 2}
WRONG = [
    (TRAIN, "val", "no folder"),
    ({"train": 4, "val/a": 1}, "train", "one folder per class"),
    (TRAIN | {"val/a": 0}, "val", "no images"),
    (TRAIN | {"val/zebra": 1}, "val/zebra", "training folder"),
    (TRAIN | {"train/c": 1, "val/a": 1}, "train", "two images or more"),
    ({"train/a": 4, "val/a": 1}, "train", "two classes or more"),
]


@pytest.mark.parametrize(("counts", "named", "said"), WRONG)
def test_a_wrong_layout_is_refused_with_its_folder(tree, tmp_path, counts, named, said):
    """(facebookresearch/kill-the-bits#5, pytorch/examples#275)"""
    tree(counts)
    message = refusal("folder", tmp_path, 8)
    assert f"{tmp_path / named} " in message.replace(";", " ") and said in message


@pytest.mark.parametrize("image_size", [32, 96])
def test_images_of_any_mode_and_size_are_read_as_rgb(tmp_path, image_size):
    """(python-pillow/Pillow#2564, nothings/stb#427, IntelLabs/distiller#163)"""
    smooth, indices, palette = Image.fromarray(noise(4, 4, 3)), noise(32, 32), noise(256, 3)
    rgb, indexed = smooth.resize((32, 32)), Image.fromarray(indices)
    grey, rgba = rgb.convert("L"), Image.merge("RGBA", (*rgb.split(), indexed))
    indexed.putpalette(palette.tobytes())
    known = {
        "L.png": (grey, np.repeat(np.asarray(grey)[:, :, None], 3, axis=2), 0),
        "P.png": (indexed, palette[indices], 0),
        "RGBA.PNG": (rgba, np.asarray(rgb), 0),
        "CMYK.jpg": (rgb.convert("CMYK"), np.asarray(rgb), 10),
    }
    files = {name: image for name, (image, _, _) in known.items()}
    for name, size in {"dot.png": (1, 1), "wide.jpg": (500, 33), "high.jpg": (33, 500)}.items():
        files[name] = rgb.resize(size)
    for folder in ("train/a", "train/b", "test/a"):
        (tmp_path / folder).mkdir(parents=True)
        for name, image in files.items():
            image.save(tmp_path / folder / name)
    dataset = load_dataset("folder", str(tmp_path), image_size)
    training = Batches(dataset, dataset.train + dataset.search, 14, CPU)
    for batches in (training.epoch(0, 0), training, Batches(dataset, dataset.test, 7, CPU)):
        ((images, labels),) = batches
        assert images.shape == (len(labels), 3, image_size, image_size) and len(labels) >= 7
        assert images.dtype == torch.float32 and images.isfinite().all()
    if image_size == 32:  # that of the known pictures
        pixels = dataset.test.images.permute(0, 2, 3, 1).numpy()
        found = dict(zip(sorted(files), pixels, strict=True))
        for name, (_, expected, tolerance) in known.items():
            difference = np.abs(found[name] - expected.astype(float))
            assert difference.max() <= tolerance, (name, difference.max())


DAMAGED = {
    "half.ppm": b"P6 64 64 255\n" + bytes(6000),
    "giant.ppm": b"P6 20000 10000 255\n",  # more pixels than Pillow accepts
    "deep.pgm": b"P5 9 9 65535\n" + bytes(162),
    "strip.ppm": b"P6 5000 1 255\n" + bytes(15000),  # nagadomi/nunif#256
}


@pytest.mark.parametrize(("name", "workers"), [*((name, 0) for name in DAMAGED), ("half.ppm", 2)])
def test_a_damaged_image_is_refused_with_its_path(tree, tmp_path, name, workers):
    """(pytorch/vision#138, facebookresearch/deit#76, deepfates/memery#10)"""
    tree({"train/a": 2, "train/b": 3, "val/a": 3})
    path = tmp_path / "val/a" / name
    path.write_bytes(DAMAGED[name])
    streamed = load_dataset("imagenet", str(tmp_path), 96)
    batches = Batches(streamed, streamed.test, 2, CPU, workers)
    load_small = partial(load_dataset, "folder", str(tmp_path), 32, workers)
    for read in (load_small, partial(list, batches), partial(list, batches.epoch(0, 0))):
        with pytest.raises(UserError) as caught:
            read()
        assert str(path) in str(caught.value).strip().splitlines()[-1]  # after the worker's lines


@pytest.mark.parametrize(("image_size", "shorter"), [(64, 64), (96, 109)])
@pytest.mark.parametrize("shape", [(150, 120), (120, 201)])
def test_evaluation_resizes_and_crops_the_centre(tree, tmp_path, image_size, shorter, shape):
    """Only large images are cropped, and an EXIF orientation is ignored
    (megvii-model/SinglePathOneShot#5, pytorch/vision#7977, pytorch/vision#7947)."""
    tree({"train/a": 2, "train/b": 2, "test/a": 0})
    picture, exif = Image.fromarray(noise(*shape, 3)), Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    picture.save(tmp_path / "test/a/0.png", exif=exif)
    dataset = load_dataset("folder", str(tmp_path), image_size)
    ((images, _),) = Batches(dataset, dataset.test, 1, CPU)
    height, width = (int(shorter * side / min(shape)) for side in shape)
    resized = np.asarray(picture.resize((width, height), Image.Resampling.BILINEAR))
    top, left = round((height - image_size) / 2), round((width - image_size) / 2)
    expected = resized[top : top + image_size, left : left + image_size].transpose(2, 0, 1)
    assert np.abs(restored(images, dataset)[0] - expected).max() < 0.01


def test_channel_statistics_are_those_of_numpy():
    """But an empty channel, as in fluorescence images, has deviation 1 (JacobHanimann/scDINO#5)."""
    images = noise(4, 3, 6, 6)
    images[:, 2] = 51
    mean, std = channel_statistics(torch.from_numpy(images))
    assert mean == pytest.approx((images / 255).mean((0, 2, 3)))
    assert std == pytest.approx([*(images[:, :2] / 255).std((0, 2, 3)), 1])


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_iterating_gives_each_image_once_normalised_and_unaugmented(batch_size):
    """In order (udacity/deep-learning-v2-pytorch#132, ildoonet/pytorch-randaugment#16)."""
    pixels = noise(20, 3, 8, 8)
    dataset = in_memory(torch.from_numpy(pixels))
    batches = Batches(dataset, dataset.train, batch_size, CPU)
    sizes = [len(part) for part, _ in batches]
    assert len(batches) == len(sizes) == -(-20 // batch_size) and max(sizes) <= min(sizes) + 1
    images, labels = joined(batches)
    assert images.dtype == torch.float32 and labels.tolist() == list(range(20))
    assert np.abs(restored(images, dataset) - pixels).max() < 1e-4


def test_an_epoch_depends_on_seed_and_epoch_alone():
    dataset = in_memory(torch.from_numpy(noise(40, 3, 16, 16)))
    batches, orders, drawn = Batches(dataset, dataset.train, 16, CPU), [], []
    for i, (seed, epoch) in enumerate([(3, 5), (3, 5), (3, 6), (4, 5), (5, 3)]):
        torch.manual_seed(i)
        images, labels = joined(batches.epoch(seed, epoch, 4))
        orders.append(tuple(labels.tolist()))
        drawn.append(images)
    assert orders[0] == orders[1] and torch.equal(drawn[0], drawn[1])
    assert len(set(orders)) == 4 and not any(torch.equal(drawn[0], other) for other in drawn[2:])


@pytest.mark.parametrize(("count", "sizes"), [(20, [8, 8]), (40, [8] * 5), (5, [5])])
def test_an_epoch_drops_an_incomplete_last_batch(monkeypatch, count, sizes):
    """Unless it is the only one (openvinotoolkit/nncf#379, mapbox/robosat#228)."""
    monkeypatch.setattr(data.loaders, "AUGMENTED", 16)  # two batches of 8 are augmented together
    images = torch.arange(1, count + 1, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 8, 8)
    dataset = in_memory(images)
    batches = Batches(dataset, dataset.train, 8, CPU)
    drawn = list(batches.epoch(0, 0))
    assert [len(labels) for _, labels in drawn] == [len(images) for images, _ in drawn] == sizes
    assert batches.steps() == len(sizes)
    images, labels = joined(drawn)
    assert len(labels.unique()) == len(labels), "an image came twice"
    brightest = restored(images, dataset).max((1, 2, 3))
    assert np.allclose(brightest, labels.numpy() + 1, atol=1e-3), "an image has another's label"


@pytest.mark.parametrize("name", ["cifar10", "digits"])
def test_augmentation_shifts_and_mirrors(name):
    """By up to an eighth; mirrors half of the images, but no digits."""
    side, padding, count = 16, 2, 600
    rows, columns = np.mgrid[0:side, 0:side]
    # Every pixel tells its origin: the shift and the mirroring must explain each whole image.
    source = np.stack((rows + 1, columns + 1, np.full_like(rows, 200))).astype(np.uint8)
    dataset = in_memory(torch.from_numpy(source).expand(count, -1, -1, -1), name)
    images, _ = joined(Batches(dataset, dataset.train, 200, CPU).epoch(0, 0))
    found = restored(images, dataset)
    assert np.abs(found - found.round()).max() < 1e-3
    found = found.round().astype(int)
    flip = found[:, 1, 8, 8] < found[:, 1, 8, 7]
    down = found[:, 0, 8, 8] - 9 + padding
    right = np.where(flip, found[:, 1, 8, 7], found[:, 1, 8, 8]) - 9 + padding
    padded = np.pad(source, ((0, 0), (padding, padding), (padding, padding)))
    for i in range(count):
        crop = padded[:, down[i] : down[i] + side, right[i] : right[i] + side]
        assert np.array_equal(found[i], crop[:, :, ::-1] if flip[i] else crop)
    drawn = np.bincount(down * 5 + right, minlength=25)
    assert len(drawn) == 25 and drawn.min() >= 8, "each of the 25 shifts is drawn about 24 times"
    assert 240 < flip.sum() < 360 if name == "cifar10" else not flip.any()


@pytest.mark.parametrize("in_order", [False, True])
@pytest.mark.parametrize("length", [1, 5, 6])
def test_cutout_removes_one_square_with_its_centre_anywhere(length, in_order):
    images = torch.from_numpy(noise(600, 3, 16, 16) // 2 * 2)
    dataset = in_memory(images, mean=(101 / 255, 51 / 255, 7 / 255))
    batches = Batches(dataset, dataset.train, 200, CPU)
    drawn = batches.augmented if in_order else partial(batches.epoch, 0, 0)
    (whole, _), (cut, _) = joined(drawn(0)), joined(drawn(length))
    holes = (cut == 0).all(1)  # with an odd mean and even pixels, nothing else is zero
    assert torch.equal(whole.masked_fill(holes[:, None], 0), cut) and not (whole == 0).any()
    starts = [centre - length // 2 for centre in range(16)]
    expected = {tuple(range(max(0, start), min(16, start + length))) for start in starts}
    found = set()
    for hole in holes:
        rows, columns = hole.any(1), hole.any(0)
        assert torch.equal(hole, rows[:, None] & columns)
        found.add(tuple(tuple(line.nonzero().flatten().tolist()) for line in (rows, columns)))
    assert {rows for rows, _ in found} == {columns for _, columns in found} == expected
    assert len(found) > 200, "600 of 256 squares: about 230 of them are drawn"


def test_streamed_batches_depend_on_seed_and_epoch_alone(tmp_path):
    """(gpleiss/efficient_densenet_pytorch#51, pytorch/pytorch#5059, xingyizhou/CenterNet#233)"""
    colours, found = ("red", "green", "blue"), []
    for label, colour in enumerate(colours):
        pixels = noise(60, 80, 3) // 5
        pixels[:, :, label] += 150
        for folder in (tmp_path / "train" / colour, tmp_path / "test" / colour):
            folder.mkdir(parents=True)
            for i in range(5):
                Image.fromarray(pixels).save(folder / f"{i}.png")
    dataset = load_dataset("folder", str(tmp_path), 96)
    for workers in (0, 2):
        torch.manual_seed(workers)
        batches = Batches(dataset, dataset.train, 5, CPU, workers)
        passes = batches.epoch(1, 2), batches.epoch(1, 3), batches.augmented(), batches
        found.append([joined(part) for part in passes])
    for (images, labels), (other_images, other_labels) in zip(*found, strict=True):
        assert torch.equal(images, other_images) and torch.equal(labels, other_labels)
        brightest = restored(images, dataset).mean((2, 3)).argmax(1)
        assert [colours[i] for i in brightest] == [dataset.classes[label] for label in labels]
    images, labels = zip(*found[0], strict=True)
    assert [len(part) for part in labels] == [10, 10, 12, 12]
    assert all(torch.equal(part, dataset.train.labels) for part in labels[2:])
    drawn = torch.cat(images[:3])  # of equal files, in each class
    assert len(drawn.unique(dim=0)) == len(drawn)


def test_a_checkpoint_brings_its_normalisation_and_refuses_other_data():
    """Decoders differ in the last bit, so mean and std come from the checkpoint."""
    dataset = load_dataset("digits", "", 16)
    metadata = dataset.metadata() | {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6)}
    dataset.check_same(metadata, "x.pth")
    assert (dataset.mean, dataset.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    with pytest.raises(UserError, match=r"x\.pth has images .*this command \[1197, 300, 300\]"):
        dataset.check_same(metadata | {"images": [1, 2, 3]}, "x.pth")
