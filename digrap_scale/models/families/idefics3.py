"""Idefics3 and SmolVLM (Marafioti et al. 2025, arXiv 2504.05299): an image is cut into tiles, many for a large one."""

from __future__ import annotations

from digrap_scale.models.families.base import Family


class Idefics3(Family):
    """The model's own list of blocks names the vision tower's attention alone; its whole layers are sharded as well."""

    wrap = ("Idefics3EncoderLayer", "SmolVLMEncoderLayer")
    blank_options = {"do_image_splitting": False}
