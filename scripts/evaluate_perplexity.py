"""Perplexity of fused rungs against stock over one text; --help lists the options.

The same as `hf-fusion perplexity`.
"""

import sys

from hf_fusion.cli import main

if __name__ == "__main__":
    sys.exit(main(["perplexity", *sys.argv[1:]]))
