"""``python -m ft`` is ``ft``: what ranks are started with."""

from ft.cli import main

if __name__ == "__main__":
    main()
