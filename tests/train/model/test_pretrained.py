import argparse
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from tests.support.errors import raises
from tests.support.sam_path_oracle import sam_of
from tests.support.toy_data import TILE_SIZE_PX, toy_settings
from train.errors import WeightsError
from train.fitting.run import fit
from train.model.pretrained import load_sam_weights, load_vit
from train.model.segmenter import Segmenter
from train.model.weight_files import read_weights
from train.model.weight_names import as_timm

NUM_CLASSES = 5


def load_file_of_vit(segmenter: Segmenter, path: Path) -> None:
    load_vit(segmenter, as_timm(read_weights(path), path), path)


@pytest.fixture
def segmenter() -> Segmenter:
    torch.manual_seed(0)
    return Segmenter(toy_settings().model, NUM_CLASSES).eval()


@pytest.fixture(scope="module")
def sam_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sam") / "sam.pth"
    torch.manual_seed(1)
    torch.save(sam_of(TILE_SIZE_PX).state_dict(), path)
    return path


def test_sam_weights_load_into_encoder_prompt_and_decoder(segmenter: Segmenter, sam_file: Path):
    load_sam_weights(segmenter, sam_file)
    published, ours = torch.load(sam_file, weights_only=True), segmenter.state_dict()
    shared = [name for name in ours if name in published and "mlps" not in name]
    shared = [name for name in shared if ours[name].shape == published[name].shape]
    assert len(shared) > 100
    assert all(torch.equal(ours[name], published[name]) for name in shared)


def test_sams_encoder_gives_the_same_features_after_loading(segmenter: Segmenter, sam_file: Path):
    load_sam_weights(segmenter, sam_file)
    torch.manual_seed(1)
    sam = sam_of(TILE_SIZE_PX).eval()
    sam.image_encoder.neck = nn.Identity()
    image = torch.randn(1, 3, TILE_SIZE_PX, TILE_SIZE_PX)
    torch.testing.assert_close(segmenter.image_encoder(image), sam.image_encoder(image))


def test_every_hypernetwork_starts_from_sams_single_mask_one(segmenter: Segmenter, sam_file: Path):
    load_sam_weights(segmenter, sam_file)
    name = "mask_decoder.output_hypernetworks_mlps.{}.layers.0.weight"
    expected = torch.load(sam_file, weights_only=True)[name.format(0)]
    ours = segmenter.state_dict()
    assert all(torch.equal(ours[name.format(index)], expected) for index in range(NUM_CLASSES + 2))


def test_only_the_single_mask_token_comes_from_sam(segmenter: Segmenter, sam_file: Path):
    name = "mask_decoder.mask_tokens.weight"
    before = segmenter.state_dict()[name].clone()
    load_sam_weights(segmenter, sam_file)
    after = segmenter.state_dict()[name]
    assert torch.equal(after[0], torch.load(sam_file, weights_only=True)[name][0])
    assert torch.equal(after[1:], before[1:])


def test_position_embeddings_of_another_tile_size_are_resized(segmenter: Segmenter, tmp_path: Path):
    sam = sam_of(2 * TILE_SIZE_PX)
    with torch.no_grad():
        sam.image_encoder.pos_embed.fill_(0.25)
        sam.image_encoder.blocks[1].attn.rel_pos_h.fill_(0.5)
    torch.save(sam.state_dict(), tmp_path / "sam.pth")
    load_sam_weights(segmenter, tmp_path / "sam.pth")
    torch.testing.assert_close(segmenter.image_encoder.pos_embed, torch.full((1, 4, 4, 128), 0.25))
    torch.testing.assert_close(
        segmenter.image_encoder.blocks[1].attn.rel_pos_h, torch.full((7, 32), 0.5)
    )


PATCHES, IOU_TOKEN = "image_encoder.patch_embed.proj.weight", "mask_decoder.iou_token.weight"


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        (PATCHES, torch.zeros(768, 3, 16, 16), "--image-encoder vit_b"),
        (PATCHES, torch.zeros(1024, 3, 16, 16), "--image-encoder vit_l"),
        (PATCHES, torch.zeros(1280, 3, 16, 16), "--image-encoder vit_h"),
        (IOU_TOKEN, torch.zeros(1, 7), f"{IOU_TOKEN} is (1, 7), expected (1, 32)"),
        (IOU_TOKEN, None, f"{IOU_TOKEN} is missing"),
    ],
    ids=["vit_b", "vit_l", "vit_h", "shape", "missing"],
)
def test_sam_weights_that_do_not_fit_are_refused(
    segmenter: Segmenter,
    sam_file: Path,
    tmp_path: Path,
    name: str,
    value: torch.Tensor | None,
    told: str,
):
    weights = torch.load(sam_file, weights_only=True)
    del weights[name]
    if value is not None:
        weights[name] = value
    torch.save(weights, tmp_path / "sam.pth")
    with raises(WeightsError, told):
        load_sam_weights(segmenter, tmp_path / "sam.pth")


