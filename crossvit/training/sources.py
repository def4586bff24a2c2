"""Labelled images: a folder, a tar file, or any name of timm's data-set factory."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

INSTALL = 'pip install "crossvit-kernels[train]"'
#: Prefixes of timm's data-set factory; the streams have no random access.
NAMED = ("torch/", "hfds/", "hfids/", "tfds/", "wds/")
_STREAMS = ("hfids/", "tfds/", "wds/")
_VALIDATION = ("validation", "val", "valid", "eval", "evaluation", "test")
_TRAINING = ("train", "training")


@dataclasses.dataclass(frozen=True)
class Source:
    """The images of one split.

    Attributes:
        dataset: A data set of timm or torchvision without transforms.
        name: What the user called it, for messages.
        streams: Whether images come in the data set's own order, without random access.
        class_to_index: Class names and their numbers; None if the data set has none.
        mode: PIL's mode that images are converted to.
    """

    dataset: Any
    name: str
    streams: bool
    class_to_index: dict[str, int] | None
    mode: str

    def __len__(self) -> int:
        return len(self.dataset)

    @property
    def num_classes(self) -> int | None:
        """Number of classes, if known."""
        return None if self.class_to_index is None else 1 + max(self.class_to_index.values())

    @property
    def class_names(self) -> list[str] | None:
        """Names by class number, if known."""
        if self.class_to_index is None:
            return None
        names = {index: name for name, index in self.class_to_index.items()}
        return [str(names.get(i, i)) for i in range(self.num_classes or 0)]


def open_source(
    data: str,
    split: str = "validation",
    *,
    root: str | None = None,
    download: bool = False,
    in_chans: int = 3,
    class_to_index: dict[str, int] | None = None,
    training: bool = False,
    batch_size: int = 1,
    num_samples: int | None = None,
    seed: int = 0,
) -> Source:
    """Open the images of one split.

    Args:
        data: A folder with one subfolder of images per class, or with such folders ``train`` and
            ``validation`` (or ``val``, ``test``); a tar file of such a folder; or a name of timm's
            factory: ``torch/cifar10``, ``hfds/owner/name``, ``wds/name``, ...
        split: ``train``, ``validation``, or what the named data set calls its splits.
        root: Where a named data set is, or is cached.
        download: Download a named data set if it is not there.
        in_chans: 3 for colour, 1 for grey.
        class_to_index: Numbers of the classes, usually those of the training images: a folder that
            lacks a class would otherwise number the rest differently.
        training: Whether a stream is shuffled and repeated to fill every process's batches.
        batch_size: Images per batch of one process, for streams.
        num_samples: Number of images, for streams that do not know it.
        seed: Of a stream's shuffling.

    Raises:
        ValueError: There is no such folder, data set or split, it has no images, or classes differ.
        ImportError: A package that this source needs is not installed.
    """
    mode = {3: "RGB", 1: "L"}.get(in_chans)
    if mode is None:
        raise ValueError(f"in_chans: expected 3 (colour) or 1 (grey) for images, found {in_chans}")
    try:
        from timm.data.dataset_factory import create_dataset
    except ImportError as error:
        raise ImportError(f"labelled images need timm and torchvision: {INSTALL}") from error
    named = data.lower().startswith(NAMED)
    options: dict[str, Any] = {"input_img_mode": mode}
    if named:
        options |= {"root": root, "download": download}
        if data.lower().startswith(_STREAMS):
            options |= {
                "is_training": training,
                "batch_size": batch_size,
                "num_samples": num_samples,
                "seed": seed,
            }
        if data.lower().startswith("torch/"):
            del options["input_img_mode"]  # torchvision's data sets do not know it
    else:
        folder = _folder(Path(data), split)
        if class_to_index is not None:
            _refuse_other_classes(folder, class_to_index)
        options |= {"root": str(folder), "class_map": class_to_index}
    try:
        dataset = create_dataset(data if named else "", split=split, search_split=False, **options)
    except ImportError as error:
        raise ImportError(f"{data}: {error}") from error
    except Exception as error:  # assertions, and errors of any library behind a name
        raise ValueError(f"data: cannot open {data}, split {split!r}: {_reason(error)}") from error
    streams = data.lower().startswith(_STREAMS)
    source = Source(dataset, data, streams, _classes(dataset), mode)
    if not streams and len(source) == 0:
        raise ValueError(f"data: {data}, split {split!r}, has no images")
    if not named and "" in (source.class_to_index or {}):
        raise ValueError(f"data: {folder} has images in no class folder; expected CLASS/IMAGE")
    return source


def find_split(folder: Path, split: str) -> Path | None:
    """Return the subfolder of a split, called by any of its usual names; None if there is none."""
    names = next((group for group in (_TRAINING, _VALIDATION) if split in group), ())
    found = (folder / name for name in (split, *names) if (folder / name).is_dir())
    return next(found, None)


def _folder(path: Path, split: str) -> Path:
    """The folder of a split's classes, or a tar file of them."""
    if path.is_file() and path.suffix == ".tar":
        return path
    if not path.is_dir():
        kind = "is no folder and no tar file" if path.exists() else "does not exist"
        raise ValueError(
            f"data: {path} {kind}, and it is no name of timm's data sets ({', '.join(NAMED)})"
        )
    found = find_split(path, split)
    if found is None and find_split(path, "train" if split in _VALIDATION else "validation"):
        raise ValueError(
            f"data: {path} has no folder for the split {split!r}, only "
            f"{', '.join(sorted(entry.name for entry in path.iterdir() if entry.is_dir()))}"
        )
    return found or path


def _classes(dataset: Any) -> dict[str, int] | None:
    for owner in (getattr(dataset, "reader", None), dataset):
        for attribute in ("class_to_idx", "class_name_to_idx"):  # the latter of tar files
            if classes := getattr(owner, attribute, None):
                return dict(classes)
    return None


def _refuse_other_classes(folder: Path, expected: dict[str, int]) -> None:
    """Raise ValueError if there are classes that timm would leave out silently."""
    from timm.data.readers.img_extensions import get_img_extensions

    extensions = get_img_extensions(as_set=True)
    images = (path for path in folder.rglob("*") if path.suffix.lower() in extensions)
    other = sorted({path.parent.name for path in images} - set(expected))
    if other:
        raise ValueError(
            f"data: {folder} has classes that the training images do not: "
            f"{', '.join(other[:5])}{', ...' if len(other) > 5 else ''}"
        )


def _reason(error: Exception) -> str:
    text = str(error).strip().replace("download=True", "--download")
    return text or type(error).__name__
