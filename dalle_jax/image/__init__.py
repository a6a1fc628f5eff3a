"""Images: decoding, the paper's crop recipes, the pixel map and contact sheets."""
