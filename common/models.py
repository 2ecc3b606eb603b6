"""Three models for 28×28 digits."""

import torch
from torch import nn

MEAN, STD = 0.1307, 0.3081  # of the pixels of MNIST's 60,000 training images, scaled to 0…1


class Normalized(nn.Module):
    """`net`'s logits (B, 10) for uint8 images (B, 28, 28): a quarter of float32's bytes to copy to a GPU."""

    def __init__(self, net: nn.Module, name: str):
        super().__init__()
        self.net = net
        self.name = name

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        dtype = next(self.net.parameters()).dtype  # FSDP's gathered weights may be bfloat16
        pixels = images.unsqueeze(1).to(torch.promote_types(dtype, torch.float32)) / 255
        return self.net(((pixels - MEAN) / STD).to(dtype))


def cnn() -> nn.Module:
    """Two convolutions, two linear layers, 206,922 parameters; no sample's gradient depends on its batch.

    Max-pooling comes before ReLU. They commute, and ReLU then has a quarter of the numbers to look at.
    """
    return nn.Sequential(
        nn.Conv2d(1, 16, kernel_size=3, padding=1),
        nn.MaxPool2d(2),
        nn.ReLU(),
        nn.Conv2d(16, 32, kernel_size=3, padding=1),
        nn.MaxPool2d(2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * 7 * 7, 128),
        nn.ReLU(),
        nn.Linear(128, 10),
    )


def resnet18() -> nn.Module:
    """torchvision's ResNet-18 (He et al., 2015), 11,175,370 parameters; a rank's batch norm sees its part."""
    from torchvision.models import resnet18

    net = resnet18(num_classes=10)
    net.conv1 = nn.Conv2d(1, 64, kernel_size=7, stride=2, padding=3, bias=False)
    return net


def vit(width: int, depth: int) -> nn.Module:
    """torchvision's VisionTransformer (Dosovitskiy et al., 2020): 139,018 parameters at width 64, depth 4.

    16 patches of 7×7 pixels, `depth` blocks, no dropout; heads 64 wide as in the paper, at least four.
    """
    from torchvision.models import VisionTransformer

    net = VisionTransformer(
        image_size=28,
        patch_size=7,
        num_layers=depth,
        num_heads=max(4, width // 64),
        hidden_dim=width,
        mlp_dim=2 * width,
        num_classes=10,
    )
    net.conv_proj = nn.Conv2d(1, width, kernel_size=7, stride=7)
    return net


def build_model(name: str, precision: str = "float32", vit_width: int = 64, vit_depth: int = 4) -> nn.Module:
    """The model `cnn`, `resnet18` or `vit`, initialized from the global random state.

    With the precision `float64` it has the numbers of float32, cast.
    """
    if name == "cnn":
        net = cnn()
    elif name == "resnet18":
        net = resnet18()
    else:
        net = vit(vit_width, vit_depth)
        name = f"vit-{vit_width}x{vit_depth}"
    model = Normalized(net, name)
    return model.double() if precision == "float64" else model
