"""Entry points: `python -m jobs.<verb> --config NAME_OR_PATH key=value ...`."""
