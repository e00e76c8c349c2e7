"""Many hosts: hostfiles, launchers, a doctor that looks at them before a job is queued, and their measured rates."""
