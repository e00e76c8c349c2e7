"""Bytes: their units, and how they are told.

GIB, MIB        # peak / GIB
gib(3 * 2**29)    # "1.50 GiB"
"""

KIB, MIB, GIB = 2**10, 2**20, 2**30


def gib(size: float) -> str:
    """Bytes for a reader: 1.50 GiB, or MiB or KiB below one."""
    if size >= GIB:
        return f"{size / GIB:,.2f} GiB"
    return f"{size / MIB:,.0f} MiB" if size >= MIB else f"{size / KIB:,.0f} KiB"
