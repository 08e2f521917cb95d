"""Times every rung of fusion against stock; --help lists the options.

The same as `hf-fusion ablate`.
"""

import sys

from hf_fusion.cli import main

if __name__ == "__main__":
    sys.exit(main(["ablate", *sys.argv[1:]]))
