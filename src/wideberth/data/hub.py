"""Images by way of the `datasets` library of Hugging Face: from its hub, or from files that it reads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from torch import Tensor
from torch.utils.data import Dataset

from wideberth.checks import InputError, at_least, one_line
from wideberth.data.images import mode_of, square
from wideberth.data.sources import Data
from wideberth.data.splits import Lazy, Source


class HuggingFace(Data):
    """A data set of images as `datasets.load_dataset` finds it, decoded when needed.

    It is loaded, and downloaded where it has to be, when this is made. Images have the size and the channels (one if
    grey, else three) of the first training image, or the size that is asked for. `ParquetImages` needs no library for
    two parquet files, and keeps them decoded in memory.

    Args:
        path: as `load_dataset` takes it: a name of the hub such as "uoft-cs/cifar10", a folder, or a format such as
            "imagefolder", which then needs options.
        name: the configuration, where the data set has several.
        train: the training split, such as "train" or "train[:80%]".
        test: the test split.
        image: the column of images; "image" or "img" if None.
        label: the column of integer labels.
        size: shorter side of an image after resizing, and height and width of its central square; None where all images
            have one size, which is kept.
        classes: number of classes; as the label column says, or one more than the largest training label, if None.
        options: further arguments of `load_dataset`, such as {"data_dir": "photos"} or {"revision": "..."}.
        limits: see `Data`.

    Raises:
        InputError: when `datasets` is not installed, it cannot load the data set, a column is missing or of another
            kind, an image cannot be decoded or has another size, or a label is outside 0..classes-1.
    """

    _by_class = True
    needs_trust: ClassVar[str] = "datasets may run scripts of a data set, and unpickle"

    def __init__(
        self,
        path: str,
        name: str | None = None,
        *,
        train: str = "train",
        test: str = "test",
        image: str | None = None,
        label: str = "label",
        size: int | None = None,
        classes: int | None = None,
        options: dict[str, Any] | None = None,
        **limits: Any,
    ) -> None:
        super().__init__(**limits)
        if size is not None:
            at_least("size", size, 1)
        self._tables = {
            is_train: _Images(f"{path}, {split}", _table(path, name, split, options or {}), image, label)
            for is_train, split in ((True, train), (False, test))
        }
        first = self._tables[True].picture(0)
        self._mode, self._size = mode_of(first), size
        sides = (first.height, first.width) if size is None else (size, size)
        self.shape = (len(self._mode), *sides)
        self.classes = self._tables[True].classes() if classes is None else classes

    def _load(self, train: bool) -> Source:
        table = self._tables[train]
        table.mode, table.sides = self._mode, self.shape[1:]
        if self._size is not None:
            table.transform = square(self._size, self._size)
        return Lazy(table, classes=self.classes, name=table.name)


def _table(path: str, name: str | None, split: str, options: dict[str, Any]) -> Any:
    try:
        from datasets import load_dataset
    except ModuleNotFoundError as error:
        raise InputError(f"path={path!r}: datasets is not installed; pip install 'wideberth[hub]' adds it") from error
    try:
        return load_dataset(path, name, split=split, **options)
    except Exception as error:  # the library's own, those of the network, of files and of the formats it reads
        raise InputError(f"path={path!r}: datasets cannot load {split!r}: {one_line(error)}") from error


class _Images(Dataset[Any]):
    """A split of (image, label): columns found, images brought to one mode and size, failures that name the row."""

    mode: str
    sides: tuple[int, ...]

    def __init__(self, name: str, table: Any, image: str | None, label: str) -> None:
        self.name = name
        self.transform: Callable[[Any], Tensor] | None = None
        columns: Sequence[str] = table.column_names
        found = [column for column in ("image", "img") if column in columns] if image is None else [image]
        for column in (*(found or ["image or img"])[:1], label):
            if column not in columns:
                raise InputError(f"{name}: has no column {column}, only {', '.join(columns)}")
        self._images, self._labels = table.select_columns(found[0]), table.select_columns(label)
        self._image, self._label = found[0], label

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, row: int) -> tuple[Tensor, int]:
        from torchvision.transforms.v2.functional import pil_to_tensor

        picture = self.picture(row)
        if self.transform is None and (picture.height, picture.width) != self.sides:
            raise InputError(
                f"{self.name}: the image of row {row} is {picture.height}x{picture.width}: must be "
                f"{self.sides[0]}x{self.sides[1]} as the first training image, or be resized by size=..."
            )
        pixels = (self.transform or pil_to_tensor)(picture.convert(self.mode))
        return pixels, self._labels[row][self._label]

    @property
    def targets(self) -> list[int]:
        """The labels of all rows, without decoding an image."""
        labels = self._labels[:][self._label]
        if not all(isinstance(value, int) for value in labels):
            raise InputError(f"{self.name}: column {self._label} must hold integer classes, in every row")
        return list(labels)

    def classes(self) -> int:
        """How many the label column says there are, or else one more than the largest label."""
        feature = self._labels.features[self._label]
        said: int | None = getattr(feature, "num_classes", None)
        return max(self.targets) + 1 if said is None else said

    def picture(self, row: int) -> Any:
        """The PIL image of a row, as stored."""
        try:
            picture = self._images[row][self._image]
        except (OSError, ValueError, SyntaxError, IndexError) as error:  # PIL's for broken files; no row at all
            raise InputError(f"{self.name}: cannot read the image of row {row}: {one_line(error)}") from error
        if not hasattr(picture, "convert"):
            raise InputError(f"{self.name}: column {self._image} holds {type(picture).__name__}: must hold images")
        return picture
