"""Many devices and many processes: the only room that names the axes of a mesh."""
