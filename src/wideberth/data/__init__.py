"""Data sets that yield (x, y, index), the loader that orders them by key, and augmentation keyed by sample."""

from wideberth.data.augment import Augmentation, CropFlip
from wideberth.data.downloads import CIFAR10, CIFAR100, MNIST, SVHN, FashionMNIST
from wideberth.data.images import ImageFolders, ParquetImages
from wideberth.data.loading import KeyedSampler, loader
from wideberth.data.sources import Data, Digits, FromDatasets, Tensors
from wideberth.data.splits import Batch, InMemory, Lazy, Source, Split

__all__ = [
    "CIFAR10",
    "CIFAR100",
    "MNIST",
    "SVHN",
    "Augmentation",
    "Batch",
    "CropFlip",
    "Data",
    "Digits",
    "FashionMNIST",
    "FromDatasets",
    "ImageFolders",
    "InMemory",
    "KeyedSampler",
    "Lazy",
    "ParquetImages",
    "Source",
    "Split",
    "Tensors",
    "loader",
]
