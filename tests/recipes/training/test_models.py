import pytest
import torch
from torch import nn

from gradmask.errors import OptionError
from gradmask.recipes.config import Comparison
from gradmask.recipes.training.models import MODELS, build_model


def parameters(model):
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("channels", "size"), [(1, 8), (3, 16)])
def test_every_model_trains_on_small_images_at_small_width(name, channels, size):
    model = build_model(Comparison(model=name, width=4), channels, size, 7)
    out = model(torch.randn(2, channels, size, size))
    assert out.shape == (2, 7)
    out.sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize(
    ("name", "channels", "size", "classes", "expected"),
    [
        # inputs x w + w, w x w + w, w x classes + classes
        ("mlp", 1, 8, 10, 64 * 256 + 256 + 256 * 256 + 256 + 256 * 10 + 10),
        # three convolutions without bias, two values per channel of BatchNorm, linear
        ("small_cnn", 3, 32, 10, 9 * (3 * 32 + 32 * 64 + 64 * 128) + 2 * 224 + 1290),
        ("cifar_resnet18", 3, 32, 100, 11_220_132),
        ("cifar_resnet34", 3, 32, 100, 21_328_292),
        ("cifar_resnet50", 3, 32, 100, 23_705_252),
        ("squeezenet1_1", 3, 64, 10, 727_626),
    ],
)
def test_default_models_have_the_published_number_of_parameters(
    name, channels, size, classes, expected
):
    assert parameters(build_model(Comparison(model=name), channels, size, classes)) == expected


@pytest.mark.parametrize("name", ["cifar_resnet18", "cifar_resnet50"])
def test_resnet_width_scales_every_stage(name):
    model = build_model(Comparison(model=name, width=12), 3, 8, 5)
    outputs = [getattr(model, f"layer{i}")[-1].conv1.out_channels for i in (1, 2, 3, 4)]
    assert outputs == [12, 24, 48, 96]
    assert model.conv1.out_channels == 12


def test_stem_stride_and_no_max_pooling():
    shapes = []
    for stride in (1, 2):
        model = build_model(
            Comparison(model="cifar_resnet10", width=4, stem_stride=stride), 3, 16, 5
        )
        model.layer1.register_forward_hook(lambda _m, inp, _o: shapes.append(inp[0].shape[-1]))
        model(torch.randn(1, 3, 16, 16).repeat(2, 1, 1, 1))
    assert shapes == [16, 8]


def test_small_cnn_strides():
    model = build_model(Comparison(model="small_cnn"), 1, 8, 10)
    assert [m.stride[0] for m in model if isinstance(m, nn.Conv2d)] == [1, 2, 2]


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("mlp", ["fc1", "fc2", "fc3"]),
        ("small_cnn", ["conv1", "norm1", "conv2", "norm2", "conv3", "norm3", "fc"]),
    ],
)
def test_layers_have_names_for_the_report(name, layers):
    model = build_model(Comparison(model=name), 1, 8, 10)
    assert list(dict.fromkeys(n.split(".")[0] for n, _ in model.named_parameters())) == layers


def test_resnet_is_torchvisions_but_for_the_stem():
    from torchvision.models import resnet18

    theirs = resnet18(num_classes=100).state_dict()
    ours = build_model(Comparison(model="cifar_resnet18"), 3, 32, 100).state_dict()
    assert list(ours) == list(theirs)
    assert [k for k in ours if ours[k].shape != theirs[k].shape] == ["conv1.weight"]


def test_unknown_model_names_the_nearest():
    with pytest.raises(OptionError, match="Did you mean 'cifar_resnet18'"):
        build_model(Comparison(model="cifar_resnet_18"), 3, 32, 10)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"model": "resnet18", "width": 32}, "width is an option of mlp"),
        ({"model": "small_cnn", "stem_stride": 2}, "stem_stride is an option of cifar_resnet10"),
        ({"model": "resnet18", "stem_stride": 2}, "stem_stride is an option"),
    ],
)
def test_options_a_model_does_not_take(options, match):
    with pytest.raises(OptionError, match=match):
        build_model(Comparison(**options), 3, 32, 10)


def test_torchvision_models_refuse_grey_images():
    with pytest.raises(OptionError, match="colour images, not 1"):
        build_model(Comparison(model="resnet18"), 1, 32, 10)
