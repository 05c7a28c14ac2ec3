"""Sets of samples: MNIST, scikit-learn's digits, a synthetic Gaussian, or a file."""
