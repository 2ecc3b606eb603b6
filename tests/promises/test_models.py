"""The models: uint8 in, logits out, every weight learns."""

import sys

import pytest
import torch
import torch.nn.functional as F
import torchvision
from helpers import FOLDERS, ROOT, load
from torch import nn

from common.mnist import load_mnist
from common.models import MEAN, STD, Normalized, build_model, cnn, resnet18, vit
from common.run import name_of
from common.synthetic import synthetic_digits

MODELS = {"cnn": cnn, "resnet18": resnet18, "vit": vit}


def build(name, precision="float32"):
    torch.manual_seed(0)
    return build_model(name, precision)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    ("precision", "dtype"), [("float32", torch.float32), ("float64", torch.float64), ("bf16", torch.float32)]
)
def test_uint8_images_give_logits_in_the_precision_asked_for(name, precision, dtype):
    images, _ = synthetic_digits(4, seed=0)
    logits = build(name, precision)(images)
    assert logits.shape == (4, 10) and logits.dtype == dtype


@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_gets_a_gradient(name):
    """A public series has trained a model whose gradients are zero, and nobody noticed."""
    model = build(name)
    optimizer = torch.optim.AdamW(model.parameters())
    images, labels = synthetic_digits(64, seed=0)
    for _ in range(2):  # the vit's last layer starts at zero, so the first step gives the others no gradient
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
    dead = [key for key, value in model.named_parameters() if value.grad is None or not value.grad.any()]
    print(f"{name}: {sum(p.numel() for p in model.parameters()):,} parameters, without gradient: {dead}")
    assert dead == []


@pytest.mark.parametrize(("name", "count"), [("cnn", 206_922), ("resnet18", 11_175_370), ("vit", 139_018)])
def test_the_sizes_that_the_docstrings_give(name, count):
    assert sum(parameter.numel() for parameter in build(name).parameters()) == count
    assert f"{count:,}" in MODELS[name].__doc__


def test_the_cnns_convolutions_keep_the_size_of_an_image_and_each_pooling_halves_it():
    image = torch.zeros(1, 1, 28, 28)
    sizes = []
    for layer in build("cnn").net[:6]:
        image = layer(image)
        sizes.append(tuple(image.shape[1:]))
    assert sizes == [(16, 28, 28), *2 * [(16, 14, 14)], (32, 14, 14), *2 * [(32, 7, 7)]]


