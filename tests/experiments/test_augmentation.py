"""Two views: drawn per sample and view, reproducible, and what each step does."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from experiments.simclr.augmentation import TwoViews

SIMCLR = {
    "min_crop": 0.2,
    "flip": 0.5,
    "jitter": 0.8,
    "brightness": 0.4,
    "contrast": 0.4,
    "saturation": 0.4,
    "hue": 0.1,
    "grayscale": 0.2,
    "blur": 0.5,
    "noise": 0.05,
}
DIGITS = {
    "rotation": 20.0,
    "translation": 0.25,
    "min_zoom": 0.7,
    "max_zoom": 1.4,
    "shear": 10.0,
    "noise": 0.05,
    "standardize_each": True,
}


@pytest.fixture
def picture():
    """One smooth picture of 16 x 16, off its own mirror image, and each channel its own."""
    y, x = torch.meshgrid(torch.arange(16), torch.arange(16), indexing="ij")
    return torch.stack([12 * x + 3 * y, 200 - 10 * y, x * y]).to(torch.uint8)


@pytest.mark.parametrize("recipe", [SIMCLR, DIGITS])
def test_every_sample_and_view_has_its_own_draw(picture, recipe):
    torch.manual_seed(0)
    views = torch.cat(TwoViews(image_size=16, **recipe)(picture.expand(8, -1, -1, -1)))
    assert views.shape == (16, 3, 16, 16)
    assert views.dtype == torch.float32
    for i in range(16):
        for j in range(i):
            assert not views[i].equal(views[j])


@pytest.mark.parametrize("recipe", [SIMCLR, DIGITS])
def test_the_global_generator_decides(picture, recipe):
    views, images = TwoViews(image_size=16, **recipe), picture.expand(8, -1, -1, -1)
    results = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        results.append(torch.cat(views(images)))
    assert results[0].equal(results[1])
    assert not results[0].equal(results[2])


def test_without_steps_the_views_are_the_normalised_images(picture):
    views, images = TwoViews(image_size=16), picture[None]
    for view in views(images):
        assert view.equal(views.normalize(images))
    assert views.normalize(torch.tensor([0, 255], dtype=torch.uint8)).tolist() == [-1, 1]


def test_flips_half_of_the_views(picture):
    torch.manual_seed(0)
    images = picture.expand(200, -1, -1, -1)
    views = TwoViews(image_size=16, flip=0.5)
    straight = views.normalize(images)[0]
    flipped = 0
    for view in torch.cat(views(images)):
        if view.equal(straight):
            continue
        torch.testing.assert_close(view, straight.flip(-1))
        flipped += 1
    assert 150 < flipped < 250  # 200 expected of 400; five standard deviations are 50


def test_crops_lie_inside_the_image(picture):
    """A crop of a picture that rises to the right still does, over a shorter range."""
    torch.manual_seed(0)
    views, images = TwoViews(image_size=16, min_crop=0.2), picture.expand(50, -1, -1, -1)
    whole = views.normalize(images)[0, 0]
    for view in torch.cat(views(images)):
        red = view[0]
        assert (red.diff(dim=1) >= -1e-5).all()
        assert red.min() >= whole.min() - 1e-5
        assert red.max() <= whole.max() + 1e-5


def test_standardising_each_takes_brightness_and_contrast_away(picture):
    views = TwoViews(image_size=16, standardize_each=True)
    image = picture[None].float()
    first, second = (views.normalize(i) for i in (image, 0.5 * image + 40))
    torch.testing.assert_close(first, second)
    torch.testing.assert_close(first.mean(), torch.tensor(0.0), atol=1e-5, rtol=0)
    torch.testing.assert_close(first.std(), torch.tensor(1.0))
    assert views.normalize(torch.full((1, 3, 4, 4), 7, dtype=torch.uint8)).eq(0).all()


def test_autocast_leaves_the_views_in_single_precision(picture):
    views, images = TwoViews(image_size=16, **SIMCLR), picture.expand(4, -1, -1, -1)
    torch.manual_seed(0)
    expected = torch.cat(views(images))
    torch.manual_seed(0)
    with torch.autocast("cpu", torch.bfloat16):
        found = torch.cat(views(images))
    assert found.equal(expected)


class CountCalls(TorchDispatchMode):
    """How many operations reach torch: on a GPU each is at least one launch."""

    calls = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.calls += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("recipe", [SIMCLR, DIGITS])
def test_a_larger_batch_takes_no_more_calls(picture, recipe):
    views = TwoViews(image_size=16, **recipe)
    counts = []
    for batch in (8, 64):
        torch.manual_seed(0)
        with CountCalls() as count:
            views(picture.expand(batch, -1, -1, -1))
        counts.append(count.calls)
    assert counts[1] < 1.1 * counts[0]
