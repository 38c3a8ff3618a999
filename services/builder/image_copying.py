"""`python -m services.builder.image_copying`: an image from one store to another, without any server.

`ekiben images copy` calls it.
"""

import argparse
import sys
from collections.abc import Sequence

from ekiben.errors import EkibenError
from services.builder import stopping
from services.content import open_images
from services.content.images import Descriptor, Platform
from services.content.images.copying import copy_image


async def copy(source: str, target: str, *, platform: str = "", attachments: bool = True) -> Descriptor:
    """Copy the image that `source` names to `target`; the reference stays, where the target has none of its own.

    Raises:
        EkibenError: it cannot be copied; reasons are those of `open_images` and `copy_image`.
    """
    async with open_images(source, _say) as (there, named), open_images(target, _say) as (into, reference):
        kept = "" if named.startswith("sha256:") else named
        return await copy_image(
            there,
            named,
            into,
            reference or kept,
            platform=Platform.parse(platform) if platform else None,
            attachments=attachments,
            say=_say,
        )


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; prints the image's digest."""
    parser = argparse.ArgumentParser(prog="python -m services.builder.image_copying")
    parser.add_argument("source")
    parser.add_argument("target")
    parser.add_argument("--platform", default="")
    parser.add_argument("--no-attachments", action="store_true")
    given = parser.parse_args(arguments)
    try:
        copied = stopping.run(
            copy(given.source, given.target, platform=given.platform, attachments=not given.no_attachments)
        )
    except stopping.Stopped:
        print("Stopped. Nothing was tagged; what was copied so far is used by the next copy.", file=sys.stderr)
        return stopping.STATUS
    except EkibenError as exc:
        print(f"Error: {exc.message}", file=sys.stderr)
        return 1
    except OSError as exc:
        print(f"Error: {exc}. Nothing was tagged; what was copied so far is used by the next copy.", file=sys.stderr)
        return 1
    print(copied.digest)
    return 0


if __name__ == "__main__":
    sys.exit(main())
