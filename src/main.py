"""`python src/main.py` is `agrl train`: options are the same."""

import sys

from attention_guided_rl.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
