"""Stores the frozen encoders' features on disk, so that later epochs skip the encoders.

A feature is the output of `Segmenter.encode` for one view (flip and rotation) of one of the tiles
that cover an image. The file name contains hashes of the encoders and of the image's bytes, the
arithmetic, the image's size at the model's um per pixel, the tile's position and the view. If one
of them changes, so does the name. Runs can therefore share a folder.

Training sees only cached views. So tiles have fixed positions, as in serving. They are flipped and
rotated (`--augment dihedral`, 8 views) or left unchanged (`none`).
"""

import copy
import hashlib
import shutil
import zlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from rich.console import Console
from rich.progress import track
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from train.data.augmentation import NUM_VIEWS, turn
from train.data.dataset import TileDataset, WholeImageDataset
from train.errors import ImageFileError, StorageError
from train.files import sha256_of, whole_file, write_errors_explained
from train.model.encoder_kinds import with_kind_written_out
from train.model.pathology_encoder import architecture, timm_args
from train.model.segmenter import Segmenter, encode_for_training, encodes_in_bfloat16
from train.settings import ModelSettings, Settings

D = TypeVar("D", TileDataset, WholeImageDataset)


class EmbeddingCache:
    """Features by tile and view, one file each, with a checksum that is verified when read."""

    def __init__(self, settings: Settings, segmenter: Segmenter) -> None:
        """Prepare a cache for the encoders of `segmenter`, on its device."""
        runtime = settings.runtime
        assert runtime.embedding_cache is not None
        self._dtype = getattr(torch, runtime.embedding_dtype)
        self._mixed_precision = settings.mixed_precision
        self._segmenter = segmenter
        bfloat16 = encodes_in_bfloat16(
            segmenter.pixel_mean.device, mixed_precision=settings.mixed_precision
        )
        arithmetic = "bf16" if bfloat16 else "fp32"
        self.folder = Path(runtime.embedding_cache) / (
            f"{_fingerprint(segmenter, settings.model)}-{segmenter.tile_size_px}-{arithmetic}-"
            f"{runtime.embedding_dtype}"
        )

    def fill(self, dataset: TileDataset | WholeImageDataset, views: range, batch_size: int) -> None:
        """Encode every view of every tile that is not in the cache yet.

        Raises:
            StorageError: the disk is too full, or cannot be written. Files already written stay
                intact.
        """
        missing: dict[int, list[tuple[int, int, Path]]] = {}
        names = list(_tile_stems(dataset))
        for index, stems in enumerate(names):
            for number, stem in enumerate(stems):
                for view in views:
                    if not (path := self._path(stem, view)).is_file():
                        missing.setdefault(index, []).append((number, view, path))
        if not missing:
            return
        self._check_room(sum(map(len, missing.values())))
        with write_errors_explained(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        for index, left in track(missing.items(), "Encoding images for the cache"):
            tiles = dataset.fixed_tiles(index)
            if _stems_of(dataset, index) != names[index]:
                raise ImageFileError(
                    f"{dataset.tiles[index].image} was replaced while it was encoded for the "
                    "cache. Start again once the data set is whole."
                )
            for start in range(0, len(left), batch_size):
                part = left[start : start + batch_size]
                images = torch.stack([turn(tiles[number], view) for number, view, _ in part])
                for (_, _, path), features in zip(part, self._encode(images), strict=True):
                    self._write(path, features)

    def _path(self, stem: str, view: int) -> Path:
        return self.folder / f"{stem}-{view}.safetensors"

    def in_place_of_pixels(self, dataset: D) -> D:
        """The same data with features of the cache, which must have them, in place of pixels."""
        cached = copy.copy(dataset)
        cached.features = partial(self._features_of, list(_tile_stems(dataset)))
        return cached

    def _features_of(self, stems: list[list[str]], image: int, number: int, view: int) -> Tensor:
        return self.read(self._path(stems[image][number], view))

    def read(self, path: Path) -> Tensor:
        """Read (D, H/16, W/16) features.

        Raises:
            StorageError: the file is damaged.
        """
        try:
            with safe_open(path, framework="pt") as file:
                features: Tensor = file.get_tensor("features")
                expected = (file.metadata() or {}).get("crc32")
        except (SafetensorError, OSError) as error:
            raise _damaged(path, str(error)) from error
        if _checksum(features) != expected:
            raise _damaged(path, "its checksum differs")
        return features

    @torch.no_grad()
    def _encode(self, images: Tensor) -> Tensor:
        images = images.to(self._segmenter.pixel_mean.device)
        features = encode_for_training(
            self._segmenter, images, mixed_precision=self._mixed_precision
        )
        return features.to(self._dtype).cpu()

    def _write(self, path: Path, features: Tensor) -> None:
        features = features.contiguous()
        with whole_file(path) as partial:
            save_file({"features": features}, partial, {"crc32": _checksum(features)})

    def _check_room(self, num_files: int) -> None:
        """Print the size before anything is written; refuse if it does not fit."""
        side = self._segmenter.tile_size_px // 16
        num_channels = self._segmenter.num_features
        num_bytes = num_files * num_channels * side * side * self._dtype.itemsize
        place = next(parent for parent in (self.folder, *self.folder.parents) if parent.exists())
        free = shutil.disk_usage(place).free
        Console().print(
            f"Embedding cache: {num_files} views, {num_bytes / 2**30:.2f} GiB in {self.folder} "
            f"({free / 2**30:.1f} GiB free)",
            markup=False,
        )
        if num_bytes > free:
            raise StorageError(
                f"the embedding cache needs {num_bytes / 2**30:.2f} GiB in {self.folder}, where "
                f"{free / 2**30:.2f} GiB are free. Choose another --embedding-cache, or "
                f"--augment none, which stores 1 view per tile instead of {NUM_VIEWS}."
            )


def _tile_stems(dataset: TileDataset | WholeImageDataset) -> Iterator[list[str]]:
    """Per image, the file names of its tiles' features, without the view."""
    return (_stems_of(dataset, index) for index in range(len(dataset.tiles)))


def _stems_of(dataset: TileDataset | WholeImageDataset, index: int) -> list[str]:
    placement = dataset.placements[index]
    digest = sha256_of(dataset.tiles[index].image)[:32]
    rows, columns = placement.size
    return [f"{digest}-{rows}x{columns}-{y}-{x}" for y, x in placement.places]


def _fingerprint(segmenter: Segmenter, model: ModelSettings) -> str:
    """Hash of the encoders' architectures, weights and normalisation.

    Heads and activations, for example, leave no trace in the weights.
    """
    model = with_kind_written_out(model)
    described = model.image_encoder, architecture(model), sorted(timm_args(model).items())
    digest = hashlib.sha256(repr(described).encode())
    for part in (segmenter.image_encoder, segmenter.pathology_encoder):
        for name, value in (*part.state_dict().items(), *part.named_buffers()):
            digest.update(name.encode())
            digest.update(value.detach().cpu().contiguous().numpy())
    return digest.hexdigest()[:16]


def _checksum(features: Tensor) -> str:
    return f"{zlib.crc32(features.contiguous().view(torch.uint8).numpy().tobytes()):08x}"


def _damaged(path: Path, reason: str) -> StorageError:
    return StorageError(f"{path} in the embedding cache is damaged: {reason}. Delete the file.")
