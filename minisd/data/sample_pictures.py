"""Real pictures that come with the package: some 260 well-known concepts, for tests and notebooks without a network.
And one photograph, to show what a model of drawings makes of one.

Only the styles whose licences ask for nothing but a notice (Apache-2.0, MIT). All pictures are in one lossless contact
sheet, `pictures.webp`, which `CaptionedPictures` reads as it reads any other packed folder.
"""

import json
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from .attribution import CLDR_NAMES, attribution
from .folder import write_text
from .packages import STYLES
from .pictures import SHEET_COLUMNS, CaptionedPictures, read_picture

SAMPLE = Path(__file__).parent / "sample"
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


def sample(size: int | None = None) -> CaptionedPictures:
    """The sample: `CaptionedPictures`, 64x64 unless another size is asked for, of all splits (`.rows[i]["split"]`)."""
    return CaptionedPictures(SAMPLE, size=size)


def photograph(size: int = 128) -> Float[Tensor, "1 3 size size"]:
    """A photograph in [-1, 1]: the face of Chelsea, a cat, by Stefan van der Walt (CC0). 128x128 is how it is kept."""
    pixels = torch.tensor(read_picture(SAMPLE / "photograph.webp", size))
    return pixels.permute(2, 0, 1)[None] / 127.5 - 1


def write_sample(corpus: str | Path = "data/emoji", folder: str | Path = SAMPLE) -> Path:
    """Cut the sample out of an emoji corpus. The same corpus gives the same files."""
    pictures = CaptionedPictures(corpus)
    wanted = {" ".join(name.split()) for name in SAMPLE_CONCEPTS.split(",")}
    missing = wanted - {row["concept"] for row in pictures.rows}
    if missing:
        raise ValueError(f"{corpus} lacks {', '.join(sorted(missing))}: the sample is cut from the default corpus.")
    chosen = [i for i, row in enumerate(pictures.rows) if row["concept"] in wanted and row["style"] in SAMPLE_STYLES]
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_sheet(folder / "pictures.webp", pictures.images[chosen])
    write_text(folder / "NOTICE.md", notice())
    write_text(folder / "metadata.jsonl", "".join(json.dumps(pictures.rows[i]) + "\n" for i in chosen))
    return folder


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
    return "\n".join([attribution(styles, CLDR_NAMES), apache, PHOTOGRAPH])


def write_sheet(path: Path, pictures: np.ndarray) -> None:
    """The opposite of `pictures.read_sheet`: SHEET_COLUMNS pictures in a row, the last row filled up with white."""
    n, size = pictures.shape[:2]
    lines = -(-n // SHEET_COLUMNS)
    sheet = np.full((lines * SHEET_COLUMNS, size, size, 3), 255, np.uint8)
    sheet[:n] = pictures
    sheet = sheet.reshape(lines, SHEET_COLUMNS, size, size, 3).swapaxes(1, 2)
    Image.fromarray(sheet.reshape(lines * size, SHEET_COLUMNS * size, 3)).save(
        path, lossless=True, quality=100, method=6
    )
