"""Where the runs of a sweep are started: this machine, clusters, clouds."""
