"""EfficientNet-Lite as a tower of tokens, for models that read an image as a sequence (LLaVA and its kin)."""

# B samples, C channels, H W pixels, N = ⌈H/32⌉ · ⌈W/32⌉ tokens

from __future__ import annotations

from typing import cast

import torch
from transformers.modeling_outputs import BaseModelOutputWithPooling

from digrap_scale.models.towers.efficientnet_lite import EfficientNetLiteConfig, EfficientNetLiteModel

TOKEN_PIXELS = 32  # the tower's stride: a token stands for a square of this side
LONGEST_WAVE = 32.0  # of ``place_code``, in tokens / 2π


class EfficientNetLiteTokensConfig(EfficientNetLiteConfig):
    """The sizes of ``EfficientNetLiteConfig`` under a type of their own, by which the Auto classes find the tower.

    Attributes:
        window_pixels: side of the squares that the tower reads one by one, so that each is seen at the size that it was
            trained at and without its neighbours; 0: the whole image at once. Sides of images must be multiples of it.
        place_scale: of the fixed sine and cosine code of a token's row and column that is added to it (``place_code``),
            without which windows' tokens do not tell where they lie; 0: none.
    """

    model_type = "efficientnet_lite_tokens"

    window_pixels: int = 0
    place_scale: float = 0.0


def place_code(rows: int, columns: int, channels: int) -> torch.Tensor:
    """Fixed 2-D position code (as MAE's, arXiv 2111.06377, with shorter wavelengths: the grids are small).

    Args:
        rows, columns: of the grid of tokens.
        channels: a multiple of 4; the first half tells the row, the second the column, sines before cosines.

    Returns:
        [rows · columns, channels] float32, within ±1.

    Raises:
        ValueError: ``channels`` is no multiple of 4.
    """
    if channels % 4:
        raise ValueError(f"place_scale: {channels} channels: the place's code needs a multiple of 4")
    steps = LONGEST_WAVE ** -torch.linspace(0, 1, channels // 4)

    def code(count: int) -> torch.Tensor:
        angles = torch.arange(count).unsqueeze(1) * steps
        return torch.cat((angles.sin(), angles.cos()), dim=1)

    row, column = code(rows), code(columns)
    return torch.cat((row.repeat_interleave(columns, dim=0), column.repeat(rows, 1)), dim=1)


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

        Raises:
            ValueError: an image's side is no multiple of ``window_pixels``.
        """
        side = cast(EfficientNetLiteTokensConfig, self.config).window_pixels or None
        batch, channels, height, width = pixel_values.shape
        if side is not None and (height % side or width % side):
            raise ValueError(
                f"image of {height}×{width} pixels: sides must be multiples of window_pixels ({side}); "
                "set the image processor's size"
            )
        rows, columns = (height // side, width // side) if side is not None else (1, 1)
        windows = pixel_values.reshape(batch, channels, rows, height // rows, columns, width // columns)
        windows = windows.permute(0, 2, 4, 1, 3, 5).reshape(-1, channels, height // rows, width // columns)
        output = super().forward(windows)
        assert output.last_hidden_state is not None and output.pooler_output is not None
        # [B · rows · columns, C, h, w] → [B, rows · h · columns · w, C]: the order of one map over the whole image
        maps = output.last_hidden_state
        grid = maps.reshape(batch, rows, columns, *maps.shape[1:]).permute(0, 1, 4, 2, 5, 3)
        tokens = grid.reshape(batch, -1, maps.shape[1])
        scale = cast(EfficientNetLiteTokensConfig, self.config).place_scale
        if scale:
            places = place_code(rows * maps.shape[2], columns * maps.shape[3], maps.shape[1])
            tokens = tokens + scale * places.to(tokens)
        pooled = output.pooler_output.reshape(batch, rows * columns, -1).mean(dim=1)
        hidden = None if output_hidden_states is None or output_hidden_states is False else (tokens,)
        return BaseModelOutputWithPooling(last_hidden_state=tokens, pooler_output=pooled, hidden_states=hidden)
