"""The original entry point: `torchrun ... train_nablagfn.py --config=... --exp_name=...`."""

import sys

from nablagfn.cli import main

if __name__ == "__main__":
    main(["train", *sys.argv[1:]])
