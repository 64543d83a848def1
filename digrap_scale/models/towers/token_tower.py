"""EfficientNet-Lite as a tower of tokens, for models that read an image as a sequence (LLaVA and its kin)."""

# B samples, C channels, H W pixels, N = ⌈H/32⌉ · ⌈W/32⌉ tokens

from __future__ import annotations

import torch
from transformers.modeling_outputs import BaseModelOutputWithPooling

from digrap_scale.models.towers.efficientnet_lite import EfficientNetLiteConfig, EfficientNetLiteModel

TOKEN_PIXELS = 32  # the tower's stride: a token stands for a square of this side


class EfficientNetLiteTokensConfig(EfficientNetLiteConfig):
    """The sizes of ``EfficientNetLiteConfig`` under a type of their own, by which the Auto classes find the tower."""

    model_type = "efficientnet_lite_tokens"


class EfficientNetLiteTokensModel(EfficientNetLiteModel):
    """The same weights under the same names; the last feature map's places are the tokens, row by row."""

    config_class = EfficientNetLiteTokensConfig

    def forward(
        self,
        pixel_values: torch.Tensor,
        output_hidden_states: bool | int | list[int] | None = None,
        return_dict: bool = True,
    ) -> BaseModelOutputWithPooling:
        """Run the tower.

        Args:
            pixel_values: [B, 3, H, W].
            output_hidden_states: anything but None or False adds ``hidden_states``, of which there is one, the last:
                the caller's ``vision_feature_layer`` must be −1.
            return_dict: taken for the callers' sake; the output is always an object.

        Returns:
            ``last_hidden_state`` [B, N, C] and ``pooler_output`` [B, C].
        """
        output = super().forward(pixel_values)
        assert output.last_hidden_state is not None
        tokens = output.last_hidden_state.flatten(2).transpose(1, 2)
        hidden = None if output_hidden_states is None or output_hidden_states is False else (tokens,)
        return BaseModelOutputWithPooling(
            last_hidden_state=tokens, pooler_output=output.pooler_output, hidden_states=hidden
        )
