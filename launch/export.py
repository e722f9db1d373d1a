"""`orthojax export`, from a checkout."""

from orthojax.commands.export import start

if __name__ == "__main__":
    start()
