"""Image files of one's own: parquet files of encoded images, and folders with one subfolder a class."""

from __future__ import annotations

import io
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wideberth.checks import InputError, at_least, one_line
from wideberth.data.sources import Data
from wideberth.data.splits import InMemory, Lazy, Source


class ParquetImages(Data):
    """Two parquet files of PNG or JPEG images, laid out as data sets of the Hugging Face hub; decoded into memory.

    Images have the size and the channels (one if grey, else three) of the first training image. With a
    row limit the source ends there, and no further image is decoded.

    Args:
        train: path of the training file, with a column `image` or `img` (bytes, or a struct that holds `bytes`) and
            a column of integer labels.
        test: path of the test file, laid out alike.
        label: name of the label column.
        classes: number of classes; one more than the largest training label if None.
        limits: see `Data`.

    Raises:
        InputError: a file that is missing, broken or empty, a column that is missing, an image that cannot be
            decoded or has another size, a label outside 0..classes-1.
    """

    def __init__(
        self, train: str, test: str, *, label: str = "label", classes: int | None = None, **limits: Any
    ) -> None:
        super().__init__(**limits)
        self._files = {True: _Parquet("train", train, label), False: _Parquet("test", test, label)}
        first = self._files[True].first()
        self._mode = mode_of(first)
        self.shape = (len(self._mode), first.height, first.width)
        self.classes = int(self._files[True].labels().max()) + 1 if classes is None else classes

    def _load(self, train: bool) -> Source:
        file = self._files[train]
        names = (f"images of {file.name}", f"labels of {file.name}")
        rows = min(self._limits[train] or file.rows, file.rows)  # decoding is what takes long: no more than needed
        images, labels = file.images(self._mode, self.shape, rows), file.labels()[:rows]
        return InMemory(images, labels, classes=self.classes, names=names)


class _Parquet:
    """One parquet file of images: the columns found, every failure a message that names the file."""

    def __init__(self, argument: str, path: str, label: str) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        self.name = f"{argument}={path!r}"
        if not Path(path).is_file():
            raise InputError(f"{self.name}: no such file")
        try:
            self.path = path
            schema, self.rows = pq.read_schema(path), pq.read_metadata(path).num_rows
        except (OSError, pa.ArrowException) as error:
            raise InputError(f"{self.name}: not a readable parquet file: {one_line(error)}") from error
        columns = [name for name in ("image", "img") if name in schema.names]
        if not columns or label not in schema.names:
            wanted = label if columns else "image or img"
            raise InputError(f"{self.name}: has no column {wanted}, only {', '.join(schema.names)}")
        if self.rows == 0:
            raise InputError(f"{self.name}: must have at least one row")
        kind = schema.field(columns[0]).type
        self.nested = pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0
        if not (self.nested or pa.types.is_binary(kind) or pa.types.is_large_binary(kind)):
            raise InputError(f"{self.name}: column {columns[0]} is {kind}: must be bytes or a struct that holds bytes")
        if not pa.types.is_integer(schema.field(label).type):
            raise InputError(f"{self.name}: column {label} is {schema.field(label).type}: must be integer classes")
        self.image, self.label = columns[0], label

    def _batches(self, column: str, size: int = 1024) -> Any:
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            # Without buffering ahead, so that the first image does not cost a whole row group.
            with pq.ParquetFile(self.path, pre_buffer=False) as file:
                for batch in file.iter_batches(size, columns=[column]):
                    yield batch.column(0)
        except (OSError, pa.ArrowException) as error:
            raise InputError(f"{self.name}: cannot read column {column}: {one_line(error)}") from error

    def _encoded(self, size: int = 1024) -> Any:
        for column in self._batches(self.image, size):
            yield from (column.field("bytes") if self.nested else column).to_pylist()

    def _open(self, row: int, encoded: bytes | None) -> Any:
        from PIL import Image

        try:
            image = Image.open(io.BytesIO(encoded or b""))
            image.load()
        except (OSError, ValueError, SyntaxError) as error:  # what PIL raises for broken files
            raise InputError(f"{self.name}: cannot decode the image of row {row}: {one_line(error)}") from error
        return image

    def first(self) -> Any:
        """The first image, a PIL image as stored."""
        return self._open(0, next(self._encoded(size=1)))

    def labels(self) -> Tensor:
        """(n,) int64."""
        columns = list(self._batches(self.label))
        if any(column.null_count for column in columns):
            raise InputError(f"{self.name}: column {self.label} has missing values: must be integer classes")
        return torch.cat([torch.tensor(column.to_numpy(), dtype=torch.int64) for column in columns])

    def images(self, mode: str, shape: tuple[int, ...], rows: int) -> Tensor:
        """(rows, *shape) uint8, the first images, converted to the PIL mode."""
        channels, height, width = shape
        images = torch.empty(rows, height, width, channels, dtype=torch.uint8)
        for row, encoded in enumerate(islice(self._encoded(), rows)):
            image = self._open(row, encoded)
            if image.size != (width, height):
                raise InputError(
                    f"{self.name}: the image of row {row} is {image.height}x{image.width}: must be {height}x{width} "
                    "as the first training image"
                )
            pixels = torch.frombuffer(bytearray(image.convert(mode).tobytes()), dtype=torch.uint8)
            images[row] = pixels.view(height, width, channels)
        return images.permute(0, 3, 1, 2).contiguous()


