"""`clips-llava pretrain` for launchers: `torchrun --nproc-per-node 8 scripts/pretrain.py RECIPE key=value …`."""

import sys

from eval_suites.cli import main

if __name__ == "__main__":
    sys.exit(main(["pretrain", *sys.argv[1:]]))
