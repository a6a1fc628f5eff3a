"""What a training run needs of its devices, before any is rented."""
