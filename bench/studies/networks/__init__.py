"""Studies of other networks: convolutional, recurrent, and linear autoencoders."""
