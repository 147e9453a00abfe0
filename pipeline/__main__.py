"""``python -m pipeline``: the same as ``unet-trt``."""

from pipeline.cli import main

if __name__ == "__main__":
    main()
