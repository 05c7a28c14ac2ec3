"""One measurement, one command each: roofline, scaling, scale-out, decoding, accuracy on hard inputs."""
