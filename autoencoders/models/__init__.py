"""Models: the fully connected autoencoder, the one over patches, what corrupts their input, and batched repeats."""
