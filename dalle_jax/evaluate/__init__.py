"""How good a model is: features, distances between sets of pictures, studies and reports."""
