"""How good a model is: features, distances between sets of images, studies and reports."""
