import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from lightning.pytorch.strategies import SingleDeviceStrategy
from safetensors.torch import load_file

from tests.support.errors import raises
from tests.support.meanwhile import before_call
from tests.support.toy_data import TILE_SIZE_PX, changed, toy_settings
from train.data.dataset import TileDataset
from train.data.folder import read_tile_folder
from train.data.scale import TileScale
from train.errors import ImageFileError, SettingsError, StorageError
from train.fitting.embedding_cache import EmbeddingCache
from train.fitting.run import fit
from train.fitting.task import SegmentationTask
from train.model.segmenter import Segmenter
from train.settings import (
    AugmentationSettings,
    ModelSettings,
    RuntimeSettings,
    Settings,
)

SCALE = TileScale(tile_size_px=TILE_SIZE_PX, mpp=0.5)
DIHEDRAL = AugmentationSettings(augment="dihedral", num_workers=0)


def frozen_settings(cache: Path | None) -> Settings:
    return toy_settings(
        model={"encoders_frozen": True},
        augmentation=DIHEDRAL,
        weights={"random_encoders": True},
        runtime={"embedding_cache": cache and str(cache)},
    )


@pytest.fixture(scope="module")
def segmenter() -> Segmenter:
    torch.manual_seed(0)
    return Segmenter(frozen_settings(None).model, 5).eval()


@pytest.fixture(scope="module")
def dataset(toy_data: Path) -> TileDataset:
    tiles = read_tile_folder(toy_data).tiles["training"]
    return TileDataset(tiles, 5, SCALE, DIHEDRAL, seed=3, fixed=True)


@pytest.fixture
def cache(segmenter: Segmenter, tmp_path: Path) -> EmbeddingCache:
    return EmbeddingCache(frozen_settings(tmp_path / "cache"), segmenter)


def test_cached_features_are_those_of_the_augmented_image(
    cache: EmbeddingCache, dataset: TileDataset, segmenter: Segmenter
):
    cache.fill(dataset, range(8), batch_size=4)
    cached = cache.in_place_of_pixels(dataset)
    for key in [(0, 5), (1, 5), (1, 5, 1), (1, 5, 2)]:
        plain, sample = dataset[key], cached[key]
        expected = segmenter.encode(plain["image"][None].float())[0]
        torch.testing.assert_close(sample["features"].float(), expected, atol=2e-2, rtol=2e-3)
        assert torch.equal(sample["labels"], plain["labels"])


def test_what_is_there_is_not_encoded_again(
    cache: EmbeddingCache, dataset: TileDataset, monkeypatch: pytest.MonkeyPatch
):
    cache.fill(dataset, range(1), batch_size=4)
    monkeypatch.setattr(Segmenter, "encode", None)
    cache.fill(dataset, range(1), batch_size=4)


def test_other_weights_arithmetic_or_normalisation_take_other_files(
    cache: EmbeddingCache, segmenter: Segmenter
):
    torch.manual_seed(9)
    other = Segmenter(frozen_settings(None).model, 5)
    settings = frozen_settings(cache.folder.parent)
    assert EmbeddingCache(settings, other).folder != cache.folder
    assert EmbeddingCache(settings, segmenter).folder == cache.folder
    mixed = changed(settings, optimization={"precision": "bf16-mixed"})
    assert EmbeddingCache(mixed, segmenter).folder != cache.folder
    segmenter.pathology_encoder.mean += 1  # so does another normalisation
    assert EmbeddingCache(settings, segmenter).folder != cache.folder


def test_the_same_weights_in_another_architecture_take_other_files(tmp_path: Path):
    settings = frozen_settings(tmp_path)
    segmenter = Segmenter(settings.model, 5).eval()
    gelu = changed(settings, model={"pathology_args": {"act_layer": "quick_gelu"}})
    other = Segmenter(gelu.model, 5).eval()
    other.load_state_dict(segmenter.state_dict())
    image = torch.randint(0, 256, (1, 3, TILE_SIZE_PX, TILE_SIZE_PX)).float()
    assert not torch.allclose(other.encode(image), segmenter.encode(image), atol=1e-3)
    one = EmbeddingCache(settings, segmenter)
    assert one.folder == EmbeddingCache(settings, segmenter).folder
    assert one.folder != EmbeddingCache(gelu, other).folder


