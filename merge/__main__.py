"""`python -m adapter_merge`: the command line."""

from adapter_merge.cli.main import main

if __name__ == "__main__":
    main()
