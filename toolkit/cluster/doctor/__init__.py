"""Before a job is queued: does this very configuration run on these hosts, and if not, what mends it?

toolkit doctor zero=stage3 offload=nvme --hostfile hosts
"""
