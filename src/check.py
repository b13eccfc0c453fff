"""Does a model fit, and does it read what is meant? python -m src.check model=llava stage=all."""

import sys

if __name__ == "__main__":
    from tprl.commands.check import check_run

    sys.exit(check_run(sys.argv[1:]))
