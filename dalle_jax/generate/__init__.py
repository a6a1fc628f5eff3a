"""New pictures from captions: models, their folders, and drawing from them."""
