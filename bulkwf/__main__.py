"""`python -m bulkwf`."""

from bulkwf.cli import main

if __name__ == "__main__":
    main()
