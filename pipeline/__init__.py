"""unet-trt: from a trained UNet to a TensorRT engine whose accuracy can be trusted."""

__version__ = "0.1.0"
