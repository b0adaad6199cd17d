"""`python -m hylo`, as torchrun and accelerate start it."""

from hylo.cli import main

if __name__ == "__main__":
    main()
