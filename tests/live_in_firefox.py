"""The live page in Firefox:   python tests/live_in_firefox.py

Opens the page in a headless Firefox (Debian: apt-get install firefox-esr), from a server and as a file, lets it draw,
and compares the pictures with those of minisd. Firefox needs no driver for this: the page itself sends what it drew to
a server on this machine. It is no test of pytest, because few machines have a Firefox beside the Chromium of the
other tests.
"""

import functools
import json
import queue
import shutil
import subprocess
import sys
import tempfile
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np

import minisd
from minisd import live

CASES = [
    {"prompt": "a red circle", "sampler": "ddim", "steps": 10, "guidance": 7.5, "seed": 0},
    {"prompt": "two blue squares", "negative": "red", "sampler": "dpmpp_2m", "steps": 16, "guidance": 4.0, "seed": 123},
    {"prompt": "a yellow star above a heart", "sampler": "euler", "steps": 12, "guidance": 2.5, "seed": 7},
]
NAMES = {"guidance": "guidance_scale", "negative": "negative_prompt"}  # of the same options in Python

# Draws all cases and sends the result. (no-cors: a page that was opened as a file may send, but not read the answer.)
SCRIPT = """<script>(async () => {
    const report = { agent: navigator.userAgent, drawn: [] };
    try {
        await live.prepared;
        for (const each of CASES) {
            await live.draw({ negative: "", ...each });
            const { picture, seconds } = live.run.done;
            report.simd = live.about.simd;
            report.drawn.push({ seconds, rgba: Array.from(picture.rgba) });
        }
    } catch (error) { report.error = error.message; }
    fetch("REPORT", { method: "POST", mode: "no-cors", body: JSON.stringify(report) });
})()</script>"""


class Handler(SimpleHTTPRequestHandler):
    """Serves the page, and takes its reports."""

    reports: queue.Queue = queue.Queue()

    def do_POST(self):
        self.reports.put(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self.send_response(204)
        self.end_headers()

    def log_message(self, *_):
        pass


def drawn_at(address: str, firefox: str, profile: Path) -> dict:
    """What the page at that address reports."""
    command = [firefox, "--headless", "--no-remote", "--profile", str(profile), address]
    running = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        return Handler.reports.get(timeout=300)
    finally:
        running.terminate()
        running.wait()


def main() -> None:
    firefox = next(filter(None, map(shutil.which, ["firefox-esr", "firefox"])), None)
    if firefox is None:
        sys.exit("There is no firefox on the PATH (Debian: apt-get install firefox-esr).")
    sd = minisd.load("tiny", "cpu")
    named = [{NAMES.get(key, key): value for key, value in case.items()} for case in CASES]
    theirs = [np.asarray(sd.txt2img(**case).images[0]).astype(int) for case in named]
    largest = 0
    with tempfile.TemporaryDirectory() as folder:
        site = Path(folder) / "site"
        live.write_page(Path(minisd.__file__).parent / "weights" / "tiny", site)
        with ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=site)) as server:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            origin = f"http://127.0.0.1:{server.server_port}"
            page = site / "index.html"
            script = SCRIPT.replace("CASES", json.dumps(CASES)).replace("REPORT", f"{origin}/report")
            page.write_text(page.read_text("utf-8").replace("</html>", f"{script}\n</html>"), "utf-8")
            for number, address in enumerate([f"{origin}/index.html", page.as_uri()]):
                profile = Path(folder) / f"profile{number}"
                profile.mkdir()
                report = drawn_at(address, firefox, profile)
                if "error" in report:
                    sys.exit(f"{address}: {report['error']}")
                print(f"{address}: {report['agent']}, SIMD: {report['simd']}")
                for case, drawing, image in zip(CASES, report["drawn"], theirs, strict=True):
                    off = np.abs(np.array(drawing["rgba"]).reshape(*image.shape[:2], 4)[..., :3] - image).max()
                    print(f"  {case['sampler']:9} {drawing['seconds']:5.1f} s, at most {off} of 255 off")
                    largest = max(largest, off)
            server.shutdown()
    sys.exit(f"the pictures differ by {largest} of 255" if largest > 1 else 0)


if __name__ == "__main__":
    main()
