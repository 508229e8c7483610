"""`clips-llava align` for launchers: `torchrun --nproc-per-node 8 scripts/align.py RECIPE key=value …`."""

import sys

from eval_suites.cli import main

if __name__ == "__main__":
    sys.exit(main(["align", *sys.argv[1:]]))
