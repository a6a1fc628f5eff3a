"""A run in progress: its curves and sheets, in a browser or in one HTML file."""
