"""`python -m services.builder.image_checking`: whether images are whole, wherever they are, without any server.

`ekiben images fsck` calls it.
"""

import argparse
import asyncio
import sys
from collections.abc import Sequence
from pathlib import Path

from ekiben.errors import EkibenError, NotFound
from services.content import open_images
from services.content.images.checking import Checked, check


async def look(images: str, *, whole: bool = False) -> Checked:
    """Check the image that a name stands for, or all of a layout or repository where it has no reference.

    Raises:
        EkibenError: those of `open_images` and `check`; NotFound where there is no layout (IMAGE_NOT_FOUND).
    """
    transport, _, rest = images.partition(":")
    folder = Path(rest.partition(":")[0])
    if transport == "oci" and not await asyncio.to_thread((folder / "index.json").is_file):
        raise NotFound(
            f"There is no image layout in {folder}: it has no index.json.", reason="IMAGE_NOT_FOUND", image=images
        )
    async with open_images(images) as (store, reference):
        return await check(store, [reference] if reference else (), whole=whole)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; ends with 1 where something is not as it should be."""
    parser = argparse.ArgumentParser(prog="python -m services.builder.image_checking")
    parser.add_argument("images")
    parser.add_argument("--whole", action="store_true")
    given = parser.parse_args(arguments)
    try:
        found = asyncio.run(look(given.images, whole=given.whole))
    except (EkibenError, OSError) as exc:
        print(f"Error: {exc.message if isinstance(exc, EkibenError) else exc}", file=sys.stderr)
        return 1
    for fault in found.faults:
        print(f"{fault.reference}: {fault.what} {fault.digest}: {fault.why}")
    size = f"{found.size_bytes / (1 << 30):.2f} GiB"
    said = "there and right" if given.whole else "there; --whole reads them too"
    count = f"{found.references} references, {found.blobs} blobs ({size})"
    if found.faults:
        print(
            f"Error: {len(found.faults)} of {count} are missing or damaged. Build the images that are named again with "
            "`ekiben builds create BENTO --image --force`, or copy them from where they are whole.",
            file=sys.stderr,
        )
        return 1
    print(f"{count}: {said}.", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
