"""The synthetic digits are reproducible, balanced, whole, and worth training a convolutional network on."""

import zlib
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.synthetic import synthetic_digits


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def train_set() -> tuple[Tensor, Tensor]:
    return synthetic_digits(10_240, seed=0)


@pytest.fixture(scope="module")
def test_set() -> tuple[Tensor, Tensor]:
    return synthetic_digits(4_096, seed=1)


@pytest.mark.parametrize("count", [1, 7, 300])
def test_shapes_and_dtypes(count: int) -> None:
    images, labels = synthetic_digits(count, seed=0)
    print(f"images {images.dtype} {tuple(images.shape)}, labels {labels.dtype} {tuple(labels.shape)}")
    assert images.dtype == torch.uint8 and images.shape == (count, 28, 28)
    assert labels.dtype == torch.int64 and labels.shape == (count,)
    assert labels.min() >= 0 and labels.max() <= 9


def test_every_image_is_white_on_black(train_set: tuple[Tensor, Tensor]) -> None:
    images = train_set[0].flatten(1)
    dimmest = int(images.amax(dim=1).min())
    ink = (images > 127).float().mean(dim=1)
    print(f"dimmest maximum: {dimmest} of 255 (> 190)")
    print(f"share of bright pixels: {ink.min():.3f} to {ink.max():.3f} (0.01 to 0.35)")
    assert dimmest > 190
    assert ink.min() > 0.01 and ink.max() < 0.35


def test_the_same_seed_gives_the_same_bytes_and_another_seed_does_not() -> None:
    images, labels = synthetic_digits(1_000, seed=3)
    torch.manual_seed(123)
    again, labels_again = synthetic_digits(1_000, seed=3)
    other, labels_other = synthetic_digits(1_000, seed=4)
    same = int((images != again).sum() + (labels != labels_again).sum())
    print(f"bytes that differ: same seed {same} (0), other seed {int((images != other).sum())} (> 0)")
    assert same == 0
    assert not torch.equal(images, other) and not torch.equal(labels, labels_other)


def test_these_are_the_bytes_on_every_machine(train_set: tuple[Tensor, Tensor]) -> None:
    """With any processor, number of threads and torch, so that published numbers can be reproduced."""
    found = [[zlib.crc32(tensor.numpy().data) for tensor in synthetic_digits(2_000, seed=0)]]
    found.append([zlib.crc32(tensor.numpy().data) for tensor in train_set])  # more than are drawn at once
    print(f"checksums of the images and the labels: {found}")
    assert found == [[2346125933, 2643792193], [1667337499, 1085879342]]


def test_no_two_digits_are_alike(train_set: tuple[Tensor, Tensor]) -> None:
    images = train_set[0].flatten(1)
    distinct = len(torch.unique(images, dim=0))
    print(f"distinct images {distinct} ({len(images)})")
    assert distinct == len(images)


def test_the_global_random_state_is_untouched() -> None:
    before = torch.get_rng_state()
    synthetic_digits(300, seed=0)
    changed = int((before != torch.get_rng_state()).sum())
    print(f"bytes of the global random state that changed: {changed} (0)")
    assert changed == 0


def test_the_number_of_threads_does_not_matter(train_set: tuple[Tensor, Tensor]) -> None:
    torch.set_num_threads(2)
    try:
        images, labels = synthetic_digits(10_240, seed=0)
    finally:
        torch.set_num_threads(1)
    differing = int((images != train_set[0]).sum() + (labels != train_set[1]).sum())
    print(f"bytes that differ between one and two threads: {differing} (0)")
    assert differing == 0


def test_classes_are_balanced_overall_and_in_any_slice(train_set: tuple[Tensor, Tensor]) -> None:
    one_hot = F.one_hot(train_set[1], 10)
    totals = one_hot.sum(dim=0)
    print(f"whole set: {int(totals.min())} to {int(totals.max())} per class (within one)")
    assert totals.max() - totals.min() <= 1
    slices = one_hot.unfold(0, 1_000, 1).sum(dim=2)
    print(f"any slice of 1,000: {int(slices.min())} to {int(slices.max())} per class (60 to 140)")
    assert slices.min() >= 60 and slices.max() <= 140


def test_no_digit_is_cut_off_at_the_border(train_set: tuple[Tensor, Tensor]) -> None:
    ring = torch.ones(28, 28, dtype=torch.bool)
    ring[1:-1, 1:-1] = False
    brightest = train_set[0][:, ring].amax(dim=1)
    print(f"brightest pixel of the outermost ring: {int(brightest.max())} of 255 (<= 25)")
    assert brightest.max() <= 25


def normalise(images: Tensor) -> Tensor:
    return (images.unsqueeze(1) / 255 - 0.13) / 0.31


def accuracy_after_three_epochs(
    model: nn.Module, train_set: tuple[Tensor, Tensor], test_set: tuple[Tensor, Tensor]
) -> float:
    images, labels = normalise(train_set[0]), train_set[1]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(3):
        for batch in torch.randperm(len(labels)).split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
    with torch.no_grad():
        predictions = model(normalise(test_set[0])).argmax(dim=1)
    return (predictions == test_set[1]).float().mean().item()


def test_a_linear_model_falls_short(
    train_set: tuple[Tensor, Tensor], test_set: tuple[Tensor, Tensor]
) -> None:
    torch.manual_seed(0)
    accuracy = accuracy_after_three_epochs(
        nn.Sequential(nn.Flatten(), nn.Linear(784, 10)), train_set, test_set
    )
    print(f"linear model: {accuracy:.2%} of unseen digits (70 % to 90 %)")
    assert 0.70 < accuracy < 0.90


@pytest.mark.slow
def test_a_small_cnn_learns_them(train_set: tuple[Tensor, Tensor], test_set: tuple[Tensor, Tensor]) -> None:
    torch.manual_seed(0)
    cnn = nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(1568, 64), nn.ReLU(), nn.Linear(64, 10)),
    )
    accuracy = accuracy_after_three_epochs(cnn, train_set, test_set)
    print(f"small CNN: {accuracy:.2%} of unseen digits (> 97 %)")
    assert accuracy > 0.97
