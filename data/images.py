"""Image files: read as RGB, and prepared as in the training or the evaluation."""

import sys

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from utils import UserError, progress

RESIDENT_SIDE = 64  # images up to this size are decoded once and kept on the device
MAX_ASPECT_RATIO = 1000  # thinner images take gigabytes when their shorter side is resized


class ImageFiles(Dataset):
    """Image files as RGB, each with its position.

    The orientation in EXIF is not applied, as in torchvision. With a seed, the augmentation of an
    image depends on the seed and its position alone, so that workers and --resume change nothing.
    """

    def __init__(self, files: list[str], transform: v2.Transform, seed: int | None = None):
        self.files, self.transform, self.seed = files, transform, seed

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        try:
            with Image.open(self.files[index]) as image:
                if image.mode.startswith(("I", "F")):
                    raise ValueError("more than 8 bits a channel: convert it first")
                if max(image.size) > MAX_ASPECT_RATIO * min(image.size):
                    raise ValueError(f"one side is over {MAX_ASPECT_RATIO} times the other")
                image = image.convert("RGB")
        except Exception as error:  # Pillow's decoders raise almost anything on a damaged file
            raise UserError(f"{self.files[index]} cannot be read as an image ({error})") from None
        if self.seed is None:
            return self.transform(image), index
        with torch.random.fork_rng(devices=[]):
            # torch.manual_seed would take 0.1 ms.
            torch.default_generator.manual_seed(self.seed + index)
            return self.transform(image), index


def evaluation_transform(image_size: int) -> v2.Transform:
    """Resizes the shorter side and crops the centre: of large images 224 out of 256, as usual."""
    side = image_size if image_size <= RESIDENT_SIDE else image_size * 256 // 224
    return v2.Compose([v2.Resize(side), v2.CenterCrop(image_size), v2.PILToTensor()])


def decode(files: list[str], image_size: int, workers: int) -> Tensor:
    """The images in many files, as in the evaluation: uint8 (N, 3, S, S)."""
    dataset = ImageFiles(files, evaluation_transform(image_size))
    workers = workers if len(files) > 64 else 0
    loader = DataLoader(dataset, 64, num_workers=workers, worker_init_fn=quiet_worker)
    images = torch.empty((len(files), 3, image_size, image_size), dtype=torch.uint8)
    for batch, indices in progress(loader, "reading images", len(loader)):
        images[indices] = batch
    return images


def quiet_worker(_: int) -> None:
    """For `worker_init_fn`: a batch that an interrupt cuts off prints no traceback.

    In a worker only multiprocessing.resource_sharer, which hands the batches over, calls the hook;
    errors in reading the images reach the main process.
    """
    default = sys.excepthook

    def hook(kind: type[BaseException], *rest: object) -> None:
        if not issubclass(kind, (ConnectionError, EOFError)):
            default(kind, *rest)

    sys.excepthook = hook


def training_transform(image_size: int) -> v2.Transform:
    """The official code's augmentation of large images, one at a time, to uint8 (3, S, S)."""
    crop, flip = v2.RandomResizedCrop(image_size), v2.RandomHorizontalFlip()
    jitter = v2.ColorJitter(brightness=0.4, contrast=0.4, saturation=0.4)
    return v2.Compose([crop, jitter, flip, v2.PILToTensor()])
