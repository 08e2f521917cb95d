"""Attention kernels side by side over lengths, and decoding with grouped heads; --help lists the
options.

The same as `hf-fusion bench attention`.
"""

import sys

from hf_fusion.cli import main

if __name__ == "__main__":
    sys.exit(main(["bench", "attention", *sys.argv[1:]]))
