"""Starts the ranks of this node. Takes torchrun's own options."""

import sys

from launch.cluster.torchrun import run_torchrun

if __name__ == "__main__":
    sys.exit(run_torchrun(sys.argv[1:]))
