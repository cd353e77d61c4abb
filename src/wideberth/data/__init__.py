"""Data sets that yield (x, y, index), the loader that orders them by key, and augmentation keyed by sample."""

from wideberth.data.augment import Augmentation, CropFlip, RandomResizedCrop
from wideberth.data.downloads import CIFAR10, CIFAR100, MNIST, SVHN, FashionMNIST
from wideberth.data.hub import HuggingFace
from wideberth.data.images import ImageFolders, ImageNet, ParquetImages
from wideberth.data.loading import KeyedSampler, loader
from wideberth.data.reading import Readable, batches, collect, count, read
from wideberth.data.selection import DataSet, selected_rows
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
    "DataSet",
    "Digits",
    "FashionMNIST",
    "FromDatasets",
    "HuggingFace",
    "ImageFolders",
    "ImageNet",
    "InMemory",
    "KeyedSampler",
    "Lazy",
    "ParquetImages",
    "RandomResizedCrop",
    "Readable",
    "Source",
    "Split",
    "Tensors",
    "batches",
    "collect",
    "count",
    "loader",
    "read",
    "selected_rows",
]
