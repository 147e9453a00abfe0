"""What can be seen of a checkpoint and a folder of images, for the configuration that ``unet-trt init`` writes."""