def test_features_of_an_image_are_never_kept_as_those_of_the_one_that_it_replaced(
    toy_data: Path, segmenter: Segmenter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    data = Path(shutil.copytree(toy_data, tmp_path / "data"))
    tiles = read_tile_folder(data).tiles["training"]
    dataset = TileDataset(tiles, 5, SCALE, DIHEDRAL, seed=3, fixed=True)
    cache = EmbeddingCache(frozen_settings(tmp_path / "cache"), segmenter)
    before_call(
        monkeypatch,
        TileDataset,
        "fixed_tiles",
        lambda: shutil.copy(tiles[2].image, tiles[1].image),
        at=1,
    )
    with raises(ImageFileError, tiles[1].image, "was replaced"):
        cache.fill(dataset, range(1), batch_size=4)
    assert len(list(cache.folder.iterdir())) == len(dataset.placements[0].places)


def test_a_damaged_file_is_named(cache: EmbeddingCache, dataset: TileDataset):
    cache.fill(dataset, range(1), batch_size=4)
    path = next(cache.folder.glob("*.safetensors"))
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with raises(StorageError, path.name, "checksum"):
        cache.read(path)
    path.write_bytes(content[:100])
    with raises(StorageError, path.name):
        cache.read(path)


def test_a_cache_that_cannot_fit_is_refused_before_anything_is_written(
    cache: EmbeddingCache, dataset: TileDataset, monkeypatch: pytest.MonkeyPatch
):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage(10, 10, 1000))
    with raises(StorageError, "GiB", cache.folder):
        cache.fill(dataset, range(1), batch_size=4)
    assert not cache.folder.exists()


@pytest.fixture(scope="module")
def cached_run(toy_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that fills its cache."""
    folder = tmp_path_factory.mktemp("cached")
    fit(frozen_settings(folder / "cache"), toy_data, folder / "run")
    return folder / "run"


@pytest.mark.slow
def test_training_from_the_cache_equals_training_from_images(
    cached_run: Path, toy_data: Path, tmp_path: Path
):
    fit(frozen_settings(None), toy_data, tmp_path / "images")
    name = "mask_decoder.mask_tokens.weight"
    expected, found = (
        load_file(run / "model.safetensors")[name] for run in (tmp_path / "images", cached_run)
    )
    torch.testing.assert_close(found, expected, atol=2e-3, rtol=0)


def test_a_folder_that_cannot_be_written_is_told(
    segmenter: Segmenter, dataset: TileDataset, tmp_path: Path
):
    (tmp_path / "file").touch()
    cache = EmbeddingCache(frozen_settings(tmp_path / "file"), segmenter)
    with raises(StorageError, tmp_path / "file"):
        cache.fill(dataset, range(1), batch_size=4)


def test_a_disk_that_fills_up_leaves_no_half_file(
    cache: EmbeddingCache, dataset: TileDataset, monkeypatch: pytest.MonkeyPatch
):
    def full(_: object, path: Path, __: object) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("train.fitting.embedding_cache.save_file", full)
    with raises(StorageError, "No space left"):
        cache.fill(dataset, range(1), batch_size=4)
    assert not list(cache.folder.iterdir())


def test_tiles_are_encoded_on_the_device_that_trains(
    toy_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    class Encoded(Exception):
        pass

    def encode(segmenter: Segmenter, images: torch.Tensor, **_: object) -> torch.Tensor:
        assert segmenter.pixel_mean.device == images.device == torch.device("meta")
        raise Encoded

    monkeypatch.setattr(SingleDeviceStrategy, "root_device", torch.device("meta"))
    monkeypatch.setattr("train.fitting.embedding_cache.encode_for_training", encode)
    monkeypatch.setattr("train.fitting.embedding_cache._fingerprint", lambda *_: "weights")
    with pytest.raises(Encoded):
        fit(frozen_settings(tmp_path / "cache"), toy_data, tmp_path / "run")


@pytest.mark.slow
def test_a_run_resumed_with_the_cache_ends_as_an_unbroken_one(
    cached_run: Path, toy_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    settings = frozen_settings(cached_run.parent / "cache")

    def stop_in_the_second_epoch(task: SegmentationTask, *_: object) -> None:
        if task.global_step == 3:
            raise RuntimeError("stopped")

    monkeypatch.setattr(SegmentationTask, "on_train_batch_start", stop_in_the_second_epoch)
    with pytest.raises(RuntimeError, match="stopped"):
        fit(settings, toy_data, tmp_path / "run")
    monkeypatch.undo()
    fit(settings, toy_data, tmp_path / "run", resume=True)
    unbroken, resumed = ((r / "metrics.csv").read_text() for r in (cached_run, tmp_path / "run"))
    assert unbroken == resumed


@pytest.mark.parametrize(("augment", "frozen"), [("full", True), ("dihedral", False)])
def test_features_that_change_every_epoch_are_not_cached(augment: str, frozen: bool):
    with raises(SettingsError, "--embedding-cache"):
        Settings(
            preset="toy",
            model=ModelSettings(encoders_frozen=frozen),
            augmentation=AugmentationSettings(augment=augment),
            runtime=RuntimeSettings(embedding_cache="cache"),
        )
