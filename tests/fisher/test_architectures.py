"""Whole networks from torchvision against the oracle, in float64 and float32."""

import pytest
import torch
from cases import assert_close, oracle, randomise, to_dtype

from gradmask import fisher_diagonal

models = pytest.importorskip("torchvision.models")

SMALL_SWIN = {"patch_size": [4, 4], "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4]}
SMALL_SWIN |= {"window_size": [7, 7]}
SMALL_CONVNEXT = {
    "block_setting": [
        models.convnext.CNBlockConfig(16, 32, 2),
        models.convnext.CNBlockConfig(32, None, 2),
    ]
}


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("resnet18", {}, ()),
        ("mobilenet_v3_small", {}, ()),
        ("squeezenet1_1", {}, ()),
        ("densenet121", {}, ()),
        ("SwinTransformer", SMALL_SWIN, ("attn",)),
        ("ConvNeXt", SMALL_CONVNEXT, ()),
        pytest.param("swin_t", {}, ("attn",), marks=pytest.mark.slow),
        pytest.param("convnext_tiny", {}, (), marks=pytest.mark.slow),
        pytest.param("vit_b_16", {"image_size": 32}, (), marks=pytest.mark.slow),
    ],
)
def test_network(name, options, expected, ways):
    model = randomise(getattr(models, name)(num_classes=5, **options), noise=0.02)
    size = options.get("image_size", 40)
    data = [(torch.randn(n, 3, size, size, dtype=torch.float64), torch.arange(n)) for n in (2, 1)]
    truth = oracle(model, data)
    assert all(t.max() > 1e-30 for t in truth.values()), "a test of zeros"
    assert_close(fisher_diagonal(model, data), truth)
    single = fisher_diagonal(model.float(), to_dtype(data, torch.float32))
    # The rounding of 121 layers forward and back is larger than that, one sample at a time too.
    assert_close(single, truth, 1e-3 if name == "densenet121" else 1e-5)
    slow = {n for n, way in ways.items() if way == "module"}
    assert "sample" not in ways.values()
    assert all(any(part in name for part in expected) for name in slow)
    assert all(any(part in name for name in slow) for part in expected)
