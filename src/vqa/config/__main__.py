"""`python -m vqa.config PROFILE [--set KEY=VALUE …]` checks a profile and prints it resolved."""

import argparse
import sys

from ruamel.yaml import YAML

from vqa.config import ConfigError, load_profile, parse_overrides


def main() -> None:
    parser = argparse.ArgumentParser(description="Check a profile and print it resolved.")
    parser.add_argument("profile")
    parser.add_argument("--set", action="extend", nargs="*", default=[], metavar="KEY=VALUE", dest="overrides")
    arguments = parser.parse_args()
    try:
        profile = load_profile(arguments.profile, parse_overrides(arguments.overrides))
    except ConfigError as error:
        sys.exit(f"error: {error}")
    YAML(typ="safe", pure=True).dump(profile.model_dump(), sys.stdout)


if __name__ == "__main__":
    main()
