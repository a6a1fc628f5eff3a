"""The HTTP server: requests joined into batches, the page, and what monitors them."""
