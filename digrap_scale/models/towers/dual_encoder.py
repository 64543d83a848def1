"""A CLIP-style model whose text tower is a frozen table of sentence embeddings.

The image tower is an EfficientNet-Lite with a linear projection; ``input_ids`` are row numbers of the table (its
"tokenizer" is ``text_table.TextTable``). Loss: symmetric cross entropy over the batch (Radford et al. 2021, arXiv
2103.00020).
"""

# B images, C texts, E embedding size, T rows of the table

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.utils import ModelOutput

from digrap_scale.models.towers.efficientnet_lite import EfficientNetLiteConfig, EfficientNetLiteModel

LOGIT_SCALE_MAX = (
    4.605170185988092  # ln 100: hotter softmaxes make the contrastive loss unstable (CLIP clips there too)
)


class DualEncoderConfig(PreTrainedConfig):
    """Sizes of a dual encoder.

    Attributes:
        vision_config: the image tower's config (or its dict).
        projection_dim: E, the size of the sentence embeddings.
        num_texts: T, rows of the frozen table.
        logit_scale_init_value: ln of the initial inverse temperature.
    """

    model_type = "efficientnet_lite_dual_encoder"
    sub_configs = {"vision_config": EfficientNetLiteConfig}

    vision_config: dict | PreTrainedConfig | None = None
    projection_dim: int = 384
    num_texts: int = 1
    logit_scale_init_value: float = 2.6592

    def __post_init__(self, **kwargs):  # type: ignore[no-untyped-def]
        if not isinstance(self.vision_config, PreTrainedConfig):
            self.vision_config = EfficientNetLiteConfig(**(self.vision_config or {}))
        super().__post_init__(**kwargs)


@dataclass
class DualEncoderOutput(ModelOutput):
    """Outputs of the dual encoder.

    Attributes:
        loss: scalar, if asked for.
        logits_per_image: [B, C] scaled cosines.
        logits_per_text: [C, B], the transpose.
        text_embeds: [C, E], unit length.
        image_embeds: [B, E], unit length.
    """

    loss: torch.Tensor | None = None
    logits_per_image: torch.Tensor | None = None
    logits_per_text: torch.Tensor | None = None
    text_embeds: torch.Tensor | None = None
    image_embeds: torch.Tensor | None = None


class DualEncoderModel(PreTrainedModel):
    """EfficientNet-Lite image tower + projection against a frozen table of sentence embeddings."""

    config_class = DualEncoderConfig
    base_model_prefix = "dual_encoder"
    main_input_name = "pixel_values"
    input_modalities = ["image", "text"]
    _no_split_modules = ["InvertedResidual"]

    text_embeddings: torch.Tensor

    def __init__(self, config: DualEncoderConfig) -> None:
        super().__init__(config)
        assert isinstance(config.vision_config, EfficientNetLiteConfig)
        self.vision_model = EfficientNetLiteModel(config.vision_config)
        self.visual_projection = nn.Linear(config.vision_config.hidden_size, config.projection_dim, bias=False)
        # One element, not zero dimensions: FSDP2 cannot shard a scalar.
        self.logit_scale = nn.Parameter(torch.full((1,), config.logit_scale_init_value))
        # A buffer: it never trains, and no sharding backend has to know about it.
        self.register_buffer("text_embeddings", torch.zeros(config.num_texts, config.projection_dim))
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, DualEncoderModel):
            init.constant_(module.logit_scale, self.config.logit_scale_init_value)
            init.zeros_(module.text_embeddings)
        elif isinstance(module, nn.Linear):
            init.normal_(module.weight, mean=0.0, std=module.in_features**-0.5)
        elif isinstance(module, nn.Conv2d):
            init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        else:
            super()._init_weights(module)

    def set_text_table(self, embeddings_TE: torch.Tensor) -> None:
        """Replace the frozen table by ``embeddings_TE`` [T, E] (unit length, any float dtype); T goes into the config.

        Raises:
            ValueError: the embedding size differs from the projection's.
        """
        if embeddings_TE.ndim != 2 or embeddings_TE.shape[1] != self.config.projection_dim:
            raise ValueError(
                f"text table: expected [T, {self.config.projection_dim}], found {list(embeddings_TE.shape)}; "
                "embed the texts with the model that projection_dim belongs to"
            )
        self.text_embeddings = embeddings_TE.to(self.text_embeddings).clone()
        self.config.num_texts = embeddings_TE.shape[0]

    def get_image_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Project images: [B, 3, H, W] → [B, E], not normalised."""
        return self.visual_projection(self.vision_model(pixel_values).pooler_output)

    def get_text_features(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Look texts up: [C, 1] row numbers → [C, E]."""
        return self.text_embeddings[input_ids[:, 0]]

    def forward(
        self,
        input_ids: torch.Tensor,
        pixel_values: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        return_loss: bool = False,
    ) -> DualEncoderOutput:
        """Compare images with texts.

        Args:
            input_ids: [C, 1] int64 row numbers of the table.
            pixel_values: [B, 3, H, W].
            attention_mask: [C, 1], accepted because tokenizers give it; a row number needs none.
            return_loss: add the symmetric cross entropy; image i belongs to text i (B = C).
        """
        del attention_mask
        image_BE = F.normalize(self.get_image_features(pixel_values).float(), dim=-1)
        text_CE = F.normalize(self.get_text_features(input_ids).float(), dim=-1)
        scale = self.logit_scale.float().clamp(max=LOGIT_SCALE_MAX).exp()
        logits_BC = scale * image_BE @ text_CE.T
        loss = None
        if return_loss:
            targets = torch.arange(logits_BC.shape[0], device=logits_BC.device)
            loss = (F.cross_entropy(logits_BC, targets) + F.cross_entropy(logits_BC.T, targets)) / 2
        return DualEncoderOutput(loss, logits_BC, logits_BC.T.contiguous(), text_CE, image_BE)
