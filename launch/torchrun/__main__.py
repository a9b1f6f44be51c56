"""Starts the ranks of this node. Takes torchrun's own options."""

import sys

from launch.cluster.torchrun import wrapper

if __name__ == "__main__":
    sys.exit(wrapper(sys.argv[1:]))
