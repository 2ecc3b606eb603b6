"""Three models for 28×28 digits, and the learning rate of each of their steps."""

import argparse
import math

import torch
from torch import nn
from torch.optim import Optimizer

MEAN, STD = 0.1307, 0.3081  # of the pixels of MNIST's 60,000 training images, scaled to 0…1


class Normalized(nn.Module):
    """`net`'s logits (batch, 10) for uint8 images (batch, 28, 28): a quarter of the bytes to move."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        pixels = images.unsqueeze(1).to(next(self.net.parameters()).dtype)
        return self.net((pixels / 255 - MEAN) / STD)


def cnn(args: argparse.Namespace) -> nn.Module:
    """Two convolutions, two linear layers, 206,922 parameters; no sample's gradient depends on its batch."""
    return nn.Sequential(
        *(nn.Conv2d(1, 16, kernel_size=3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 32, kernel_size=3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(32 * 7 * 7, 128), nn.ReLU(), nn.Linear(128, 10)),
    )


def resnet18(args: argparse.Namespace) -> nn.Module:
    """torchvision's ResNet-18 (He et al., 2015), 11,175,370 parameters; a rank's batch norm sees its part."""
    from torchvision.models import resnet18

    net = resnet18(num_classes=10)
    net.conv1 = nn.Conv2d(1, 64, kernel_size=7, stride=2, padding=3, bias=False)
    return net


def vit(args: argparse.Namespace) -> nn.Module:
    """torchvision's VisionTransformer (Dosovitskiy et al., 2020): 139,018 parameters, or as flags say.

    16 patches of 7×7 pixels, `--vit-depth` blocks, no dropout; heads 64 wide as in the paper, at least four.
    """
    from torchvision.models import VisionTransformer

    width = args.vit_width
    # Of the image, a patch; layers, heads; width, and that of the hidden layer in a block.
    net = VisionTransformer(28, 7, args.vit_depth, max(4, width // 64), width, 2 * width, num_classes=10)
    net.conv_proj = nn.Conv2d(1, width, kernel_size=7, stride=7)
    return net


MODELS = {"cnn": cnn, "resnet18": resnet18, "vit": vit}


def model_name(args: argparse.Namespace) -> str:
    """The model's name, with the size if flags choose that: `cnn`, `vit-64x4`."""
    return f"vit-{args.vit_width}x{args.vit_depth}" if args.model == "vit" else str(args.model)


def build_model(args: argparse.Namespace) -> nn.Module:
    """The model that the flags ask for, from the global random state: float64 has float32's numbers, cast."""
    model: nn.Module = Normalized(MODELS[args.model](args))
    if args.precision == "float64":
        model = model.double()
    if args.compile:
        model.compile()  # in place: the names of its parameters stay what they are
    return model


def set_learning_rate(optimizer: Optimizer, args: argparse.Namespace, step: int, steps: int) -> None:
    """Set the rate and AdamW's betas for `step`, counted from 0, of the run's `steps`.

    With `--schedule one-cycle` the rate rises from `--lr` / 25 to `--lr` in 30 % of the run, then falls to 0:
    halves of a cosine (Smith, 2018, arxiv.org/abs/1803.09820; torch's OneCycleLR). Its betas remember less.
    """
    rate, betas = args.lr, (0.9, 0.999)
    if args.schedule == "one-cycle":
        done, betas = min(1.0, step / steps), (0.7, 0.9)
        low, fallen = (0.04, 1 - done / 0.3) if done < 0.3 else (0.0, (done - 0.3) / 0.7)
        rate *= low + (1 - low) * (1 + math.cos(math.pi * fallen)) / 2
    for group in optimizer.param_groups:
        group.update(lr=rate, betas=betas)
