"""How much memory this machine has."""

from pathlib import Path

_MEMINFO = Path("/proc/meminfo")


def available_memory() -> int | None:
    """Bytes that can be taken before the system swaps or ends a process; None if it does not say.

    Linux counts what it can give back, such as its cache of files, as available.
    """
    return _meminfo("MemAvailable")


def total_memory() -> int | None:
    """Bytes that there are; None if the system does not say."""
    return _meminfo("MemTotal")


def _meminfo(wanted: str) -> int | None:
    try:
        lines = _MEMINFO.read_text().splitlines()
    except OSError:  # not Linux
        return None
    sizes = (line.split()[1] for line in lines if line.startswith(f"{wanted}:"))
    return next((1024 * int(size) for size in sizes), None)
