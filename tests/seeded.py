"""A UNet whose weights are the same in every process, without a file of them."""

from typing import Any

import torch

from models.unet import UNet


def seeded_unet(**arguments: Any) -> UNet:
    """The network of a fixed seed."""
    torch.manual_seed(0)
    return UNet(**arguments)
