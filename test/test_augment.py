"""Augmentation: warped off the wrist only, coloured everywhere, each sample for itself, within range."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pi0_ros.training.augment import _jitter, _warp, augment

BASE, WRIST = "base_0_rgb", "left_wrist_0_rgb"


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def noise_images(*shape, seed=1):
    return torch.rand(*shape, generator=generator(seed)) * 2 - 1


@settings(max_examples=20)
@given(st.integers(0, 2**32))
def test_the_range_is_kept_and_the_input_left_alone(seed):
    images = noise_images(2, 2, 3, 16, 16).sign()  # every channel at one of its ends
    before = images.clone()
    out = augment(images, (BASE, WRIST), generator(seed))
    assert out.shape == images.shape
    assert out.min() >= -1
    assert out.max() <= 1
    assert torch.equal(images, before)


def test_the_same_stream_augments_the_same_and_another_does_not():
    images = noise_images(2, 2, 3, 16, 16)
    one, two, other = (augment(images, (BASE, WRIST), generator(seed)) for seed in (5, 5, 6))
    assert torch.equal(one, two)
    assert not torch.equal(one, other)


def test_every_sample_and_camera_draws_for_itself():
    images = noise_images(1, 1, 3, 16, 16).expand(3, 2, 3, 16, 16)
    out = augment(images, (BASE, "second_base"), generator()).flatten(0, 1)
    for i in range(6):
        for j in range(i):
            assert (out[i] - out[j]).abs().mean() > 1e-3


def test_what_else_is_in_the_batch_moves_no_sample_but_by_its_draws():
    images = noise_images(3, 1, 3, 16, 16)
    changed = images.clone()
    changed[1] = 0
    one, two = (augment(x, (BASE,), generator()) for x in (images, changed))
    torch.testing.assert_close(one[[0, 2]], two[[0, 2]])


def test_a_wrist_camera_keeps_its_geometry():
    images = torch.full((4, 2, 3, 32, 32), -0.5)
    images[..., 5:9, 20:27] = 0.5  # one rectangle in an even field
    out = augment(images, (BASE, WRIST), generator(3))
    for sample in range(4):
        wrist = out[sample, 1]
        inside, field = wrist[:, 5:9, 20:27], wrist.clone()
        field[:, 5:9, 20:27] = wrist[:, :1, :1]
        torch.testing.assert_close(inside, inside[:, :1, :1].expand_as(inside))
        torch.testing.assert_close(field, field[:, :1, :1].expand_as(field))
        assert inside.mean() > field.mean()
        base = out[sample, 0, :, 5:9, 20:27]
        assert not torch.allclose(base, base[:, :1, :1].expand_as(base), atol=1e-3)


def centroid(image):
    total = image.sum()
    at = torch.arange(len(image), dtype=torch.float32) - (len(image) - 1) / 2
    return ((image.sum(dim=0) @ at) / total).item(), ((image.sum(dim=1) @ at) / total).item()


@pytest.mark.parametrize(
    ("across", "down", "angle", "expected"),
    [
        (0.0, 0.0, 0.0, (42.105, 0.0)),  # 40 / 0.95
        (0.0, 0.0, 1.0, (41.945, -3.670)),  # turned by 5 degrees
        (0.0, 0.0, -1.0, (41.945, 3.670)),
        (1.0, 0.0, 0.0, (39.447, 0.0)),  # the crop taken 2.525 pixels further right
        (0.0, -1.0, 0.0, (42.105, 2.658)),
    ],
)
def test_crop_and_rotation_move_a_spot_as_computed(across, down, angle, expected):
    image = torch.zeros(1, 3, 101, 101)
    image[..., 49:52, 89:92] = 1.0  # 40 pixels right of the centre
    moved = _warp(image, torch.tensor([[across, down, angle]]))
    assert centroid(moved[0, 0]) == pytest.approx(expected, abs=0.06)


def test_a_crop_shows_95_percent_and_rotation_brings_black_corners_in():
    white = torch.ones(1, 3, 64, 64)
    torch.testing.assert_close(_warp(white, torch.zeros(1, 3)), white)
    torch.testing.assert_close(_warp(white, torch.tensor([[1.0, -1.0, 0.0]])), white, atol=0.06, rtol=0)
    turned = _warp(white, torch.tensor([[1.0, 1.0, 1.0]]))[0, 0]
    assert turned[-1, -1] == 0
    assert turned[32, 32] == 1


def in_order(x, brightness, contrast, saturation):
    x = x * brightness
    mean = x.mean(dim=(1, 2, 3), keepdim=True)
    x = (x - mean) * contrast + mean
    grey = x.mean(dim=1, keepdim=True)
    return (grey + (x - grey) * saturation).clamp(0, 2)


def test_one_matrix_equals_brightness_contrast_and_saturation_in_order():
    x = torch.rand(4, 3, 8, 8, generator=generator(2)) * 2
    draws = torch.rand(4, 3, generator=generator(3)) * 2 - 1
    factors = (1 + draws * torch.tensor([0.3, 0.4, 0.5])).T[..., None, None, None]
    torch.testing.assert_close(_jitter(x, draws), in_order(x, *factors))
    torch.testing.assert_close(_jitter(x, torch.zeros(4, 3)), x)


def test_the_strongest_brightness_is_0_3():
    grey = torch.ones(2, 3, 4, 4)
    out = _jitter(grey, torch.tensor([[1.0, 0.0, 0.0], [-1.0, 0.0, 0.0]]))
    torch.testing.assert_close(out[:, 0, 0, 0], torch.tensor([1.3, 0.7]))


def test_the_amounts_fill_their_range():
    flat = torch.zeros(4000, 1, 3, 2, 2)  # mid grey: contrast and saturation leave it
    brightness = augment(flat, (WRIST,), generator())[:, 0, 0, 0, 0] + 1
    assert brightness.min() == pytest.approx(0.7, abs=2e-3)
    assert brightness.max() == pytest.approx(1.3, abs=2e-3)
    assert brightness.std().item() == pytest.approx(0.6 / math.sqrt(12), rel=0.05)


def test_a_batch_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"expected images \[batch, 1, 3, size, size\], found \[2, 2, 3, 8, 8\]"):
        augment(torch.zeros(2, 2, 3, 8, 8), (BASE,), generator())
