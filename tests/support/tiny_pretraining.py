"""Settings of a pretraining that takes seconds."""

from dataclasses import replace

from train.pretraining.settings import PretrainSettings, ViewSettings, synthetic


def tiny_pretraining(*, drop_path: float = 0.1, **schedule: object) -> PretrainSettings:
    """Two blocks of width 32 on views of 48 pixels, all losses on."""
    base = synthetic()
    return replace(
        base,
        views=ViewSettings(view_px=48, num_local=1, local_px=32),
        distillation=replace(
            base.distillation,
            align_weight=1.0,
            ibot_weight=1.0,
            prototypes=32,
            head_hidden=32,
            head_bottleneck=16,
        ),
        encoder=replace(base.encoder, depth=2, embed_dim=32, num_heads=2, drop_path=drop_path),
        schedule=replace(
            base.schedule,
            **{"steps": 4, "steps_per_epoch": 2, "batch_size": 4, **schedule},  # type: ignore[arg-type]
        ),
    )


def tiniest_pretraining(
    *, view_px: int = 32, width: int = 16, **schedule: object
) -> PretrainSettings:
    """A block of that width and the context loss alone, in two steps."""
    base = synthetic()
    return replace(
        base,
        views=ViewSettings(view_px=view_px, num_local=0, local_px=32),
        distillation=replace(base.distillation, prototypes=16, head_hidden=16, head_bottleneck=8),
        encoder=replace(base.encoder, depth=1, embed_dim=width, num_heads=1),
        schedule=replace(
            base.schedule,
            **{"steps": 2, "steps_per_epoch": 1, "batch_size": 2, **schedule},  # type: ignore[arg-type]
        ),
    )
