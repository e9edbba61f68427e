"""`minisd.coursework` is the package `minisd_coursework`, by another name; it waits until somebody imports it."""

import sys

try:
    from minisd_coursework.__main__ import main
except ModuleNotFoundError as error:
    if error.name != "minisd_coursework":
        raise
    raise ModuleNotFoundError(
        "There is no package minisd_coursework, which is installed with minisd. Install it once more: pip install -e ."
    ) from error

if __name__ == "__main__":
    main()
for _name in [name for name in sys.modules if name.partition(".")[0] == "minisd_coursework"]:
    sys.modules[_name.replace("minisd_coursework", "minisd.coursework")] = sys.modules[_name]
