"""Write the live page of the model that ships, with its recordings, into docs/play_pictures:   python docs/draw_play.py

The build of the docs runs this (conf.py). The recordings are kept in docs/_build until something changes them.
"""

import json
from hashlib import sha256
from pathlib import Path

HERE = Path(__file__).parent
PACKAGE = HERE.parent / "minisd"
MODEL = PACKAGE / "weights" / "emoji"
KEPT = HERE / "_build" / "recordings.json"

PROMPTS = [
    "a fox, noto style",
    "a red apple, fluent style",
    "a grinning cat, twemoji style",
    "a rocket, noto style",
    "a sunflower, emojione style",
    "a crying face, noto blob style",
]


def key() -> str:
    """What the recordings depend on: the weights, this file, and the one that records."""
    files = [MODEL / "model.safetensors", Path(__file__), PACKAGE / "live" / "__init__.py"]
    return sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def recordings(key: str) -> list[dict]:
    kept = json.loads(KEPT.read_text("utf-8")) if KEPT.exists() else {}
    if kept.get("key") == key:
        return kept["recordings"]
    print("recording the drawings of the page `play` (under a minute, once)", flush=True)
    sd = minisd.load("emoji", "cpu")
    made = [live.record(sd, prompt) for prompt in PROMPTS]
    KEPT.parent.mkdir(exist_ok=True)
    KEPT.write_text(json.dumps({"key": key, "recordings": made}), "utf-8")
    return made


if __name__ == "__main__":
    import minisd
    from minisd import live

    live.write_page(MODEL, HERE / "play_pictures" / "live", "emoji", recordings(key()))
