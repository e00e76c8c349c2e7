"""The processes of a job and what they stand on: ranks, the watchdog, ops, NVMe, what must be the same on all."""
