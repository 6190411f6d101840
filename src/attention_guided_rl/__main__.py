"""`python -m attention_guided_rl` is `agrl`."""

from attention_guided_rl.cli import entry_point

if __name__ == "__main__":
    entry_point()
