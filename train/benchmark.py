"""How long a training step takes, beside a direct SAM-Path loop, in one run.

Every variant takes the same batch, model size (SAM ViT-B, ViT-S/16, 1024 x 1024, random weights),
loss and optimizer. The direct loop does as SAM-Path's published description (arXiv 2307.09570):
encoders in float32 and eager mode, then one image after another through SAM's own decoder.
"""

import json
import platform
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from segment_anything.modeling import MaskDecoder as SamMaskDecoder
from segment_anything.modeling import TwoWayTransformer
from torch import Tensor
from torch.optim import AdamW

from train.embedding_cache import EmbeddingCache
from train.losses import SegmentationLoss
from train.segmenter import Segmenter, SegmenterOutput, encode_for_training
from train.settings import (
    AugmentationSettings,
    BenchmarkSettings,
    ModelSettings,
    RuntimeSettings,
    Settings,
    bcss,
)
from train.tissue import CLASSES, make_tile

Step = Callable[[], float]


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Seconds of one variant's steps."""

    name: str
    seconds: tuple[float, ...]

    @property
    def median_s(self) -> float:
        """The median step."""
        return statistics.median(self.seconds)


class Benchmark:
    """One model, one batch, and the variants of a step on them."""

    def __init__(self, settings: BenchmarkSettings, folder: Path) -> None:
        """Build all of it; the embedding cache goes into `folder`."""
        torch.manual_seed(0)
        self.settings = settings
        self.training = _training_settings(settings)
        self.segmenter = Segmenter(self.training, torch.zeros(len(CLASSES))).train()
        self.loss = SegmentationLoss(self.training.loss)
        rng = np.random.default_rng(0)
        tiles = [make_tile(rng, settings.tile_size_px) for _ in range(settings.batch_size)]
        self.images = torch.stack([torch.from_numpy(image).permute(2, 0, 1) for image, _ in tiles])
        self.labels = torch.stack([torch.from_numpy(labels).long() for _, labels in tiles])
        trained = [p for p in self.segmenter.parameters() if p.requires_grad]
        self.optimizer = AdamW(trained, lr=1e-4)
        self.sam_decoder = self._sams_own_decoder()
        self.feature_files = self._fill_cache(folder)

    def direct(self) -> float:
        """Encoders in float32, then image after image through SAM's own decoder."""
        with torch.no_grad():
            features = self.segmenter.encode(self.images.float())
        return self._learn(self._decode_one_by_one(features))

    def from_images(self) -> float:
        """Our step without a cache: encoders under bfloat16 autocast, the batch decoded at once."""
        features = encode_for_training(self.segmenter, self.images, mixed_precision=True)
        return self._learn(self.segmenter.decode(features))

    def from_cache(self) -> float:
        """Our step on features read from the embedding cache: what every later epoch does."""
        features = torch.stack([self.cache.read(path) for path in self.feature_files])
        return self._learn(self.segmenter.decode(features.float()))

    def decoder_one_by_one(self) -> float:
        """SAM's own decoder, image after image, on features that are there already."""
        features = torch.stack([self.cache.read(path) for path in self.feature_files])
        return self._learn(self._decode_one_by_one(features.float()))

    def _decode_one_by_one(self, features: Tensor) -> SegmenterOutput:
        masks, scores = [], []
        for embedding in self.segmenter.neck(features):
            no_mask = self.segmenter.prompt_encoder.no_mask_embed.weight.reshape(1, -1, 1, 1)
            size = embedding.shape[-2:]
            mask, iou = self.sam_decoder(
                image_embeddings=embedding.unsqueeze(0),
                image_pe=self.segmenter.prompt_encoder.pe_layer(size).unsqueeze(0),
                sparse_prompt_embeddings=torch.zeros(1, 0, embedding.shape[0]),
                dense_prompt_embeddings=no_mask.expand(-1, -1, *size),
                multimask_output=True,
            )
            masks.append(mask)
            scores.append(iou)
        return SegmenterOutput(torch.cat(masks), torch.cat(scores))

    def _learn(self, output: SegmenterOutput) -> float:
        loss: Tensor = self.loss(output, self.labels)["loss"]
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()

    def _sams_own_decoder(self) -> SamMaskDecoder:
        """SAM's decoder on the very weights of ours, so that both learn the same."""
        dim = self.training.model.decoder_dim
        decoder = SamMaskDecoder(
            transformer_dim=dim,
            transformer=TwoWayTransformer(2, dim, num_heads=8, mlp_dim=8 * dim),
            num_multimask_outputs=1 + len(CLASSES),
        )
        ours = dict(self.segmenter.mask_decoder.named_parameters())
        for name, _ in list(decoder.named_parameters()):
            module, _, attribute = name.rpartition(".")
            setattr(decoder.get_submodule(module), attribute, ours[name])
        return decoder

    def _fill_cache(self, folder: Path) -> list[Path]:
        runtime = RuntimeSettings(embedding_cache=str(folder))
        augmentation = AugmentationSettings(augment="dihedral")
        settings = replace(self.training, runtime=runtime, augmentation=augmentation)
        self.cache = EmbeddingCache(settings, self.segmenter)
        self.cache.folder.mkdir(parents=True)
        with torch.no_grad():
            features = self.segmenter.encode(self.images.float())
        paths = [self.cache.path(str(index), 0) for index in range(len(features))]
        for path, feature in zip(paths, features, strict=True):
            self.cache.write(path, feature.half())
        return paths


