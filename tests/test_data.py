"""Data sets, splits, batches and augmentation, against plain references, without a network."""

import gzip
import http.client
import io
import random
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


def gradient(height, width):
    """A smooth colour picture: JPEG keeps it almost as it is."""
    rows, columns = np.mgrid[0:height, 0:width]
    red, green = rows * 255 // max(height - 1, 1), columns * 255 // max(width - 1, 1)
    return np.stack((red, green, (red + green) // 4), axis=2).astype(np.uint8)


def encoded(image, kind, **options):
    """The bytes of an image file."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


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


def load_files(root, files, image_size):
    """A data set with these files in each of train/a, train/b and test/a."""
    for folder in ("train/a", "train/b", "test/a"):
        (root / folder).mkdir(parents=True)
        for name, content in files.items():
            (root / folder / name).write_bytes(content)
    return load_dataset("folder", str(root), image_size)


def splits(dataset):
    return dataset.train, dataset.search, dataset.test


def pixels_of(split):
    """The images of a split in memory as the bytes of (S, S, 3) arrays."""
    return [image.permute(1, 2, 0).numpy().tobytes() for image in split.images]


def assert_origin(dataset, origin, test):
    """Each image has the class and the split of its folder, and none comes twice."""
    seen = []
    for split, folder in zip(splits(dataset), ("train", "train", test), strict=True):
        expected = [f"{folder}/{dataset.classes[label]}" for label in split.labels]
        assert [origin[pixels] for pixels in pixels_of(split)] == expected
        seen += pixels_of(split)
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
    classes = [str(i) for i in range(len(images))]
    size, std = images.shape[-1], (0.25, 0.5, 0.2)
    return ImageData(name, size, classes, mean, std, split, split, split)


def each_way(dataset, size):
    """Batches of a training epoch, of the training images in order, and of the test images."""
    training = Batches(dataset, dataset.train + dataset.search, 2 * size, CPU)
    return training.epoch(0, 0), training, Batches(dataset, dataset.test, size, CPU)


def restored(batch, dataset):
    """Normalised images (N, 3, S, S) back to values from 0 to 255, by numpy in float64."""
    mean, std = (np.array(value).reshape(3, 1, 1) for value in (dataset.mean, dataset.std))
    return (batch.double().numpy() * std + mean) * 255


def seed_everything(seed):
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)


def test_the_splits_of_digits_hold_each_image_once():
    with np.load(Path(data.datasets.__file__).with_name("digits.npz")) as arrays:
        raw, labels = arrays["images"], arrays["labels"].tolist()
    levels = np.round(raw * (255 / 16)).astype(np.uint8)  # the values are 0 to 16
    expected = zip([image.tobytes() for image in levels], labels, strict=True)
    digits = load_dataset("digits", "unused", 8)
    found = []
    for split in splits(digits):
        pixels = [image[0].numpy().tobytes() for image in split.images]
        found += zip(pixels, split.labels.tolist(), strict=True)
    assert sorted(found) == sorted(expected)
    assert len(digits.train) == 1197
    for held in (digits.search, digits.test):
        assert held.labels.bincount().tolist() == [30] * 10


def test_digits_are_enlarged_bilinearly_to_three_equal_channels():
    small, large = (load_dataset("digits", "unused", size).train for size in (8, 16))
    assert torch.equal(small.labels, large.labels)
    images = large.images.numpy()
    assert images.dtype == np.uint8 and (images == images[:, :1]).all()
    raw = np.round(small.images[:40, 0].numpy() * np.float32(16 / 255))
    unrounded = [Image.fromarray(image) for image in raw * np.float32(255 / 16)]
    expected = [image.resize((16, 16), Image.Resampling.BILINEAR) for image in unrounded]
    assert np.abs(images[:40, 0] - np.stack(expected)).max() <= 0.51


@pytest.mark.parametrize(("archive", "extracted"), [(True, True), (False, True), (True, False)])
def test_cifar10_holds_out_a_tenth_of_each_class(cifar, tmp_path, archive, extracted):
    """(pytorch/pytorch#59344, quark0/darts#66, kuangliu/pytorch-cifar#145)"""
    cifar.install(tmp_path, archive, extracted)
    dataset = load_dataset("cifar10", str(tmp_path), 32)
    assert cifar.calls == []
    assert dataset.classes == [f"class {i}" for i in range(10)]
    origin = {}
    for name, rows in cifar.images.items():
        folder = "test" if name == "test_batch" else "train"
        images = rows.reshape(40, 3, 32, 32).transpose(0, 2, 3, 1)
        for image, label in zip(images, cifar.labels[name], strict=True):
            origin[image.tobytes()] = f"{folder}/class {label}"
    assert_origin(dataset, origin, "test")
    assert dataset.search.labels.bincount().tolist() == [2] * 10


@pytest.mark.parametrize("name", ["cifar10", "digits", "folder"])
def test_the_splits_do_not_depend_on_global_seeds(cifar, tree, tmp_path, name):
    cifar.install(tmp_path, archive=False, folder=True)
    tree({"train/a": 30, "train/b": 30, "test/a": 1})
    found = []
    for seed in (1, 2):
        seed_everything(seed)
        dataset = load_dataset(name, str(tmp_path), 8)
        found.append([pixels_of(split) for split in splits(dataset)])
    assert found[0] == found[1]


CUT_OFF = [None, ConnectionResetError("reset by peer"), http.client.IncompleteRead(b"", 1000)]


@pytest.mark.parametrize("end", CUT_OFF, ids=repr)
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
    if name == "imagenet":
        assert (dataset.mean, dataset.std) == IMAGENET_NORM
    else:
        values = dataset.train.images.numpy() / 255
        assert np.allclose(dataset.mean, values.mean((0, 2, 3)))
        assert np.allclose(dataset.std, values.std((0, 2, 3)))


LAYOUTS = [("folder", "val", "train", "val"), ("folder", "test", "train", "test")]
LAYOUTS += [("folder", "val test", "val", "test"), ("imagenet", "val test", "train", "val")]


@pytest.mark.parametrize("missing", ["absent", "empty"])
@pytest.mark.parametrize(("name", "folders", "search", "test"), LAYOUTS)
def test_each_split_has_its_folder(tree, tmp_path, name, folders, search, test, missing):
    """A class without images keeps its number.

    (pytorch/vision#4925, pytorch/vision#8297, ultralytics/ultralytics#14301)
    """
    tree({"train/a": 2, "train/b": 2, "train/c": 2})
    for folder in folders.split():
        tree({f"{folder}/a": 1, f"{folder}/c": 2})
        if missing == "empty":
            (tmp_path / folder / "b").mkdir()
    dataset = load_dataset(name, str(tmp_path), 96)
    for split, folder in zip(splits(dataset), ("train", search, test), strict=True):
        assert {Path(path).relative_to(tmp_path).parts[0] for path in split.images} == {folder}
        assert folder == "train" or split.labels.tolist() == [0, 2, 2]
    assert dataset.classes == ["a", "b", "c"]
    assert len(dataset.train) == (6 if search == "val" else 3)


@pytest.mark.parametrize("folder", [".ipynb_checkpoints", "__MACOSX"])
@pytest.mark.parametrize("count", [0, 3])
def test_hidden_and_tool_folders_are_ignored(tree, tmp_path, folder, count):
    """Beside the classes and within one (pytorch/vision#2831, open-mmlab/mmpretrain#507)."""
    tree({"train/a": 2, "train/b": 2, "test/a": 1, "test/b": 1})
    tree({f"{parent}/{folder}": count for parent in ("train", "test", "train/a", "test/a")})
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
    ({"test/a": 2}, "train", "no folder"),
    (TRAIN, "val", "no folder"),
    ({"train": 4, "val/a": 1}, "train", "one folder per class"),
    (TRAIN | {"val": 3}, "val", "one folder per class"),
    (TRAIN | {"val/a": 0}, "val", "no images"),
    (TRAIN | {"val/zebra": 1}, "val/zebra", "training folder"),
    (TRAIN | {"train/b": 1, "val/a": 1}, "train", "two images or more"),
    (TRAIN | {"train/b": 0, "val/a": 1}, "train", "two images or more"),
    ({"train/a": 4, "val/a": 1}, "train", "two classes or more"),
]


@pytest.mark.parametrize(("counts", "named", "said"), WRONG)
@pytest.mark.parametrize("name", ["folder", "imagenet"])
def test_a_wrong_layout_is_refused_with_its_folder(tree, tmp_path, name, counts, named, said):
    """(facebookresearch/kill-the-bits#5, pytorch/examples#275)"""
    tree(counts)
    message = refusal(name, tmp_path, 8)
    assert f"{tmp_path / named} " in message.replace(";", " ") and said in message


def image_files():
    """Files of a 32x32 picture by name: content, expected pixels, tolerance of their mean."""
    pixels, palette = gradient(32, 32), noise(256, 3)
    rgb, alpha = Image.fromarray(pixels), Image.fromarray(noise(32, 32))
    grey = rgb.convert("L")
    greys = np.repeat(np.asarray(grey)[:, :, None], 3, axis=2)
    black_white = Image.fromarray(greys[:, :, 0] >= 128)
    indices = np.arange(1024, dtype=np.uint8).reshape(32, 32)
    indexed = Image.frombytes("P", (32, 32), indices.tobytes())
    indexed.putpalette(palette.flatten().tolist())
    bad_exif = b"Exif\0\0II*\0\x08\0\0\0\xff\xff\x12\x01"
    return {
        "L.png": (encoded(grey, "PNG"), greys, 0),
        "1.png": (encoded(black_white, "PNG"), (greys >= 128) * 255, 0),
        "LA.png": (encoded(Image.merge("LA", (grey, alpha)), "PNG"), greys, 0),
        "P.png": (encoded(indexed, "PNG", transparency=bytes(range(256))), palette[indices], 0),
        "RGBA.png": (encoded(Image.merge("RGBA", (*rgb.split(), alpha)), "PNG"), pixels, 0),
        "png-inside.JPEG": (encoded(rgb, "PNG"), pixels, 0),
        "UPPER.PNG": (encoded(rgb, "PNG"), pixels, 0),
        "L.jpg": (encoded(grey, "JPEG"), greys, 0.02),
        "CMYK.jpg": (encoded(rgb.convert("CMYK"), "JPEG"), pixels, 0.05),
        "bad-exif.jpg": (encoded(rgb, "JPEG", exif=bad_exif), pixels, 0.02),
    }


@pytest.mark.parametrize("image_size", [32, 96])
def test_images_of_any_mode_and_size_are_read_as_rgb(tmp_path, image_size):
    """(python-pillow/Pillow#2564, nothings/stb#427, IntelLabs/distiller#163)"""
    known = image_files()
    files = {name: content for name, (content, _, _) in known.items()}
    files["dot.png"] = encoded(Image.fromarray(noise(1, 1, 3)), "PNG")
    files["wide.jpg"] = encoded(Image.fromarray(gradient(33, 500)), "JPEG")
    files["high.jpg"] = encoded(Image.fromarray(gradient(500, 33)), "JPEG")
    dataset = load_files(tmp_path, files, image_size)
    for batches in each_way(dataset, len(files)):
        ((images, labels),) = batches
        assert images.shape == (len(labels), 3, image_size, image_size)
        assert images.dtype == torch.float32 and images.isfinite().all()
        assert len(labels) >= len(files)
    if image_size == 32:  # that of the known pictures
        pixels = dataset.test.images.permute(0, 2, 3, 1).numpy()
        found = dict(zip(sorted(files), pixels, strict=True))
        for name, (_, expected, tolerance) in known.items():
            difference = found[name].mean((0, 1)) - expected.mean((0, 1))
            assert np.abs(difference).max() <= tolerance * 255, name
            assert tolerance or np.array_equal(found[name], expected), name


@pytest.mark.parametrize("image_size", [32, 96])
def test_an_exif_orientation_is_ignored(tmp_path, image_size):
    """In training and evaluation (pytorch/vision#7977, pytorch/vision#7947)."""
    stripes = Image.fromarray(np.tile(gradient(1, 80), (40, 1, 1)))
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn: it would make the equal rows differ
    content = encoded(stripes, "JPEG", exif=exif)
    dataset = load_files(tmp_path, {f"{i}.jpg": content for i in range(4)}, image_size)
    for batches in each_way(dataset, 4):
        for images, _ in batches:
            inner = restored(images, dataset)[:, :, 8:-8, 8:-8]  # a crop may add a border
            assert np.ptp(inner, axis=2).max() <= 2
            assert np.ptp(inner, axis=3).max((1, 2)).min() > 2


def damaged_files():
    jpeg = encoded(Image.fromarray(noise(64, 64, 3)), "JPEG")
    giant = b"P6 20000 10000 255\n"  # more pixels than Pillow accepts
    emf = b"\1\0\0\0" + bytes(36) + b" EMF" + bytes(60)  # on which Pillow divides by zero
    deep = encoded(Image.fromarray(np.full((9, 9), 40000, dtype=np.uint16)), "PNG")
    strip = encoded(Image.new("RGB", (5000, 1)), "PNG")  # nagadomi/nunif#256
    files = {"half.jpg": jpeg[: len(jpeg) // 2], "empty.jpg": b"", "gzip.JPEG": gzip.compress(jpeg)}
    return files | {"giant.ppm": giant, "emf.png": emf, "deep.png": deep, "strip.png": strip}


@pytest.mark.parametrize(
    ("name", "folder", "workers"),
    [*((name, "train", 0) for name in damaged_files()), ("half.jpg", "val", 2)],
)
def test_a_damaged_image_is_refused_with_its_path(tree, tmp_path, name, folder, workers):
    """(pytorch/vision#138, facebookresearch/deit#76, deepfates/memery#10)"""
    tree({"train/a": 2, "train/b": 3, "val/a": 3})
    path = tmp_path / folder / "a" / name
    path.write_bytes(damaged_files()[name])
    streamed = load_dataset("imagenet", str(tmp_path), 96)
    split = streamed.train + streamed.search if folder == "train" else streamed.test
    batches = Batches(streamed, split, 2, CPU, workers)
    load_small = partial(load_dataset, "folder", str(tmp_path), 32, workers)
    for read in (load_small, partial(list, batches), partial(list, batches.epoch(0, 0))):
        with pytest.raises(UserError) as caught:
            read()
        last_line = str(caught.value).strip().splitlines()[-1]  # after those of the worker
        assert str(path) in last_line


@pytest.mark.parametrize("image_size", [32, 64, 96])
@pytest.mark.parametrize("shape", [(150, 120), (120, 201)])
def test_evaluation_resizes_and_crops_the_centre(tree, tmp_path, image_size, shape):
    """Only large images are cropped, and all are RGB (megvii-model/SinglePathOneShot#5)."""
    tree({"train/a": 2, "train/b": 2, "test/a": 0})
    picture = Image.fromarray(noise(*shape, 3)).resize(shape[::-1], Image.Resampling.BOX)
    picture.save(tmp_path / "test/a/0.png")
    dataset = load_dataset("folder", str(tmp_path), image_size)
    ((images, _),) = Batches(dataset, dataset.test, 1, CPU)
    shorter = {32: 32, 64: 64, 96: 109}[image_size]
    height, width = (int(shorter * side / min(shape)) for side in shape)
    resized = np.asarray(picture.resize((width, height), Image.Resampling.BILINEAR))
    top, left = round((height - image_size) / 2), round((width - image_size) / 2)
    expected = resized[top : top + image_size, left : left + image_size].transpose(2, 0, 1)
    assert np.abs(restored(images, dataset)[0] - expected).max() < 0.01


def test_an_empty_channel_has_deviation_1():
    """As in fluorescence images (JacobHanimann/scDINO#5)."""
    images = torch.from_numpy(noise(4, 3, 6, 6))
    images[:, 2] = 51
    mean, std = channel_statistics(images)
    assert (mean[2], std[2]) == (pytest.approx(0.2), 1) and 0.2 < min(std[:2]) < 0.4


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_iterating_gives_each_image_once_normalised_and_unaugmented(batch_size):
    """In order (udacity/deep-learning-v2-pytorch#132, ildoonet/pytorch-randaugment#16)."""
    images = noise(20, 3, 8, 8)
    dataset = in_memory(torch.from_numpy(images))
    batches = Batches(dataset, dataset.train, batch_size, CPU)
    parts, labels = zip(*batches, strict=True)
    assert len(batches) == len(parts) == -(-20 // batch_size)
    assert torch.cat(labels).tolist() == list(range(20))
    assert all(part.is_contiguous(memory_format=torch.channels_last) for part in parts)
    mean, std = (np.array(value).reshape(3, 1, 1) for value in (dataset.mean, dataset.std))
    found, expected = torch.cat(parts).numpy(), (images / 255 - mean) / std
    assert found.dtype == np.float32 and np.allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_an_epoch_depends_on_seed_and_epoch_alone():
    dataset = in_memory(torch.from_numpy(noise(40, 3, 16, 16)))
    batches = Batches(dataset, dataset.train, 16, CPU)
    orders, drawn = [], []
    for i, (seed, epoch) in enumerate([(3, 5), (3, 5), (3, 6), (4, 5), (5, 3)]):
        seed_everything(i)
        images, labels = zip(*batches.epoch(seed, epoch, 4), strict=True)
        assert all(part.is_contiguous(memory_format=torch.channels_last) for part in images)
        orders.append(tuple(torch.cat(labels).tolist()))
        drawn.append(torch.cat(images))
    assert orders[0] == orders[1] and torch.equal(drawn[0], drawn[1])
    assert len(set(orders)) == 4 and not any(torch.equal(drawn[0], other) for other in drawn[2:])


KEPT = [(20, 8, [8, 8]), (40, 8, [8] * 5), (33, 32, [32]), (5, 8, [5]), (3, 1, [1, 1, 1])]


@pytest.mark.parametrize(("count", "batch_size", "sizes"), KEPT)
def test_an_epoch_drops_an_incomplete_last_batch(monkeypatch, count, batch_size, sizes):
    """Unless it is the only one (openvinotoolkit/nncf#379, mapbox/robosat#228)."""
    monkeypatch.setattr(data.loaders, "AUGMENTED", 16)  # two batches of 8 are augmented together
    images = torch.arange(1, count + 1, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 8, 8)
    dataset = in_memory(images)
    batches = Batches(dataset, dataset.train, batch_size, CPU)
    parts, labels = zip(*batches.epoch(0, 0), strict=True)
    assert [len(part) for part in labels] == [len(part) for part in parts] == sizes
    assert batches.steps() == len(sizes)
    labels = torch.cat(labels)
    assert len(labels.unique()) == len(labels), "an image came twice"
    brightest = restored(torch.cat(parts), dataset).max((1, 2, 3))
    assert np.allclose(brightest, labels.numpy() + 1, atol=1e-3), "an image has another's label"


@pytest.mark.parametrize("in_order", [False, True])
@pytest.mark.parametrize("name", ["cifar10", "digits"])
def test_augmentation_shifts_and_mirrors(name, in_order):
    """By up to an eighth; mirrors half of the images, but no digits."""
    side, padding, count = 16, 2, 600
    rows, columns = np.mgrid[0:side, 0:side]
    # Every pixel tells its origin: the shift and the mirroring must explain each whole image.
    source = np.stack((rows + 1, columns + 1, np.full_like(rows, 200))).astype(np.uint8)
    dataset = in_memory(torch.from_numpy(source).expand(count, -1, -1, -1), name)
    batches = Batches(dataset, dataset.train, 200, CPU)
    drawn = batches.augmented() if in_order else batches.epoch(0, 0)
    found = np.concatenate([restored(images, dataset) for images, _ in drawn])
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
    whole, cut = (torch.cat([images for images, _ in drawn(size)]) for size in (0, length))
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
    colours = ("red", "green", "blue")
    for folder, count in (("train", 5), ("test", 2)):
        for label, colour in enumerate(colours):
            (tmp_path / folder / colour).mkdir(parents=True)
            pixels = gradient(60, 80) // 5
            pixels[:, :, label] += 150
            for i in range(count):
                Image.fromarray(pixels).save(tmp_path / folder / colour / f"{i}.png")
    dataset = load_dataset("folder", str(tmp_path), 96)
    runs = []
    for workers in (0, 2):
        seed_everything(workers)
        batches = Batches(dataset, dataset.train, 5, CPU, workers)
        epochs = [*batches.epoch(1, 2), *batches.epoch(1, 3)]
        runs.append([*epochs, *batches.augmented(), *batches.augmented(), *batches])
    run = runs[0]
    assert [len(labels) for _, labels in run] == [5, 5, 5, 5, *[4] * 9]
    for start in (4, 7, 10):
        labels = torch.cat([labels for _, labels in run[start : start + 3]])
        assert torch.equal(labels, dataset.train.labels)
    for (first, _), (again, _) in zip(run[4:7], run[7:10], strict=True):
        assert torch.equal(first, again)
    for (images, labels), (other_images, other_labels) in zip(*runs, strict=True):
        assert images.shape == (len(labels), 3, 96, 96)
        assert images.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(images, other_images) and torch.equal(labels, other_labels)
        brightest = restored(images, dataset).mean((2, 3)).argmax(1)
        assert [colours[i] for i in brightest] == [dataset.classes[label] for label in labels]
    drawn = torch.cat([images for images, _ in runs[1][:7]])  # of equal files, in each class
    assert len(drawn.unique(dim=0)) == len(drawn) == 32


def test_a_checkpoint_brings_its_normalisation_and_refuses_other_data():
    """Decoders differ in the last bit, so mean and std come from the checkpoint."""
    dataset = load_dataset("digits", "", 16)
    metadata = dataset.metadata() | {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6)}
    dataset.check_same(metadata, "x.pth")
    assert (dataset.mean, dataset.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    with pytest.raises(UserError, match=r"x\.pth has classes .*three"):
        dataset.check_same(metadata | {"classes": ["0", "1", "2", "three"]}, "x.pth")
    with pytest.raises(UserError, match=r"images \[1, 2, 3\], this command \[1197, 300, 300\]"):
        dataset.check_same(metadata | {"images": [1, 2, 3]}, "x.pth")
