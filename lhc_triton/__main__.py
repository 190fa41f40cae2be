"""``python -m lhc_triton`` is the command line."""

from lhc_triton.cli import main

if __name__ == "__main__":
    main()
