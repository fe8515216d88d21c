"""The command `lmdist-train` as `python -m lmdist.job`."""

from lmdist.job import main

if __name__ == "__main__":
    main()