class TextbookCNN(nn.Module):
    """The same net in the order of textbooks: ReLU, then max-pooling."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1, 16, kernel_size=3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(16, 32, kernel_size=3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(32 * 7 * 7, 128),
            nn.ReLU(),
            nn.Linear(128, 10),
        )

    def forward(self, images):
        pixels = images.unsqueeze(1).double() / 255
        return self.net((pixels - MEAN) / STD)


def test_max_pooling_before_relu_changes_nothing():
    """Outputs and gradients are those of the textbook's order, and so are the names of the weights."""
    ours, theirs = build("cnn", "float64"), TextbookCNN().double()
    assert list(ours.state_dict()) == list(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    images, labels = synthetic_digits(256, seed=0)
    outputs = []
    for model in (ours, theirs):
        outputs.append(model(images))
        F.cross_entropy(outputs[-1], labels).backward()
    off = {"logits": (outputs[0] - outputs[1]).abs().max().item()}
    for (name, weight), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert weight.grad.abs().max() > 1e-3
        off[name] = (weight.grad - other.grad).abs().max().item()
    print(off)
    assert max(off.values()) < 1e-12


def test_a_model_is_float32_unless_asked_for_another():
    assert {parameter.dtype for parameter in build_model("cnn").parameters()} == {torch.float32}


def test_a_run_is_named_after_its_model_and_its_size():
    assert [name_of(build(name)) for name in MODELS] == ["cnn", "resnet18", "vit-64x4"]
    assert name_of(build_model("vit", vit_width=128, vit_depth=2)) == "vit-128x2"
    assert name_of(nn.Linear(1, 1)) == "Linear"  # a model without a name of its own


def test_only_what_sees_the_image_is_other_than_torchvisions():
    """One channel instead of three, and nothing else. The vit's patches have the size in its patch_size."""
    ours, theirs = build("resnet18").net.conv1, torchvision.models.resnet18().conv1
    names = ("out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "bias")
    assert [getattr(ours, name) for name in names] == [getattr(theirs, name) for name in names]
    vit = build("vit").net
    assert vit.conv_proj.kernel_size == vit.conv_proj.stride == (vit.patch_size, vit.patch_size) == (7, 7)
    assert [block.num_heads for block in vit.encoder.layers] == [4] * 4
    wide = build_model("vit", vit_width=512, vit_depth=1).net
    assert [block.num_heads for block in wide.encoder.layers] == [8]  # 64 wide, as in the paper


@pytest.mark.parametrize("name", ["cnn", "vit"])
def test_a_samples_result_does_not_depend_on_its_batch(name):
    """This makes steps comparable across world sizes: no batch norm, no dropout."""
    model = build(name, "float64").train()
    images, _ = synthetic_digits(6, seed=0)
    together, apart = model(images), torch.cat([model(part) for part in images.split(2)])
    difference = (together - apart).abs().max().item()
    print(f"{name}: {difference:.1e}")
    assert difference < 1e-12  # float64 rounding; batch norm would differ at 1e-1
    assert not list(model.buffers())


def test_pixels_are_scaled_by_the_mean_and_deviation_of_mnist(mnist_dir):
    """The two numbers are those of MNIST, and the net's input has mean 0 and deviation 1."""
    seen = []

    class Net(nn.Linear):
        def forward(self, pixels):
            seen.append(pixels)

    images, _ = load_mnist(mnist_dir)[0].tensors
    Normalized(Net(1, 1, dtype=torch.float64), "net")(images)
    mean, deviation = seen[0].mean().item(), seen[0].std().item()
    print(f"{seen[0].dtype}, mean {mean:.1e}, deviation 1 {deviation - 1:+.1e}")
    assert seen[0].shape == (60_000, 1, 28, 28) and seen[0].dtype == torch.float64
    assert abs(mean) < 3e-4 and abs(deviation - 1) < 3e-4  # the code has four digits of each


def test_a_black_and_a_white_pixel_are_what_they_are_elsewhere():
    images = torch.tensor([0, 255], dtype=torch.uint8).view(1, 1, 2).expand(1, 28, 2)

    class Net(nn.Linear):
        def forward(self, pixels):
            return pixels[0, 0, 0]

    black, white = Normalized(Net(1, 1, dtype=torch.float64), "net")(images).tolist()
    # What torchvision's Normalize((0.1307,), (0.3081,)) makes of them, for example in pytorch/examples.
    assert (black, white) == (-0.1307 / 0.3081, (1 - 0.1307) / 0.3081)


def test_a_bigger_vit():
    model = build_model("vit", vit_width=256, vit_depth=2)
    blocks = model.net.encoder.layers
    assert len(blocks) == 2 and blocks[0].self_attention.embed_dim == 256
    assert model(torch.zeros(3, 28, 28, dtype=torch.uint8)).shape == (3, 10)


def test_compile_keeps_the_names_of_the_weights(tmp_path, monkeypatch):
    """In step 01. test_combinations.py shows that the flag changes what each step computes."""
    script = load(ROOT / FOLDERS["01"] / "train.py")
    models = []
    monkeypatch.setenv("LOCAL_RANK", "0")  # so that its old value is restored afterwards
    monkeypatch.setattr(script.Trainer, "train", lambda trainer: models.append(trainer.model))
    for flags in ([], ["--compile"]):
        words = ["train.py", "--use-gpu=0", "--num-samples=64", f"--snapshot-dir={tmp_path}", *flags]
        monkeypatch.setattr(sys, "argv", words)
        script.main(script.parse_args())
    plain, compiled = models
    assert compiled.state_dict().keys() == plain.state_dict().keys()
    # torch calls this in place of a compiled module. Its documentation has no other way to ask.
    assert compiled._compiled_call_impl and not plain._compiled_call_impl


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_pixels_are_normalized_in_float32_at_least(dtype):
    """FSDP's gathered weights may be bfloat16: only the result is rounded to it."""
    seen = []
    net = nn.Linear(28, 10).to(dtype)
    net.register_forward_pre_hook(lambda module, inputs: seen.append(*inputs))
    images, _ = synthetic_digits(4, seed=0)
    Normalized(net, "linear")(images)
    precise = torch.promote_types(dtype, torch.float32)
    assert seen[0].equal((((images.unsqueeze(1).to(precise) / 255) - MEAN) / STD).to(dtype))
