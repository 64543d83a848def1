"""EfficientNet-Lite, written as a transformers model.

Source: Tan & Le, *EfficientNet*, ICML 2019, arXiv 1905.11946; the Lite variants drop squeeze-and-excite and use ReLU6.
Names follow the Hugging Face layout, so that ``save_pretrained``, ``from_pretrained`` and the Auto classes work.
"""

# B samples, C channels, H W pixels, K classes

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPooling, ImageClassifierOutput

# repeats, kernel, stride of the first repeat, expansion, output channels
LITE0_STAGES: tuple[tuple[int, int, int, int, int], ...] = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)


class EfficientNetLiteConfig(PreTrainedConfig):
    """Sizes of an EfficientNet-Lite; the defaults are Lite0.

    Attributes:
        stages: rows of (repeats, kernel, stride of the first repeat, expansion, output channels).
        stem_channels: output channels of the first convolution (stride 2).
        hidden_size: output channels of the last 1×1 convolution, and the pooled feature's size.
        dropout: on the pooled feature, before a classifier.
    """

    model_type = "efficientnet_lite"
    base_config_key = "vision_config"

    num_channels: int = 3
    stem_channels: int = 32
    stages: list | tuple = LITE0_STAGES
    hidden_size: int = 1280
    batch_norm_eps: float = 1e-3
    batch_norm_momentum: float = 0.1
    dropout: float = 0.2

    def __post_init__(self, **kwargs):  # type: ignore[no-untyped-def]
        super().__post_init__(**kwargs)
        self.stages = [list(stage) for stage in self.stages]
        if not self.stages or any(len(stage) != 5 for stage in self.stages):
            raise ValueError(
                "stages: each row must be (repeats, kernel, stride, expansion, channels), "
                f"found {self.stages!r}; correct the model's config.json"
            )


class SameConv2d(nn.Conv2d):
    """Convolution with TensorFlow's "same" padding: [B, C, H, W] → [B, C', ⌈H/s⌉, ⌈W/s⌉].

    At stride 2 the padding depends on the input's size and its odd element goes right and below, which
    ``torch.nn.Conv2d(padding=…)`` cannot express.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        pads = []
        for size, kernel, stride in zip(
            reversed(input.shape[2:]), reversed(self.kernel_size), reversed(self.stride), strict=True
        ):
            total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
            pads += [total // 2, total - total // 2]
        if any(pads):
            input = F.pad(input, pads)
        return super().forward(input)


class FloatBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm that computes in float32 whatever the input's dtype, and keeps the input's dtype.

    Under mixed precision weights are low-precision copies while the running statistics stay float32; torch's own
    kernel refuses such mixtures on some devices.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if input.dtype == torch.float32 and self.weight.dtype == torch.float32:
            return super().forward(input)
        mean = cast(torch.Tensor, self.running_mean).float()
        var = cast(torch.Tensor, self.running_var).float()
        output = F.batch_norm(
            input.float(),
            mean,
            var,
            self.weight.float(),
            self.bias.float(),
            self.training,
            self.momentum or 0.0,
            self.eps,
        )
        if self.training:
            with torch.no_grad():
                cast(torch.Tensor, self.running_mean).copy_(mean)
                cast(torch.Tensor, self.running_var).copy_(var)
                cast(torch.Tensor, self.num_batches_tracked).add_(1)
        return output.to(input.dtype)


class ConvNorm(nn.Module):
    """Convolution without bias, BatchNorm, and ReLU6 if ``activation``."""

    def __init__(
        self,
        config: EfficientNetLiteConfig,
        inputs: int,
        outputs: int,
        kernel: int,
        stride: int,
        groups: int,
        activation: bool,
    ) -> None:
        super().__init__()
        self.conv = SameConv2d(inputs, outputs, kernel, stride=stride, groups=groups, bias=False)
        self.norm = FloatBatchNorm2d(outputs, eps=config.batch_norm_eps, momentum=config.batch_norm_momentum)
        self.activation = activation

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[B, C, H, W] → [B, C', H', W']."""
        hidden = self.norm(self.conv(hidden))
        return F.relu6(hidden) if self.activation else hidden