@pytest.mark.parametrize("grid", [4, 14])
def test_a_dino_teacher_loads_with_its_prefixes_stripped(
    segmenter: Segmenter, tmp_path: Path, grid: int
):
    vit = {name: v.clone() for name, v in segmenter.pathology_encoder.vit.state_dict().items()}
    teacher = {f"module.backbone.{name}": torch.randn_like(value) for name, value in vit.items()}
    teacher["module.backbone.pos_embed"] = torch.randn(1, 1 + grid * grid, 192)
    teacher["module.head.last_layer.weight_g"] = torch.ones(8, 1)
    content = {
        "student": {"module.backbone.cls_token": torch.zeros(1)},
        "teacher": teacher,
        "args": argparse.Namespace(arch="vit_tiny"),
        "epoch": 3,
    }
    torch.save(content, tmp_path / "dino.pth")
    load_file_of_vit(segmenter, tmp_path / "dino.pth")
    loaded = segmenter.pathology_encoder.vit.state_dict()
    assert torch.equal(loaded["cls_token"], teacher["module.backbone.cls_token"])
    assert torch.equal(
        loaded["blocks.0.attn.qkv.weight"], teacher["module.backbone.blocks.0.attn.qkv.weight"]
    )
    assert loaded["pos_embed"].shape == (1, 1 + 16, 192)
    assert not torch.equal(loaded["pos_embed"], vit["pos_embed"])


def test_pathology_weights_of_another_width_are_refused(segmenter: Segmenter, tmp_path: Path):
    vit = segmenter.pathology_encoder.vit.state_dict()
    torch.save({**vit, "norm.weight": torch.ones(384)}, tmp_path / "vit.pth")
    with raises(WeightsError, "norm.weight", "(384,)", "(192,)"):
        load_file_of_vit(segmenter, tmp_path / "vit.pth")


class Unsafe:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return print, ("code ran",)


def test_a_file_that_would_run_code_is_refused(
    segmenter: Segmenter, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    torch.save({"weight": Unsafe()}, tmp_path / "evil.pth")
    with raises(WeightsError, "print", "state_dict()"):
        load_sam_weights(segmenter, tmp_path / "evil.pth")
    assert "code ran" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"", "empty"),
        (b"hello\n", "plain text"),
        (b"\n<!DOCTYPE html><html>Log in</html>", "HTML"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "git-LFS"),
        (b'{"error": "not found"}', "JSON"),
        (b"\x1f\x8b\x08\x00\x00", "gzip"),
        (bytes(range(200, 256)) * 4, "neither"),
        (b"\x80\x02}", "damaged"),
        (b"PK\x03\x04" + 60 * b"\x00", "damaged"),
        ((999).to_bytes(8, "little") + b"{" + 999 * b" ", "damaged"),
    ],
    ids=["empty", "text", "html", "lfs", "json", "gzip", "bytes", "pickle", "zip", "safetensors"],
)
def test_a_file_that_is_something_else_is_told_in_one_sentence(
    tmp_path: Path, content: bytes, found: str
):
    path = tmp_path / "sam.pth"
    path.write_bytes(content)
    with raises(WeightsError, found) as raised:
        read_weights(path)
    assert "weights_only" not in str(raised.value)
    assert "\x1b" not in str(raised.value)


def test_half_a_download_is_told_to_be_one(sam_file: Path, tmp_path: Path):
    whole = sam_file.read_bytes()
    for share in (1e-2, 0.1, 0.5, 0.9, 0.99):
        (tmp_path / "half.pth").write_bytes(whole[: round(share * len(whole))])
        with raises(WeightsError, "cut short"):
            read_weights(tmp_path / "half.pth")


def test_the_start_of_a_download_is_told_to_be_one(tmp_path: Path):
    torch.save({"a": torch.ones(9)}, tmp_path / "whole.pth")
    whole = (tmp_path / "whole.pth").read_bytes()
    for num_bytes in range(9, len(whole) - 9, 50):
        (tmp_path / "part.pth").write_bytes(whole[:num_bytes])
        with raises(WeightsError, "cut short"):
            read_weights(tmp_path / "part.pth")


@pytest.mark.parametrize("where", [0.3, 0.5, 0.9])
def test_a_flipped_bit_is_found_by_the_files_own_checksums(
    sam_file: Path, tmp_path: Path, where: float
):
    content = bytearray(sam_file.read_bytes())
    content[int(where * len(content))] ^= 1
    (tmp_path / "flipped.pth").write_bytes(content)
    with raises(WeightsError, "damaged"):
        read_weights(tmp_path / "flipped.pth")


def test_a_file_that_was_written_without_checksums_is_read(tmp_path: Path):
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"weight": torch.arange(4.0)}, tmp_path / "fast.pth")
    finally:
        torch.serialization.set_crc32_options(True)
    assert read_weights(tmp_path / "fast.pth")["weight"].tolist() == [0, 1, 2, 3]


