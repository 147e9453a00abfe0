"""Models as other programs serve and run them: Triton model repositories, archives with a runner of their own."""