class ImageFolders(Data):
    """A folder with train/ and test/ (or val/, where there is no test/), one subfolder a class; decoded when needed.

    Images become RGB, are resized so that the shorter side is `size` and cropped to the central square.

    Args:
        root: the folder.
        size: height and width of an input.
        resize: shorter side of a test image before it is cropped, >= size; `size` if None.
        limits: see `Data`.

    Raises:
        InputError: a folder that is missing or empty, classes that differ between train and test, an image that
            cannot be decoded.
    """

    _by_class = True

    def __init__(self, root: str, size: int = 224, resize: int | None = None, **limits: Any) -> None:
        super().__init__(**limits)
        at_least("size", size, 1)
        if resize is not None:
            at_least("resize", resize, size)
        base = Path(root).expanduser()
        self._folders = {True: base / "train", False: self._test_folder(base)}
        self._shorter = {True: size, False: resize or size}
        classes = {train: _subfolders(root, folder) for train, folder in self._folders.items()}
        if classes[True] != classes[False]:
            odd = sorted(set(classes[True]) ^ set(classes[False]))
            raise InputError(
                f"root={root!r}: {odd[0]} is a class in only one of train and {self._folders[False].name}: "
                "both must have the same classes"
            )
        at_least(f"class folders in {self._folders[True]}", len(classes[True]), 2)
        self.classes, self.shape = len(classes[True]), (3, size, size)
        self._root = root

    def _test_folder(self, base: Path) -> Path:
        return base / "test" if (base / "test").is_dir() else base / "val"

    def _load(self, train: bool) -> Source:
        from torchvision.datasets import ImageFolder

        transform = square(self.shape[-1], self._shorter[train])
        try:
            dataset = ImageFolder(self._folders[train], transform=transform, loader=_read_image)
        except OSError as error:
            raise InputError(f"root={self._root!r}: {one_line(error)}") from error
        return Lazy(dataset, classes=self.classes, name=str(self._folders[train]))


class ImageNet(ImageFolders):
    """ImageNet (Russakovsky et al., 2015), or any part of its classes: train/WNID/*.JPEG and val/WNID/*.JPEG.

    Test images are resized so that the shorter side is 8/7 of `size` (256 for 224) and cropped to the central square,
    as everywhere. Training images are resized so that the shorter side is `size`, and cropped likewise; crops at random
    are `RandomResizedCrop`, on the device. That differs from the usual order, a crop at random of the whole file: what
    is left and right of the central square (above and below it) is never seen, and a small crop is blurred.

    Args:
        root: the folder; its test/, where there is one, holds no labels and is not read.
        size: height and width of an input.
        resize: shorter side of a test image before it is cropped, >= size; 8/7 of `size` if None.
        test_files: a text file that names the test images, WNID/NAME.JPEG, one a line, such as the 5,000 on which
            RobustBench judges; `test_rows` takes the first of them. All images if None, of which `test_rows` takes a
            random sample, not theirs.
        limits: see `Data`.

    Raises:
        InputError: as `ImageFolders`; a list that cannot be read, or that names what is not there.
    """

    def __init__(
        self, root: str, size: int = 224, resize: int | None = None, test_files: str | None = None, **limits: Any
    ) -> None:
        super().__init__(root, size, size * 8 // 7 if resize is None else resize, **limits)
        if test_files is not None and not Path(test_files).is_file():
            raise InputError(f"test_files={test_files!r}: no such file")
        self._test_files = test_files

    def _test_folder(self, base: Path) -> Path:
        return base / "val"

    def _first_rows(self, train: bool, most: int | None = None) -> Tensor:
        if train or self._test_files is None:
            return super()._first_rows(train, most)
        names = [line.strip() for line in Path(self._test_files).read_text().splitlines() if line.strip()]
        source, limit = self._source(train), self._limits[train]
        assert isinstance(source, Lazy)
        folder: Any = source.dataset
        rows = {Path(path).relative_to(folder.root).as_posix(): row for row, (path, _) in enumerate(folder.samples)}
        if len(names) < (limit or 1):
            raise InputError(f"test_files={self._test_files!r}: names {len(names)} images, not {limit or 'any'}")
        for name in names:
            if name not in rows:
                raise InputError(f"test_files={self._test_files!r}: there is no {name} in {folder.root}")
        return torch.tensor([rows[name] for name in names[:limit][:most]])


def square(size: int, shorter: int) -> Any:
    """A transform of PIL images: resize so that the shorter side is `shorter`, crop the central square, to uint8."""
    from torchvision.transforms import v2

    return v2.Compose([v2.Resize(shorter), v2.CenterCrop(size), v2.PILToTensor()])


def mode_of(image: Any) -> str:
    """What images like this PIL image are converted to: "L" (grey, one channel) or "RGB" (three)."""
    return "L" if image.mode in ("1", "L", "LA") else "RGB"


def _subfolders(root: str, folder: Path) -> list[str]:
    if not folder.is_dir():
        wanted = "train" if folder.name == "train" else "test or val"
        raise InputError(f"root={root!r}: has no folder {wanted}; must hold train/ and test/ or val/")
    names = sorted(entry.name for entry in folder.iterdir() if entry.is_dir())
    if not names:
        raise InputError(f"root={root!r}: {folder} is empty; must hold one folder of images a class")
    return names


def _read_image(path: str) -> Any:
    from PIL import Image

    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, ValueError, SyntaxError) as error:  # what PIL raises for broken files
        raise InputError(f"{path}: cannot decode this image: {one_line(error)}") from error