def test_archives_of_something_else_are_told_from_damaged_ones(tmp_path: Path):
    np.savez(tmp_path / "arrays.pth", weight=np.ones(3))
    with raises(WeightsError, "zip archive of something else"):
        read_weights(tmp_path / "arrays.pth.npz")
    with zipfile.ZipFile(tmp_path / "program.pth", "w") as archive:
        for name in ("data.pkl", "constants.pkl", "code/__torch__.py"):
            archive.writestr(f"program/{name}", b"")
    with raises(WeightsError, "TorchScript", "state_dict()"):
        read_weights(tmp_path / "program.pth")


def test_safetensors_are_read_whatever_their_name(tmp_path: Path):
    save_file({"weight": torch.arange(3)}, tmp_path / "vit.pth")
    assert read_weights(tmp_path / "vit.pth")["weight"].tolist() == [0, 1, 2]


def test_numpy_values_beside_the_weights_are_read_past(tmp_path: Path):
    content = {"teacher": {"a": torch.ones(1)}, "loss": np.float64(3), "seen": np.zeros(2)}
    torch.save(content, tmp_path / "dino.pth")
    assert read_weights(tmp_path / "dino.pth")["teacher"]["a"].item() == 1


def test_missing_weights_say_where_they_come_from_and_under_which_licence(
    segmenter: Segmenter, tmp_path: Path
):
    with raises(WeightsError, "Apache-2.0", "vit_h", "Commons Clause", "CC-BY-NC-ND"):
        load_sam_weights(segmenter, tmp_path / "sam_vit_b.pth")


@pytest.mark.slow
def test_frozen_encoders_keep_the_published_weights(
    toy_data: Path, sam_file: Path, segmenter: Segmenter, tmp_path: Path
):
    torch.save(segmenter.pathology_encoder.vit.state_dict(), tmp_path / "vit.pth")
    settings = toy_settings(
        weights={"sam_weights": str(sam_file), "pathology_weights": str(tmp_path / "vit.pth")},
        model={"bias": "none", "encoders_frozen": True},
    )
    fit(settings, toy_data, tmp_path / "run")
    trained = torch.load(tmp_path / "run" / "last.ckpt", weights_only=True)["state_dict"]
    published = torch.load(sam_file, weights_only=True)
    name = "image_encoder.blocks.3.mlp.lin2.weight"
    assert torch.equal(trained[f"segmenter.{name}"], published[name])
    name = "mask_decoder.iou_token.weight"
    assert not torch.equal(trained[f"segmenter.{name}"], published[name])


@pytest.mark.parametrize("nested", ["", "state_dict", "model"])
@pytest.mark.parametrize("wrapper", ["", "module.", "sam."])
def test_sam_weights_of_a_training_may_be_nested_and_wrapped(
    segmenter: Segmenter, sam_file: Path, tmp_path: Path, nested: str, wrapper: str
):
    published = torch.load(sam_file, weights_only=True)
    content = {wrapper + name: value for name, value in published.items()}
    torch.save({nested: content, "epoch": 3} if nested else content, tmp_path / "sam.pth")
    load_sam_weights(segmenter, tmp_path / "sam.pth")
    name = "image_encoder.pos_embed"
    assert torch.equal(segmenter.state_dict()[name], published[name])


FEW = torch.zeros(2, 2)
REGISTERS = {"register_tokens": torch.zeros(1, 4, 192)}


@pytest.mark.parametrize(
    "odd",
    [
        {1: FEW},
        {("a", "b"): FEW},
        {"cls_token": FEW.to(torch.int8)},
        {"cls_token": FEW > 0},
        {"cls_token": FEW.to(torch.float8_e4m3fn)},
        {"cls_token": FEW.to(torch.complex64)},
        {"cls_token": FEW.to("meta")},
        {"pos_embed": torch.zeros(5)},
        {"pos_embed": torch.zeros(1, 5, 3), **REGISTERS},
        {"pos_embed": torch.zeros(5), **REGISTERS},
        {"patch_embed.proj.weight": torch.tensor(0.0)},
        {"blocks.0.mlp.fc1.weight": torch.tensor(0.0)},
        {"blocks.0.attn.query.weight": FEW, "embeddings.cls_token": FEW},
        {"image_encoder.pos_embed": torch.zeros(4, 4, 128)},
        {"image_encoder.pos_embed": torch.zeros(1, 0, 0, 128)},
        {"image_encoder.blocks.0.attn.rel_pos_h": torch.zeros(0, 32)},
        {"image_encoder.patch_embed.proj.weight": torch.tensor(0.0)},
    ],
)
def test_weights_of_another_form_are_one_error(
    segmenter: Segmenter, sam_file: Path, tmp_path: Path, odd: dict[object, torch.Tensor]
):
    whole = torch.load(sam_file, weights_only=True)
    path = tmp_path / "weights.pth"
    torch.save({**whole, **odd}, path)
    with raises(WeightsError, path):
        load_sam_weights(segmenter, path)
    torch.save({**segmenter.pathology_encoder.vit.state_dict(), **odd}, path)
    with raises(WeightsError, path):
        load_file_of_vit(segmenter, path)
