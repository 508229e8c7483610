"""`clips-llava tune` for launchers: `torchrun --nproc-per-node 8 scripts/tune.py RECIPE key=value …`."""

import sys

from eval_suites.cli import main

if __name__ == "__main__":
    sys.exit(main(["tune", *sys.argv[1:]]))
