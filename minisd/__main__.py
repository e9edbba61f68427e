"""`python -m minisd` is `minisd`."""

from .cli import main

main()
