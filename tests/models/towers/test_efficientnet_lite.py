"""The image tower: its shapes, its padding against a written-out one, saving, Auto classes, low precision."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageClassification

from digrap_scale.models.towers import (
    EfficientNetLiteConfig,
    EfficientNetLiteForImageClassification,
    EfficientNetLiteModel,
    register,
)
from digrap_scale.models.towers.efficientnet_lite import FloatBatchNorm2d, InvertedResidual, SameConv2d
from digrap_scale.models.towers.image_processor import image_processor

SMALL_STAGES = [[1, 3, 1, 1, 8], [2, 3, 2, 6, 12], [1, 5, 2, 6, 16]]


def small_config(**changes: object) -> EfficientNetLiteConfig:
    return EfficientNetLiteConfig(stages=SMALL_STAGES, stem_channels=8, hidden_size=24, num_labels=5, **changes)


def test_lite0_has_the_published_number_of_parameters() -> None:
    model = EfficientNetLiteForImageClassification(EfficientNetLiteConfig(num_labels=1000))
    assert sum(parameter.numel() for parameter in model.parameters()) == 4_652_008


def test_shapes_and_wrapping() -> None:
    model = EfficientNetLiteModel(EfficientNetLiteConfig()).eval()
    output = model(torch.zeros(2, 3, 65, 64))
    assert output.last_hidden_state.shape == (2, 1280, 3, 2)
    assert output.pooler_output.shape == (2, 1280)
    assert set(model._no_split_modules or ()) == {"InvertedResidual"}
    assert sum(isinstance(module, InvertedResidual) for module in model.modules()) == 16


@pytest.mark.parametrize("kernel", [3, 5])
@pytest.mark.parametrize("size", [5, 6, 7, 8])
def test_stride_two_pads_right_and_below_first(kernel: int, size: int) -> None:
    """Output i sees inputs 2i − left … 2i − left + k − 1, with the left padding being the smaller half."""
    conv = SameConv2d(1, 1, kernel, stride=2, bias=False)
    torch.nn.init.normal_(conv.weight)
    image = torch.randn(1, 1, size, size)
    outputs = -(-size // 2)
    total = max((outputs - 1) * 2 + kernel - size, 0)
    left = total // 2
    expected = torch.zeros(1, 1, outputs, outputs)
    for row in range(outputs):
        for column in range(outputs):
            for i in range(kernel):
                for j in range(kernel):
                    y, x = 2 * row - left + i, 2 * column - left + j
                    if 0 <= y < size and 0 <= x < size:
                        expected[0, 0, row, column] += conv.weight[0, 0, i, j].detach() * image[0, 0, y, x]
    torch.testing.assert_close(conv(image).detach(), expected, atol=1e-5, rtol=1e-5)


def test_saved_model_comes_back_through_the_auto_classes(tmp_path: Path) -> None:
    register()  # again: must not fail
    torch.manual_seed(0)
    model = EfficientNetLiteForImageClassification(small_config()).eval()
    model.save_pretrained(tmp_path)
    image_processor(32).save_pretrained(tmp_path)
    assert isinstance(AutoConfig.from_pretrained(tmp_path), EfficientNetLiteConfig)
    again = AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    tower = AutoModel.from_pretrained(tmp_path).eval()
    pixels = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(again(pixels).logits, model(pixels).logits)
    torch.testing.assert_close(tower(pixels).pooler_output, model.efficientnet_lite(pixels).pooler_output)
    assert set(load_file(tmp_path / "model.safetensors")) == set(model.state_dict())
    assert AutoImageProcessor.from_pretrained(tmp_path).size == {"height": 32, "width": 32}


def test_image_processor_maps_bytes_as_the_tower_was_trained() -> None:
    from PIL import Image

    pixels = image_processor(4)(images=[Image.new("RGB", (8, 8), (0, 127, 255))], return_tensors="pt")["pixel_values"]
    expected = torch.tensor([-127 / 128, 0.0, 1.0])
    torch.testing.assert_close(pixels[0, :, 0, 0].float(), expected, atol=1e-5, rtol=0)


def test_every_parameter_gets_a_gradient_and_the_loss_is_cross_entropy() -> None:
    model = EfficientNetLiteForImageClassification(small_config(dropout=0.0)).eval()
    labels = torch.tensor([0, 3])
    output = model(torch.randn(2, 3, 32, 32), labels=labels)
    torch.testing.assert_close(output.loss, F.cross_entropy(output.logits, labels))
    output.loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("training", [False, True])
def test_batch_norm_computes_in_float32_with_low_precision_weights(training: bool) -> None:
    torch.manual_seed(0)
    exact = torch.nn.BatchNorm2d(6, momentum=0.1).train(training)
    torch.nn.init.normal_(exact.weight, 1.0, 0.1)
    ours = FloatBatchNorm2d(6, momentum=0.1).train(training)
    ours.load_state_dict(exact.state_dict())
    for name in ("weight", "bias"):  # the statistics stay float32, as under FSDP2's mixed precision
        getattr(ours, name).data = getattr(ours, name).data.bfloat16()
    inputs = torch.randn(4, 6, 3, 3)
    output = ours(inputs.bfloat16())
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output.float(), exact(inputs), atol=0.05, rtol=0.02)
    assert ours.running_mean is not None and ours.running_mean.dtype == torch.float32
    torch.testing.assert_close(ours.running_mean, exact.running_mean, atol=2e-3, rtol=0)
    assert int(ours.num_batches_tracked) == int(training)  # type: ignore[arg-type]


def test_whole_model_runs_in_bfloat16() -> None:
    model = EfficientNetLiteForImageClassification(small_config()).to(torch.bfloat16).train()
    assert model(torch.randn(2, 3, 32, 32)).logits.dtype == torch.bfloat16


def test_malformed_stages_are_refused() -> None:
    with pytest.raises(ValueError, match="stages"):
        EfficientNetLiteConfig(stages=[[1, 3, 1]])
