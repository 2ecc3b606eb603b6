"""Three models for 28×28 digits. They take uint8 images: a quarter of the bytes to move to a GPU."""

import argparse

import torch
from torch import nn

# Mean and standard deviation of MNIST's 60,000 training images, pixels scaled to 0…1.
MEAN, STD = 0.1307, 0.3081


class Normalized(nn.Module):
    """Turns uint8 images into normalised floats on the device, then calls `net`.

    Input uint8 (batch, 28, 28); output logits (batch, 10) in the dtype of `net`'s parameters.
    """

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        pixels = images.unsqueeze(1).to(next(self.net.parameters()).dtype)
        return self.net((pixels / 255 - MEAN) / STD)


def cnn(args: argparse.Namespace) -> nn.Module:
    """Two convolutions and two linear layers, 206,922 parameters.

    No dropout, no batch norm: a sample's gradient does not depend on its batch, nor a step on the world size.
    """
    return nn.Sequential(
        *(nn.Conv2d(1, 16, kernel_size=3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 32, kernel_size=3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(32 * 7 * 7, 128), nn.ReLU(), nn.Linear(128, 10)),
    )


def resnet18(args: argparse.Namespace) -> nn.Module:
    """torchvision's ResNet-18 (He et al., 2015) for one input channel, 11,175,370 parameters.

    Its batch norm sees each rank's own part of the batch: results depend on the world size.
    """
    from torchvision.models import resnet18

    net = resnet18(num_classes=10)
    net.conv1 = nn.Conv2d(1, 64, kernel_size=7, stride=2, padding=3, bias=False)
    return net


def vit(args: argparse.Namespace) -> nn.Module:
    """torchvision's VisionTransformer (Dosovitskiy et al., 2020), by default small enough for a CPU.

    One input channel, 16 patches of 7×7 pixels, `args.vit_depth` blocks of width `args.vit_width`, no
    dropout; heads 64 wide as in the paper, but at least four of them. 139,018 parameters at 64×4.
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
    """The model that the flags ask for, initialised from the global random state.

    In float64 with `--precision float64` (the same numbers, cast), else float32. `--compile` compiles it in
    place: the names of its parameters stay what they are.
    """
    model: nn.Module = Normalized(MODELS[args.model](args))
    if args.precision == "float64":
        model = model.double()
    if args.compile:
        model.compile()
    return model
