"""Student and teacher, and one step of distillation, for Lightning's Trainer.

The teacher is the moving average of the student (arXiv 1703.01780, as in DINO). Coarse views teach
the fine views inside them; with the dense alignment, fine views also teach the place in the coarse
view that they come from. Which view teaches which is our reading of the abstract of arXiv
2512.14796.
"""

import copy
from pathlib import Path
from typing import Any, cast

import lightning as L
import numpy as np
import torch
from torch import Tensor, nn

from train.errors import CollapseError, RunError
from train.pretraining.branch import Branch, Encoded, encode_views
from train.pretraining.collapse import LEAST_ENTROPY, effective_rank, signs_of_collapse
from train.pretraining.colors import change_colors
from train.pretraining.encoder import load_encoder, patch_size
from train.pretraining.losses import (
    Centers,
    alignment_loss,
    context_loss,
    draw_masks,
    ibot_loss,
    pooled_at,
    spread_loss,
)
from train.pretraining.optimizer import half_cosine, make_optimizer
from train.pretraining.settings import PretrainSettings
from train.pretraining.views import ViewSample


class PretrainTask(L.LightningModule):
    """Distil a teacher into a student over views of several magnifications."""

    def __init__(self, settings: PretrainSettings) -> None:
        super().__init__()
        self.settings = settings
        self.student = Branch(settings, drop_path=settings.encoder.drop_path)
        if settings.encoder.init_weights is not None:
            load_encoder(self.student.encoder, Path(settings.encoder.init_weights))
        self.teacher = Branch(settings, drop_path=0.0)
        student, teacher = cast(Any, self.student.encoder), cast(Any, self.teacher.encoder)
        teacher.pretrained_cfg = student.pretrained_cfg  # mean and deviation of what it starts from
        self.teacher.load_state_dict(self.student.state_dict())
        self.teacher.requires_grad_(False)
        uses_dense = settings.distillation.align_weight > 0 or settings.distillation.ibot_weight > 0
        if not uses_dense:  # several devices refuse weights that nothing trains
            self.student.dense_head.requires_grad_(False)
        self.student.mask_token.requires_grad_(settings.distillation.ibot_weight > 0)
        num_scales = len(settings.views.mpps)
        distillation = settings.distillation
        size = (num_scales, distillation.prototypes, distillation.center_momentum)
        self.cls_centers, self.dense_centers = Centers(*size), Centers(*size)
        self.register_buffer("num_collapsed", torch.zeros((), dtype=torch.long))
        config = cast(Any, self.student.encoder).pretrained_cfg
        self._mean = torch.tensor(config["mean"]).reshape(3, 1, 1) * 255
        self._std = torch.tensor(config["std"]).reshape(3, 1, 1) * 255

    num_collapsed: Tensor

    @property
    def patch_size(self) -> int:
        """Side of the encoder's patches in pixels."""
        return patch_size(self.student.encoder)

    @property
    def is_collapsing(self) -> bool:
        """Whether the teacher's last outputs were all but one prototype."""
        return bool(self.num_collapsed > 0)

    def on_train_batch_start(self, batch: Any, batch_index: int) -> None:
        """Seed what a step draws (masks, dropped paths), so that a resumed run draws the same."""
        key = (self.settings.schedule.seed, self.global_step, self.trainer.global_rank)
        torch.manual_seed(int(np.random.SeedSequence(key).generate_state(1, np.uint32)[0]))

    def training_step(self, batch: ViewSample, batch_index: int) -> Tensor:
        """One step's loss.

        Raises:
            RunError: the loss is not a number.
            CollapseError: the teacher has collapsed.
        """
        parts = self._losses(batch)
        distillation = self.settings.distillation
        loss = (
            parts["context"]
            + distillation.align_weight * parts.get("alignment", 0.0)
            + distillation.ibot_weight * parts.get("ibot", 0.0)
            + distillation.spread_weight * parts.get("spread", 0.0)
        )
        if not torch.isfinite(loss):
            raise RunError(
                f"the loss is {loss.item()} at step {self.global_step}, expected a finite number. "
                f"Lower --learning-rate (now {self.settings.schedule.learning_rate:g}), or train "
                "with --precision 32-true; last.ckpt is kept."
            )
        for name, value in {"loss": loss, **parts}.items():
            self._log_mean(name, value.detach(), prog_bar=name == "loss")
        return loss

    def _log_mean(self, name: str, value: Tensor, *, prog_bar: bool = False) -> None:
        """Log the mean over an epoch's steps and the run's processes."""
        self.log(name, value, on_step=False, on_epoch=True, prog_bar=prog_bar, sync_dist=True)

    def _losses(self, batch: ViewSample) -> dict[str, Tensor]:
        distillation, views = self.settings.distillation, self.settings.views
        num_coarse = batch["coarse"].shape[1]
        scales = batch["scale"]
        coarse = self._prepared(batch["coarse"], batch["coarse_colors"])  # 2 x B x 3 x P x P
        fine = self._prepared(batch["fine"], batch["fine_colors"])  # F x B x 3 x P x P
        local = self._prepared(batch["local"], batch["local_colors"])
        temperature = self._teacher_temperature()

        with torch.no_grad():
            taught = encode_views(self.teacher, coarse)
            teacher_logits = _apply(self.teacher.cls_head, [cls for cls, _ in taught])
            targets = [
                self.cls_centers.probabilities(logits, scales, temperature)
                for logits in teacher_logits
            ]
        masks = [draw_masks(patches) for _, patches in taught if distillation.ibot_weight]
        student_coarse, student_fine = self._encode_large(coarse, fine, masks)
        student_local = encode_views(self.student, local)
        seen = (*student_coarse, *student_fine, *student_local)
        logits = _apply(self.student.cls_head, [cls for cls, _ in seen])
        parts = {"context": context_loss(targets, logits, distillation.student_temperature)}

        if distillation.align_weight and views.num_fine:
            parts["alignment"] = self._alignment(
                batch["weights"], taught, student_coarse, student_fine, fine, temperature
            )
        if distillation.ibot_weight:
            parts["ibot"] = self._ibot(taught, student_coarse, masks, scales, temperature)
        if distillation.spread_weight:
            coarse_tokens = [cls for cls, _ in student_coarse]
            parts["spread"] = spread_loss(coarse_tokens, [cls for cls, _ in student_fine], scales)
        self.cls_centers.take(torch.cat(teacher_logits), scales.repeat(num_coarse))
        self.cls_centers.move()
        self.dense_centers.move()
        self._watch(torch.stack(targets), torch.stack(logits[:num_coarse]), taught[0][0])
        return parts

    def _encode_large(
        self, coarse: Tensor, fine: Tensor, masks: list[Tensor]
    ) -> tuple[list[Encoded], list[Encoded]]:
        """The student's coarse and fine views, which are of one size, in one batch."""
        hidden = masks and masks + [torch.zeros_like(masks[0])] * len(fine)
        views = torch.cat([coarse, fine]) if len(fine) else coarse
        found = encode_views(self.student, views, torch.cat(hidden) if hidden else None)
        return found[: len(coarse)], found[len(coarse) :]

    def _alignment(
        self,
        weights: Tensor,
        taught: list[Encoded],
        student_coarse: list[Encoded],
        student_fine: list[Encoded],
        fine: Tensor,
        temperature: float,
    ) -> Tensor:
        """The dense alignment; `weights` is (B, 2, F, G, G)."""
        num_samples, num_fine = weights.shape[0], weights.shape[2]
        device = weights.device
        scales_of_fine = torch.arange(1, num_fine + 1, device=device).repeat(num_samples)
        scales_of_place = torch.zeros(num_samples * num_fine, dtype=torch.long, device=device)
        with torch.no_grad():
            places = [
                self.teacher.dense_head(pooled_at(patches, weights[:, a]))
                for a, (_, patches) in enumerate(taught)
            ]
            found = encode_views(self.teacher, fine)
            details = torch.stack([cls for cls, _ in found], dim=1)  # B x F x D
            details = self.teacher.dense_head(details)
            place_targets = torch.stack(
                [self._dense_targets(found, scales_of_place, temperature) for found in places]
            )
            detail_targets = self._dense_targets(details, scales_of_fine, temperature)
        loss = alignment_loss(
            place_targets=place_targets,
            detail_logits=self.student.dense_head(torch.stack([c for c, _ in student_fine], 1)),
            detail_targets=detail_targets,
            place_logits=torch.stack(
                [
                    self.student.dense_head(pooled_at(patches, weights[:, a]))
                    for a, (_, patches) in enumerate(student_coarse)
                ]
            ),
            temperature=self.settings.distillation.student_temperature,
        )
        for found in places:
            self.dense_centers.take(found.flatten(0, 1), scales_of_place)
        self.dense_centers.take(details.flatten(0, 1), scales_of_fine)
        return loss

    def _ibot(
        self,
        taught: list[Encoded],
        student_coarse: list[Encoded],
        masks: list[Tensor],
        scales: Tensor,
        temperature: float,
    ) -> Tensor:
        terms = []
        for (_, teacher_patches), (_, patches), mask in zip(
            taught, student_coarse, masks, strict=True
        ):
            with torch.no_grad():
                logits = self.teacher.dense_head(teacher_patches)
                each = scales.repeat_interleave(logits.shape[1])
                targets = self._dense_targets(logits, each, temperature)
            found = self.student.dense_head(patches)
            student_temperature = self.settings.distillation.student_temperature
            terms.append(ibot_loss(targets, found, mask, student_temperature))
            self.dense_centers.take(logits.flatten(0, 1), each)
        return torch.stack(terms).mean()

    def _dense_targets(self, logits: Tensor, scales: Tensor, temperature: float) -> Tensor:
        """The teacher's targets (B, N, K); `scales` is (B * N,)."""
        flat = logits.flatten(0, 1)
        return self.dense_centers.probabilities(flat, scales, temperature).reshape(logits.shape)

    @torch.no_grad()
    def _watch(self, targets: Tensor, logits: Tensor, teacher_cls: Tensor) -> None:
        """Log the signs of a collapse, and end a run that has collapsed."""
        temperature = self.settings.distillation.student_temperature
        watched = signs_of_collapse(targets, logits, temperature)
        if self.trainer.is_last_batch:
            watched["rank"] = effective_rank(teacher_cls)
        for name, value in watched.items():
            self._log_mean(name, value)
        schedule = self.settings.schedule
        is_warm = self.global_step >= schedule.warmup_share * schedule.steps
        of_mean = float(watched["entropy_of_mean"])
        has_collapsed = is_warm and of_mean < LEAST_ENTROPY
        self.num_collapsed = self.num_collapsed + 1 if has_collapsed else self.num_collapsed * 0
        if self.num_collapsed >= schedule.collapse_patience:
            raise CollapseError(
                f"the encoder has collapsed: for {schedule.collapse_patience} steps the teacher "
                f"used {of_mean:.1%} of the entropy of {targets.shape[-1]} prototypes; expected at "
                f"least {LEAST_ENTROPY:.0%}. Lower --learning-rate or raise --spread-weight, and "
                "start again with --overwrite. last.ckpt is from before the collapse."
            )

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Hold the prototypes at first, and set this step's weight decay."""
        schedule, distillation = self.settings.schedule, self.settings.distillation
        if self.global_step < distillation.frozen_prototypes * schedule.steps:
            for head in (self.student.cls_head, self.student.dense_head):
                head.prototypes.grad = None
        first, last = schedule.weight_decay
        decay = last + (first - last) * half_cosine(self.global_step / schedule.steps)
        optimizer.param_groups[0]["weight_decay"] = decay

    @torch.no_grad()
    def on_train_batch_end(self, outputs: Any, batch: Any, batch_index: int) -> None:
        """Move the teacher towards the student."""
        start = self.settings.distillation.teacher_momentum
        progress = self.global_step / self.settings.schedule.steps
        momentum = 1 - (1 - start) * half_cosine(progress)
        pairs = zip(self.teacher.parameters(), self.student.parameters(), strict=True)
        for teacher, student in pairs:
            teacher.lerp_(student, 1 - momentum)
        for own, learned in zip(self.teacher.buffers(), self.student.buffers(), strict=True):
            own.copy_(learned)

    def configure_optimizers(self) -> Any:
        """AdamW with a linear warm-up and a cosine, step by step."""
        optimizer, scheduler = make_optimizer(self.student, self.settings.schedule)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }

    def teacher_encoder(self) -> nn.Module:
        """A copy of the teacher's encoder, on the CPU: what a run hands on."""
        return copy.deepcopy(self.teacher.encoder).cpu().eval()

    def _prepared(self, views: Tensor, colors: Tensor) -> Tensor:
        """(B, V, 3, H, W) uint8 to (V, B, 3, H, W) float32, jittered and normalised."""
        num_samples, num_views = views.shape[:2]
        if not num_views:
            return views.transpose(0, 1).float()
        jittered = change_colors(views.flatten(0, 1), colors.flatten(0, 1))
        normal = (jittered - self._mean.to(views.device)) / self._std.to(views.device)
        return normal.reshape(num_samples, num_views, *views.shape[2:]).transpose(0, 1)

    def _teacher_temperature(self) -> float:
        first, last = self.settings.distillation.teacher_temperature
        progress = min(1.0, self.global_step / max(1, 0.3 * self.settings.schedule.steps))
        return first + (last - first) * progress


def _apply(head: nn.Module, tokens: list[Tensor]) -> list[Tensor]:
    """A head's output for each of several (B, D) in one batch."""
    return list(head(torch.cat(tokens)).chunk(len(tokens)))
