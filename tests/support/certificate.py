from serve.contract.certificate import ScaleCertificate, ScalePoint


def certificate_that_warns(num_classes: int) -> ScaleCertificate:
    """A certificate of a model that loses too many labels at 1.25 times its um per pixel."""
    dice = (1.0,) * num_classes
    return ScaleCertificate(
        num_tiles=4,
        has_masks=False,
        real_detail_from=1.0,
        min_agreement=0.95,
        max_dice_loss=0.05,
        points=(
            ScalePoint(factor=1.0, label_agreement=1.0, dice=dice),
            ScalePoint(factor=1.25, label_agreement=0.9, dice=dice),
        ),
    )
