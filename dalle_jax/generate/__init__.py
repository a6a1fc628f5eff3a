"""New images from captions: models, their folders, and sampling from them."""
