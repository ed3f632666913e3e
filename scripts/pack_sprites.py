"""python scripts/pack_sprites.py NODE_MODULES: pack the three emoji sets into the sheets that ship.

NODE_MODULES holds the npm packages emoji-datasource-google, emoji-datasource-twitter and
@lobehub/fluent-emoji-3d. Every sprite is cropped to its alpha and scaled to 48 pixels on its longest side,
three times the detail that a scene of 64 pixels shows. Two sheets a style: the world's named objects, and the
`other` objects that only the autoencoder was trained on.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from PIL import Image

from atomtune.scenes.world import CLASS_OF, STYLES

CELL = 48
COLUMNS = 32
SHORT_NAMES = {
    "panda": "panda_face",
    "fox": "fox_face",
    "monkey": "monkey_face",
    "fish": "tropical_fish",
    "donut": "doughnut",
    "cheese": "cheese_wedge",
    "ice cream": "icecream",
    "bicycle": "bike",
    "train": "steam_locomotive",
    "clover": "four_leaf_clover",
    "pine tree": "evergreen_tree",
    "drum": "drum_with_drumsticks",
    "soccer ball": "soccer",
    "hat": "tophat",
    "shoe": "athletic_shoe",
    "television": "tv",
    "clock": "alarm_clock",
    "dog face": "dog",
    "slice of pizza": "pizza",
    "bactrian camel": "camel",
    "electric light bulb": "bulb",
    "sailboat": "boat",
    "pagoda": "japanese_castle",
    "snowman": "snowman_without_snow",
}
LEFT_OUT = ("Symbols", "Flags", "Component", "Smileys & Emotion", "People & Body")


def sprite(path: Path) -> Image.Image:
    """The picture at `path`, cropped to its alpha and centred in a square cell."""
    picture = Image.open(path).convert("RGBA")
    picture = picture.crop(picture.getchannel("A").point(lambda a: 255 * (a > 24)).getbbox())
    scale = CELL / max(picture.size)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    picture = picture.convert("RGBa").resize(size, Image.Resampling.LANCZOS).convert("RGBA")
    cell = Image.new("RGBA", (CELL, CELL))
    cell.paste(picture, ((CELL - size[0]) // 2, (CELL - size[1]) // 2))
    return cell


def main() -> None:
    modules = Path(sys.argv[1])
    listing = json.loads((modules / "emoji-datasource-google/emoji.json").read_text(encoding="utf-8"))
    fluent = modules / "@lobehub/fluent-emoji-3d/assets"
    paths: dict[str, dict[str, Path]] = {}
    for entry in listing:
        stem = entry["image"][:-4]
        relief = next(
            (fluent / f"{n}.webp" for n in (stem, stem.replace("-fe0f", "")) if (fluent / f"{n}.webp").exists()),
            None,
        )
        if (
            relief is None
            or not (entry["has_img_google"] and entry["has_img_twitter"])
            or entry["category"] in LEFT_OUT
        ):
            continue
        paths[entry["short_name"]] = {
            "flat": modules / f"emoji-datasource-twitter/img/twitter/64/{stem}.png",
            "shaded": modules / f"emoji-datasource-google/img/google/64/{stem}.png",
            "3d": relief,
        }
    named = {n: SHORT_NAMES.get(n, n.replace(" ", "_")) for n in CLASS_OF}
    missing = [n for n, s in named.items() if s not in paths]
    if missing:
        raise SystemExit(f"no sprite for {missing}: check SHORT_NAMES")
    other = {s.replace("_", " ").replace("-", " "): s for s in sorted(set(paths) - set(named.values()))}
    target = Path("src/atomtune/scenes/assets")
    for sheet, names in (("named", named), ("other", other)):
        for style in STYLES:
            rows = -(-len(names) // COLUMNS)
            picture = Image.new("RGBA", (CELL * COLUMNS, CELL * rows))
            for i, short in enumerate(names.values()):
                picture.paste(sprite(paths[short][style]), (CELL * (i % COLUMNS), CELL * (i // COLUMNS)))
            picture.save(target / f"{sheet}-{style}.webp", lossless=True, quality=100, method=6, exact=False)
        (target / f"{sheet}.json").write_text(json.dumps(list(names), indent=0) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