class InvertedResidual(nn.Module):
    """Expand 1×1, depthwise k×k, project 1×1; a residual where shapes allow it."""

    def __init__(
        self, config: EfficientNetLiteConfig, inputs: int, outputs: int, kernel: int, stride: int, expansion: int
    ) -> None:
        super().__init__()
        middle = inputs * expansion
        self.expand = ConvNorm(config, inputs, middle, 1, 1, 1, True) if expansion != 1 else None
        self.depthwise = ConvNorm(config, middle, middle, kernel, stride, middle, True)
        self.project = ConvNorm(config, middle, outputs, 1, 1, 1, False)
        self.residual = stride == 1 and inputs == outputs

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[B, C, H, W] → [B, C', H', W']."""
        inner = hidden if self.expand is None else self.expand(hidden)
        inner = self.project(self.depthwise(inner))
        return hidden + inner if self.residual else inner


class EfficientNetLitePreTrainedModel(PreTrainedModel):
    """What both EfficientNet-Lite models share."""

    config_class = EfficientNetLiteConfig
    base_model_prefix = "efficientnet_lite"
    main_input_name = "pixel_values"
    input_modalities = ["image"]
    _no_split_modules = ["InvertedResidual"]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Conv2d):
            init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        else:
            super()._init_weights(module)


class EfficientNetLiteModel(EfficientNetLitePreTrainedModel):
    """The image tower: [B, 3, H, W] → ``last_hidden_state`` [B, hidden, H/32, W/32], ``pooler_output`` [B, hidden]."""

    def __init__(self, config: EfficientNetLiteConfig) -> None:
        super().__init__(config)
        self.stem = ConvNorm(config, config.num_channels, config.stem_channels, 3, 2, 1, True)
        blocks: list[nn.Module] = []
        channels = config.stem_channels
        for repeats, kernel, stride, expansion, outputs in config.stages:
            for repeat in range(repeats):
                blocks.append(
                    InvertedResidual(config, channels, outputs, kernel, stride if repeat == 0 else 1, expansion)
                )
                channels = outputs
        self.blocks = nn.ModuleList(blocks)
        self.head = ConvNorm(config, channels, config.hidden_size, 1, 1, 1, True)
        self.post_init()

    def forward(self, pixel_values: torch.Tensor) -> BaseModelOutputWithPooling:
        """Run the tower.

        Args:
            pixel_values: [B, 3, H, W]; cast to the weights' dtype.
        """
        # Channels last: the layout that depthwise convolutions are fast in (2.7 times on a CPU); values are the same.
        pixel_values = pixel_values.to(self.stem.conv.weight.dtype).contiguous(memory_format=torch.channels_last)
        hidden = self.stem(pixel_values)
        for block in self.blocks:
            hidden = block(hidden)
        hidden = self.head(hidden)
        return BaseModelOutputWithPooling(last_hidden_state=hidden, pooler_output=hidden.mean(dim=(2, 3)))


class EfficientNetLiteForImageClassification(EfficientNetLitePreTrainedModel):
    """The image tower with a linear classifier: ``logits`` [B, K]."""

    def __init__(self, config: EfficientNetLiteConfig) -> None:
        super().__init__(config)
        self.efficientnet_lite = EfficientNetLiteModel(config)
        self.dropout = nn.Dropout(config.dropout)
        self.classifier = nn.Linear(config.hidden_size, len(config.id2label or {}))
        self.post_init()

    def forward(self, pixel_values: torch.Tensor, labels: torch.Tensor | None = None) -> ImageClassifierOutput:
        """Classify.

        Args:
            pixel_values: [B, 3, H, W].
            labels: [B] int64 class indices; with them the output has the mean cross entropy as ``loss``.
        """
        pooled = self.efficientnet_lite(pixel_values).pooler_output
        logits = self.classifier(self.dropout(pooled))
        loss = None if labels is None else F.cross_entropy(logits.float(), labels)
        return ImageClassifierOutput(loss=loss, logits=logits)
