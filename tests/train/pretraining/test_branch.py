"""The encoder of student and teacher, with and without hidden patches."""

from typing import Any

import pytest
import torch

from tests.support.tiny_pretraining import tiny_pretraining
from train.pretraining.branch import Branch, Head, encode_views


@pytest.fixture(scope="module")
def branch() -> Any:
    torch.manual_seed(0)
    built = Branch(tiny_pretraining(), drop_path=0.0).eval()
    torch.nn.init.normal_(built.mask_token)
    return built


def test_a_hidden_patch_tells_nothing_and_the_others_are_as_without_a_mask(branch: Any) -> None:
    images = torch.randn(2, 3, 48, 48)
    mask = torch.zeros(2, 9, dtype=torch.bool)
    with torch.no_grad():
        plain, nothing_hidden = branch(images), branch(images, mask)
        assert all(
            torch.allclose(a, b, atol=1e-6) for a, b in zip(plain, nothing_hidden, strict=True)
        )
        mask[0, 4] = True  # the middle one of 3 x 3 patches of 16 pixels
        hidden = branch(images, mask)
        other = images.clone()
        other[0, :, 16:32, 16:32] = 0
        assert all(
            torch.allclose(a, b, atol=1e-6)
            for a, b in zip(branch(other, mask), hidden, strict=True)
        )
    assert not torch.allclose(hidden[1][0], plain[1][0], atol=1e-3)
    assert torch.allclose(hidden[1][1], plain[1][1], atol=1e-6)


def test_views_are_encoded_as_one_after_the_other(branch: Any) -> None:
    views = torch.randn(3, 2, 3, 48, 48)
    with torch.no_grad():
        for view, found in zip(views, encode_views(branch, views), strict=True):
            assert all(
                torch.allclose(a, b, atol=1e-5) for a, b in zip(branch(view), found, strict=True)
            )
    assert encode_views(branch, views[:0]) == []


def test_a_heads_logits_are_cosines_with_its_prototypes() -> None:
    head = Head(8, 16, 4, 5)
    tokens = torch.randn(3, 8)
    expected = torch.cosine_similarity(head.mlp(tokens)[:, None], head.prototypes[None], dim=-1)
    assert torch.allclose(head(tokens), expected, atol=1e-6)