def run_benchmark(settings: BenchmarkSettings) -> list[Timing]:
    """Take the variants' steps in turn, print a table and write the JSON."""
    with tempfile.TemporaryDirectory() as folder:
        timings = _measure(Benchmark(settings, Path(folder)), settings.repeats)
    peak_gib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    _print(timings, settings, peak_gib)
    _write(timings, settings, peak_gib)
    return timings


def _measure(benchmark: Benchmark, repeats: int) -> list[Timing]:
    variants: dict[str, Step] = {
        "direct SAM-Path loop, encoders and all": benchmark.direct,
        "ours from images (bfloat16 encoders)": benchmark.from_images,
        "SAM's decoder image by image, features given": benchmark.decoder_one_by_one,
        "ours from the embedding cache": benchmark.from_cache,
    }
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in track(range(repeats), "Training steps"):
        for name, step in variants.items():
            started = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - started)
    return [Timing(name=name, seconds=tuple(values)) for name, values in seconds.items()]


def _training_settings(settings: BenchmarkSettings) -> Settings:
    preset = bcss()
    pathology = (
        "vit_small_patch16_224" if settings.image_encoder != "tiny" else "vit_tiny_patch16_224"
    )
    model = ModelSettings(
        tile_size_px=settings.tile_size_px,
        image_encoder=settings.image_encoder,
        pathology_encoder=pathology,
    )
    return replace(preset, model=model)


def _print(timings: list[Timing], settings: BenchmarkSettings, peak_gib: float) -> None:
    table = Table("Step", title=f"Batch {settings.batch_size}, {settings.tile_size_px} px")
    table.add_column("median s", justify="right")
    table.add_column("times faster", justify="right")
    for timing in timings:
        ratio = timings[0].median_s / timing.median_s
        table.add_row(timing.name, f"{timing.median_s:.2f}", f"{ratio:.1f}")
    Console().print(table)
    Console().print(f"{machine()}; peak memory {peak_gib:.1f} GiB")


def _write(timings: list[Timing], settings: BenchmarkSettings, peak_gib: float) -> None:
    report = {
        "machine": machine(),
        "torch": torch.__version__,
        "batch_size": settings.batch_size,
        "tile_size_px": settings.tile_size_px,
        "peak_memory_gib": round(peak_gib, 2),
        "steps": {
            timing.name: {"seconds": timing.seconds, "median_s": timing.median_s}
            for timing in timings
        },
    }
    settings.out.parent.mkdir(parents=True, exist_ok=True)
    settings.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def machine() -> str:
    """The processor's name and the threads that torch uses."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        lines = cpuinfo.read_text(encoding="utf-8").splitlines()
        name = next((line.split(":")[1].strip() for line in lines if "model name" in line), name)
    return f"{name}, {torch.get_num_threads()} threads"
