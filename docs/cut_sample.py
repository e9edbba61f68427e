"""Cut the sample that comes with the package out of the emoji corpus:   python docs/cut_sample.py data/emoji

The corpus must be the default one, at 64x64. The same corpus gives the same files. `photograph.webp` and the Apache
licence in that folder stay as they are.
"""

import json
import sys
from pathlib import Path

from PIL import Image

from minisd.data import CaptionedPictures
from minisd.data.captioned_pictures import SHEET_COLUMNS
from minisd.data.packages import STYLES, attribution
from minisd.data.sample_pictures import SAMPLE
from minisd.pictures import sheet

# Only the styles whose licences ask for nothing but a notice (Apache-2.0, MIT).
SAMPLE_STYLES = ("noto", "fluent", "fluent flat", "noto blob", "fx")

# Concepts that everybody knows by sight, and that are small enough to be clear at 64 pixels.
SAMPLE_CONCEPTS = """
grinning face, grinning face with big eyes, face with tears of joy, slightly smiling face, winking face,
smiling face with halo, smiling face with heart-eyes, smiling face with sunglasses, smiling face with horns,
neutral face, thinking face, sleeping face, face with medical mask, crying face, loudly crying face, angry
face, skull, pile of poo, clown face, ghost, alien, alien monster, robot, red heart, yellow heart, green
heart, purple heart, broken heart, heart with arrow, waving hand, raised hand, ok hand, thumbs up, thumbs
down, clapping hands, flexed biceps, ear, eyes, mouth, baby, santa claus, footprints, monkey face, monkey, dog
face, dog, poodle, wolf, fox, cat face, cat, lion, tiger face, tiger, horse face, unicorn, zebra, deer, cow
face, cow, pig face, pig, ram, goat, camel, giraffe, elephant, rhinoceros, mouse face, hamster, rabbit face,
rabbit, hedgehog, bat, bear, koala, panda, sloth, paw prints, turkey, chicken, baby chick, bird, penguin,
dove, eagle, duck, owl, parrot, frog, crocodile, turtle, snake, dragon face, t-rex, spouting whale, whale,
dolphin, fish, tropical fish, blowfish, shark, octopus, crab, shrimp, squid, snail, butterfly, ant, honeybee,
lady beetle, spider, spider web, bouquet, cherry blossom, rose, hibiscus, sunflower, blossom, tulip, seedling,
evergreen tree, deciduous tree, palm tree, cactus, four leaf clover, maple leaf, mushroom, grapes, watermelon,
lemon, banana, pineapple, red apple, green apple, pear, peach, cherries, strawberry, kiwi fruit, tomato,
eggplant, avocado, ear of corn, hot pepper, carrot, broccoli, bread, croissant, pancakes, cheese wedge,
hamburger, french fries, pizza, hot dog, taco, egg, popcorn, sushi, soft ice cream, doughnut, cookie, birthday
cake, shortcake, cupcake, chocolate bar, candy, honey pot, hot beverage, teapot, volcano, mount fuji, desert
island, stadium, house, castle, church, tent, ferris wheel, locomotive, bus, ambulance, fire engine, police
car, taxi, automobile, delivery truck, tractor, motorcycle, bicycle, anchor, sailboat, speedboat, ship,
airplane, helicopter, rocket, flying saucer, hourglass done, watch, alarm clock, full moon, crescent moon,
sun, sun with face, star, cloud, rainbow, umbrella, snowflake, snowman without snow, fire, droplet, water
wave, jack-o-lantern, christmas tree, fireworks, balloon, party popper, wrapped gift, trophy, soccer ball,
basketball, tennis, bullseye, video game, game die, artist palette, glasses, t-shirt, dress, running shoe,
high-heeled shoe, crown, top hat, ring, gem stone, bell, musical note, microphone, headphone, saxophone,
guitar, violin, telephone, battery, laptop, camera, candle, light bulb, open book, money bag, envelope,
pencil, paintbrush, scissors, locked, key, hammer, bomb, magnet, microscope, telescope, door, red circle, blue
circle
"""

PHOTOGRAPH = """\
# Who took the photograph

`photograph.webp` is the face of Chelsea, a cat: a photograph by Stefan van der Walt, who placed it in the public domain
([CC0](https://creativecommons.org/publicdomain/zero/1.0/)). Taken from scikit-image 0.26.0 (`skimage.data.chelsea`);
cropped to a square and made smaller, 128x128.
"""


def notice() -> str:
    """What has to stand beside the sample."""
    styles = [STYLES[name] for name in SAMPLE_STYLES]
    apache = "The text of the Apache License 2.0 is in LICENSE-APACHE-2.0.txt.\n"
    return "\n".join([attribution(styles), apache, PHOTOGRAPH])


def write_sheet(path: Path, pictures) -> None:
    """What `minisd.data` reads as pictures.webp: a lossless contact sheet without gaps, the last row filled with white.

    pictures: uint8 [n h w 3].
    """
    page = sheet([Image.fromarray(picture) for picture in pictures], SHEET_COLUMNS, gap=0)
    page.save(path, lossless=True, quality=100, method=6)


def cut_sample(corpus: str | Path, folder: str | Path = SAMPLE) -> Path:
    """Write the sample's pictures, rows, templates and notice into a folder, and return it."""
    pictures = CaptionedPictures(corpus)
    wanted = {" ".join(name.split()) for name in SAMPLE_CONCEPTS.split(",")}
    missing = wanted - set(pictures.column("concept"))
    if missing:
        raise ValueError(f"{corpus} lacks {', '.join(sorted(missing))}: the sample is cut from the default corpus.")
    indices = [i for i, row in enumerate(pictures.rows) if row["concept"] in wanted and row["style"] in SAMPLE_STYLES]
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_sheet(folder / "pictures.webp", pictures.images[indices])
    (folder / "NOTICE.md").write_text(notice(), "utf-8")
    (folder / "templates.txt").write_text("".join(f"{template}\n" for template in pictures.templates), "utf-8")
    (folder / "metadata.jsonl").write_text("".join(json.dumps(pictures.rows[i]) + "\n" for i in indices), "utf-8")
    return folder


if __name__ == "__main__":
    print(cut_sample(sys.argv[1]))
