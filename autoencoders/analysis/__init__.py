"""What a trained autoencoder knows: principal components and linear probes."""
